// Where a code sits: the device's view of marlin_cupy/layout.py, which draws and explains it.
#pragma once
#include "ptx/types.cuh"

constexpr int SLAB_N = 64;
constexpr int SLAB_K = 128;
constexpr int HALF_N = 32;
constexpr int BLOCK_BYTES = 512;  // 16 outputs x one 16-byte load per lane

// Which weight of a stack is multiplied, in kernels that are built for one (STACKED). Its number stands in device memory,
// so that a loop on the device can count. The kernel ahead may have written it: such a launch is never a dependent one.
struct Stack {
    const int* layer;
    int layers;  // numbers below 0 count from the end, those beyond as the nearest

    __device__ i64 number() const {
        if (!STACKED) return 0;
        const int given = *layer, found = given < 0 ? given + layers : given;
        return found < 0 ? 0 : found < layers ? found : layers - 1;
    }
};

template <class Codec, int granule>
struct Layout {
    static constexpr int granules = SLAB_K / granule;              // rows of parameters in a slab
    static constexpr int param_bytes = Codec::params * granules * HALF_N * 2;
    static constexpr int half_bytes = param_bytes + HALF_N * SLAB_K * Codec::bits / 8;
    static constexpr int slab_bytes = 2 * half_bytes;
    static constexpr int words = Codec::bits / 4;                  // 32-bit words per lane and atom
    static constexpr int atoms_per_block = 4 / words;              // 16x16 atoms along K in a 16-byte load

    // Byte offsets in a half slab; `rows` is 0 or 1, the 16-row block.
    static __device__ constexpr int block(int k_block, int rows) {
        return param_bytes + (2 * k_block + rows) * BLOCK_BYTES;
    }
    static __device__ constexpr int param(int index, int k_granule, int rows) {
        return ((index * granules + k_granule) * 2 + rows) * 32;
    }
};
