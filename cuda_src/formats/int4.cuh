// int4: code - 8.
#pragma once
#include "formats/codec.cuh"
#include "formats/nibble.cuh"

// Codes where they are: those of rows g + 8 at bit 4, 16 times as much.
template <class T>
struct ScaledInt4 : SubnormalScales<T, 8> {
    using Base = SubnormalScales<T, 8>;
    using Base::scale, Base::zero;

    ScaledInt4() = default;
    __device__ ScaledInt4(const ScaleOnly<4>::Group&, float scale_g, float scale_g8) {
        const u32 second = Base::pair(scale_g8);
        scale[0] = Base::pair(scale_g);
        scale[1] = T::multiply(second, T::sixteenth);
        zero[0] = T::multiply(scale[0], Base::minus_zero_point);
        zero[1] = T::multiply(second, Base::minus_zero_point);
    }

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
