// A packed weight in device memory: where its slabs and the factors of its outputs are. Of a stack of weights, the one that
// the launch asks for; nothing else knows of stacks.
//
//            K ->
//          +--------+--------+-----
//   N   0  | slab 0 | slab 1 | ...       a row of slabs is `pitch` bytes, 64 outputs x all of K
//   |      +--------+--------+-----
//   v   1  | slab 0 | ...
//
// Fields are read from the arguments where they are used: copies of them would take registers all the time.
#pragma once
#include "layout.cuh"

template <class Args>
struct Weights {
    const Args& args;
    const int slabs_k;

    __device__ i64 pitch() const { return static_cast<i64>(slabs_k) * Slab::slab_bytes; }

    __device__ const u8* slab(int row_block, int k) const {
        const u8* found = args.weight + row_block * pitch() + static_cast<i64>(k) * Slab::slab_bytes;
        if (STACKED) found += args.stack.number() * args.slabs_n * pitch();
        return found;
    }

    // Factors of outputs, see formats/codec.cuh; those of this weight start at `first_output`.
    __device__ i64 first_output() const { return args.stack.number() * args.slabs_n * SLAB_N; }
    __device__ float factor(i64 first, int output) const { return (args.factors + first)[output]; }
};
