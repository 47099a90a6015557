// The read floor: every byte of a buffer is loaded once and nothing is done with it. A kernel that needs the bytes
// cannot be faster. The generated preamble defines THREADS and LOADS, the 16-byte loads that a thread has under way;
// the host picks them and the grid by measurement, see marlin_cupy/bench/read_floor.py, which declares Args too.
//
//            chunk 0                   chunk 1         chunk i goes to block i % gridDim.x
//   buffer  | t0 t1 ... | t0 t1 ... | t0 t1 ... | ...  neighbouring threads read neighbouring 16 bytes
//             load 0      load 1      load 0           all loads of a chunk are issued before the first is used
#pragma once
#include "ptx/dependent_launch.cuh"
#include "ptx/types.cuh"

// Read once: no place in L1, and whole 256-byte stretches into L2.
__device__ inline Vec4 load_streaming(const Vec4* address) {
    Vec4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(address));
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) read_floor(const __grid_constant__ Args args) {
    constexpr int CHUNK = THREADS * LOADS;
    allow_next_kernel();
    u32 seen = 0;
    for (i64 chunk = static_cast<i64>(blockIdx.x) * CHUNK; chunk < args.count; chunk += static_cast<i64>(gridDim.x) * CHUNK) {
        const Vec4* const mine = reinterpret_cast<const Vec4*>(args.data) + chunk + threadIdx.x;
        const i64 left = args.count - chunk - threadIdx.x;
        Vec4 words[LOADS] = {};
        if (left > CHUNK - THREADS) {
#pragma unroll
            for (int load = 0; load < LOADS; ++load) words[load] = load_streaming(mine + load * THREADS);
        } else {
#pragma unroll
            for (int load = 0; load < LOADS - 1; ++load)
                if (left > load * THREADS) words[load] = load_streaming(mine + load * THREADS);
        }
#pragma unroll
        for (int load = 0; load < LOADS; ++load)
            seen ^= words[load].word[0] ^ words[load].word[1] ^ words[load].word[2] ^ words[load].word[3];
    }
    wait_for_previous_kernel();
    if (args.sink != nullptr) args.sink[threadIdx.x] = seen;
}
