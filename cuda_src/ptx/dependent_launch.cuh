// griddepcontrol: programmatic dependent launch (sm_90). A kernel that the host launches as a dependent starts before
// the one ahead of it in the stream has finished. Older GPUs do not know it, and both functions do nothing there.
//
//   kernel A   |allow|------------------- work -------------------|
//   kernel B         |allow| what A does not write |....... wait ....| the rest |
//
// In a plain launch everything before is complete already, and wait returns at once.
#pragma once
#include "ptx/types.cuh"

// Blocks of the next kernel may start as soon as every block of this one has called it, or ended, and there is room.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel ahead is complete and what it wrote is visible. Each kernel has to wait, whether it needs the data
// or not: only then does its completion say that all before it are complete, on which the next one relies.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
