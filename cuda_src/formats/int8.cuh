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
struct ScaledInt8 : SubnormalScales<T, ZERO_CODE, 0> {
    using Base = SubnormalScales<T, ZERO_CODE, 0>;
    using Base::SubnormalScales, Base::scale, Base::zero;

    template <class Atom>
    __device__ void decode(u32 (&a)[4], const Atom& atom, u32) const {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 word = atom.template word<Slab::plane0>(p / 2), codes = p % 2 ? __byte_perm(word, 0, 0x4341) : word & 0x00FF00FFu;
            a[p] = T::fma(codes, scale[p % 2], zero[p % 2]);
        }
    }
};

template <class T>
struct Codec : ScaleOnly {
    using Scaled = ScaledInt8<T>;
    using Products = ExactProducts<Codec>;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group&, u32) {
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Bytes<T>::pair(p % 2, atom.template word<Slab::plane0>(p / 2));
    }
};
