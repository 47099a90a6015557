// int4: code - 8.
#pragma once
#include "formats/codec.cuh"
#include "formats/nibble.cuh"

template <class T, class S>
struct Codec : ScaleOnly<4> {
    static __device__ void decode(u32 (&a)[4], const u32* words, const ScaleOnly<4>::Group&, u32) {
        const auto zero = Nibbles<T>::zero(8.0f);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Nibbles<T>::pair(p, words[0], zero);
    }
};
