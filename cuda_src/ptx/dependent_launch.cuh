// Programmatic dependent launch: a kernel that starts before the one ahead of it in the stream has ended (sm_90).
// Both are no-ops where the launch did not ask for it.
#pragma once

// The kernel ahead has ended and its writes are visible.
__device__ inline void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The kernel behind may start once every block has said so.
__device__ inline void allow_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
