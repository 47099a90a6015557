// int4: code - 8.
#pragma once
#include "formats/codec.cuh"
#include "formats/nibble.cuh"

template <class T>
struct ScaledInt4 : SubnormalScales<T, 8, 4> {
    using SubnormalScales<T, 8, 4>::SubnormalScales, SubnormalScales<T, 8, 4>::scale, SubnormalScales<T, 8, 4>::zero;

    __device__ void decode(u32 (&a)[4], const u32* words, u32) const {
        const u32 word = words[0], shifted = word >> 8;
        a[0] = T::fma(word & 0x000F000Fu, scale[0], zero[0]);
        a[1] = T::fma(word & 0x00F000F0u, scale[1], zero[1]);
        a[2] = T::fma(shifted & 0x000F000Fu, scale[0], zero[0]);
        a[3] = T::fma(shifted & 0x00F000F0u, scale[1], zero[1]);
    }
};

template <class T, class S>
struct Codec : ScaleOnly<4> {
    using Scaled = ScaledInt4<T>;
    using Products = NibbleProducts<Codec, T>;

    static __device__ float zero_point(const ScaleOnly<4>::Group&, int) { return 8.0f; }

    static __device__ void decode(u32 (&a)[4], const u32* words, const ScaleOnly<4>::Group&, u32) {
        const auto zero = Nibbles<T>::zero(8.0f);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Nibbles<T>::pair(p, words[0], zero);
    }
};
