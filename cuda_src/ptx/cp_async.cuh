// cp.async: global -> shared without registers, 16 bytes a thread (sm_80). Without an L2 policy: on an H200 a build
// whose cp.async carried one stopped with "illegal instruction"; the cause was not found.
#pragma once
#include "ptx/types.cuh"

// Copies the first `valid` of 16 bytes and fills the rest with zeros.
__device__ inline void copy_async(u32 shared, const void* global, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}

__device__ inline void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's groups are under way.
template <int pending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
