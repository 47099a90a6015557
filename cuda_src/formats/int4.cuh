// int4: code - 8.
#pragma once
#include "formats/codec.cuh"
#include "formats/nibble.cuh"

// Times a scale in one instruction per pair. A code in the last bits of a float16 is a subnormal: n * 2^-24, or at bit 4
// 16 n * 2^-24, and (n - 8) * 2^-24 * scale is one fma, which rounds once. The product may be subnormal too: it is then a
// multiple of 2^-24, fine enough for scales within some 2^8 of the largest, which the factors put at 2^14 to 2^15.
struct ScaledSubnormals {
    static constexpr bool needs_factors = true;
    static constexpr float unit = 1.0f / (1 << 24);
    u32 scale[2], zero[2];  // of rows g and g + 8, in both halves

    ScaledSubnormals() = default;
    __device__ ScaledSubnormals(const ScaleOnly<4>::Group&, float scale_g, float scale_g8) {
        const u32 second = Float16::pack(scale_g8, scale_g8);
        scale[0] = Float16::pack(scale_g, scale_g);
        scale[1] = Float16::multiply(second, 0x2C002C00u /* 1/16 */);
        zero[0] = Float16::multiply(scale[0], 0x80088008u /* -8 * 2^-24 */);
        zero[1] = Float16::multiply(second, 0x80088008u);
    }

    __device__ void decode(u32 (&a)[4], const u32* words, u32) const {
        const u32 word = words[0], shifted = word >> 8;
        a[0] = Float16::fma(word & 0x000F000Fu, scale[0], zero[0]);
        a[1] = Float16::fma(word & 0x00F000F0u, scale[1], zero[1]);
        a[2] = Float16::fma(shifted & 0x000F000Fu, scale[0], zero[0]);
        a[3] = Float16::fma(shifted & 0x00F000F0u, scale[1], zero[1]);
    }
};

template <class Codec, class T>
struct ScaledInt4 : ScaledWeights<Codec, T, 8> {
    using ScaledWeights<Codec, T, 8>::ScaledWeights;
};

template <class Codec>
struct ScaledInt4<Codec, Float16> : ScaledSubnormals {
    using ScaledSubnormals::ScaledSubnormals;
};

template <class T, class S>
struct Codec : ScaleOnly<4> {
    using Scaled = ScaledInt4<Codec, T>;
    using Products = NibbleProducts<Codec, T>;

    static __device__ float zero_point(const ScaleOnly<4>::Group&, int) { return 8.0f; }

    static __device__ void decode(u32 (&a)[4], const u32* words, const ScaleOnly<4>::Group&, u32) {
        const auto zero = Nibbles<T>::zero(8.0f);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Nibbles<T>::pair(p, words[0], zero);
    }
};
