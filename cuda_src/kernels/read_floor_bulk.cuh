// The read floor by bulk copies: as read_floor.cuh, but the bytes go to shared memory and through no register, each warp
// with a ring of its own, and leave L2 first. The generated preamble defines THREADS, SLOTS (pieces under way per warp)
// and PIECE (bytes); the host picks them by measurement, see marlin_cupy/bench/read_floor_bulk.py.
//
//   buffer  | piece 0 | piece 1 | piece 2 | ...     piece i goes to warp i % (all warps of the grid)
#pragma once
#include "ptx/bulk_copy.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/shared_memory.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) read_floor(const __grid_constant__ Args args) {
    extern __shared__ __align__(128) u8 shared[];
    constexpr int WARPS = THREADS / WARP;
    allow_next_kernel();
    if (threadIdx.x % WARP == 0) {  // the other lanes have nothing to do
        const int warp = threadIdx.x / WARP;
        const u32 ring = shared_address(shared) + warp * SLOTS * PIECE;
        const u32 barriers = shared_address(shared) + WARPS * SLOTS * PIECE + warp * SLOTS * 8;
        const i64 bytes = 16 * args.count, stride = static_cast<i64>(gridDim.x) * WARPS * PIECE;
        const i64 first = (static_cast<i64>(blockIdx.x) * WARPS + warp) * PIECE;
        const u64 policy = policy_evict_first();
        for (int slot = 0; slot < SLOTS; ++slot) barrier_init(barriers + 8 * slot, 1);
        barrier_init_fence();

        i64 next = first;
        auto fill = [&](int slot) {
            if (next >= bytes) return;
            const int size = static_cast<int>(bytes - next < PIECE ? bytes - next : PIECE);
            barrier_expect(barriers + 8 * slot, size);
            copy_bulk(ring + slot * PIECE, args.data + next, size, barriers + 8 * slot, policy);
            next += stride;
        };
        for (int slot = 0; slot < SLOTS; ++slot) fill(slot);
        int slot = 0;
        u32 parity = 0;
        for (i64 piece = first; piece < bytes; piece += stride) {
            barrier_wait(barriers + 8 * slot, parity);
            fill(slot);
            if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
    }
    wait_for_previous_kernel();
}
