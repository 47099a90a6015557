// mxfp4: e2m1, a sign, two bits of exponent, one of mantissa; the scale is a power of two.
//
//   byte of a word    s M M M m m m S      of codes (s, mmm) and (S, MMM), see the Python format's planes
//   float16           s 0 0 0 m m m 0 ...  the first four codes lie in place, in the high bytes of halves
//
// The last bits of the exponent, and the first of the mantissa: that is the value times 2^-14, the code of 0.5 a subnormal.
// In bfloat16 the same bits, three places further down, are the value times 2^-126.
#pragma once
#include "formats/codec.cuh"

template <class T>
struct Float4;

template <>
struct Float4<Float16> {
    static constexpr float unit = 0x1p-14f, lifted = 1.0f;
    static constexpr u32 inverse_unit = 0x74007400u;  // 2^14

    // Nine instructions.
    template <class Atom>
    static __device__ void pairs(u32 (&a)[4], const Atom& atom) {
        const u32 word = atom.template word<Slab::plane0>();
        const u32 second = ((word << 7) & 0x80808080u) | ((word >> 3) & 0x0E0E0E0Eu);
        a[0] = word & 0x8E008E00u;
        a[1] = (word << 8) & 0x8E008E00u;
        a[2] = second & 0xFF00FF00u;
        a[3] = __byte_perm(second, 0, 0x2404);  // (second << 8) & 0xFF00FF00
    }
};

template <>
struct Float4<BFloat16> {
    static constexpr float unit = 0x1p-126f, lifted = 0x1p109f;
    static constexpr u32 inverse_unit = 0x7E807E80u;  // 2^126

    template <class Atom>
    static __device__ void pairs(u32 (&a)[4], const Atom& atom) {
        const u32 word = atom.template word<Slab::plane0>();
        constexpr u32 sign = 0x80008000u, magnitude = 0x01C001C0u;
        a[0] = (word & sign) | ((word >> 3) & magnitude);
        a[1] = ((word << 8) & sign) | ((word << 5) & magnitude);
        a[2] = ((word << 7) & sign) | ((word >> 6) & magnitude);
        a[3] = ((word << 15) & sign) | ((word << 2) & magnitude);
    }
};

template <class T>
struct Codec : ScaleOnly {
    using Scaled = ScaledUnits<T, Float4<T>>;  // exact: scales are powers of two, codes have two significant bits
    using Products = UnitProducts<Codec, Float4<T>, T::narrow>;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group&, u32) {
        Float4<T>::pairs(a, atom);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = T::multiply(a[p], Float4<T>::inverse_unit);
    }
};
