// What warpgroups of different roles do: trade registers, and meet at a barrier of their own (sm_90a).
#pragma once
#include "ptx/types.cuh"

// A value that is the same in all lanes. The shuffle tells the compiler, which then keeps it in a uniform register.
__device__ inline u32 uniform(u32 value) {
    return __shfl_sync(0xFFFFFFFFu, value, 0);
}

__device__ inline int warpgroup_index() {
    return static_cast<int>(uniform(threadIdx.x / (4 * WARP)));
}

// True in one lane of the warp. Where a branch depends on it, the compiler knows that one thread issues the copies.
__device__ inline bool elect_lane() {
    u32 elected;
    asm volatile(
        "{ .reg .pred p;\n"
        "elect.sync _|p, 0xFFFFFFFF;\n"
        "selp.b32 %0, 1, 0, p; }"
        : "=r"(elected));
    return elected != 0;
}

template <int registers>
__device__ inline void warpgroup_give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void warpgroup_take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Barrier `id` (1 to 15) of `threads` threads of the block.
__device__ inline void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts at a barrier without waiting there.
__device__ inline void barrier_arrive_only(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
