// Where a thread is in a ring of stages. Every stage has mbarriers of two phases, which take turns: `parity` is that of the
// phase that ends when the stage is next filled.
#pragma once
#include "ptx/types.cuh"

template <int stages>
struct Ring {
    int stage = 0;
    u32 parity = 0;

    __device__ void advance(int by) {  // by no more than there are stages
        stage += by;
        if (stage >= stages) stage -= stages, parity ^= 1;
    }
    __device__ void advance_far(int by) {
        const int at = stage + by;
        parity ^= at / stages & 1;
        stage = at % stages;
    }
};
