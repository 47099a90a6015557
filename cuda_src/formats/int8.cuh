// int8: code - 128. Word h holds pairs 2h (bytes 0 and 2) and 2h + 1 (bytes 1 and 3).
#pragma once
#include "formats/codec.cuh"

template <class T>
struct Bytes;

template <>
struct Bytes<Float16> {
    // The byte under the high byte of 1024 reads 1024 + n.
    static __device__ u32 pair(int odd, u32 word) {
        const u32 lifted = __byte_perm(word, 0x64646464u, odd ? 0x4341 : 0x4240);
        return Float16::add(lifted, 0xE480E480u /* -1152 */);
    }
};

template <>
struct Bytes<BFloat16> {
    // Seven mantissa bits hold all but the top bit: (128 + low) - (top ? 128 : 256).
    static __device__ u32 pair(int odd, u32 word) {
        const u32 shifted = odd ? word >> 8 : word;
        return BFloat16::add((shifted & 0x007F007Fu) | 0x43004300u, (shifted & 0x00800080u) ^ 0xC380C380u);
    }
};

template <class T>
struct ScaledInt8 : SubnormalScales<T, 128, 0> {
    using SubnormalScales<T, 128, 0>::SubnormalScales, SubnormalScales<T, 128, 0>::scale, SubnormalScales<T, 128, 0>::zero;

    __device__ void decode(u32 (&a)[4], const u32* words, u32) const {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 word = words[p / 2], codes = p % 2 ? __byte_perm(word, 0, 0x4341) : word & 0x00FF00FFu;
            a[p] = T::fma(codes, scale[p % 2], zero[p % 2]);
        }
    }
};

template <class T, class S>
struct Codec : ScaleOnly<8> {
    using Scaled = ScaledInt8<T>;
    using Products = ExactProducts<Codec>;

    static __device__ void decode(u32 (&a)[4], const u32* words, const ScaleOnly<8>::Group&, u32) {
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Bytes<T>::pair(p % 2, words[p / 2]);
    }
};
