// Lifts the 4-bit codes of a word into four pairs of 16-bit floats, minus an integer zero point, exactly.
//
//   word   n7 n6 n5 n4 n3 n2 n1 n0        pair p = (n[p], n[p + 4]): one mask takes both halves of a register
//
// A code ORed into the mantissa of a power of two whose last bit counts 1 is that power plus the code.
#pragma once
#include "formats/codec.cuh"

// (word & mask) | magic in one instruction; the compiler makes two of the expression, both constants immediate.
template <u32 mask, u32 magic>
__device__ inline u32 lift(u32 word) {
    u32 lifted;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(lifted) : "r"(word), "n"(mask), "n"(magic));
    return lifted;
}

template <class T>
struct Nibbles;

template <>
struct Nibbles<Float16> {
    // Pairs 0 and 2 read 1024 + n; pairs 1 and 3 sit four bits higher and read 1024 + 16 n.
    struct Zero {
        u32 low, high;  // -(1024 + zero), -(64 + zero), in both halves
    };
    static __device__ Zero zero(float z) {
        return {Float16::pack(-1024.0f - z, -1024.0f - z), Float16::pack(-64.0f - z, -64.0f - z)};
    }
    static __device__ u32 pair(int p, u32 word, const Zero& zero) {
        const u32 shifted = p < 2 ? word : word >> 8;
        return p % 2 == 0 ? Float16::add(lift<0x000F000F, 0x64006400>(shifted), zero.low)
                          : Float16::fma(lift<0x00F000F0, 0x64006400>(shifted), 0x2C002C00u /* 1/16 */, zero.high);
    }
};

template <>
struct Nibbles<BFloat16> {
    // Seven mantissa bits: every pair is shifted down and reads 128 + n.
    struct Zero {
        u32 low;  // -(128 + zero)
    };
    static __device__ Zero zero(float z) {
        return {BFloat16::pack(-128.0f - z, -128.0f - z)};
    }
    static __device__ u32 pair(int p, u32 word, const Zero& zero) {
        return BFloat16::add(lift<0x000F000F, 0x43004300>(word >> (4 * p)), zero.low);
    }
};

// Codes as they are masked out of a word, in the fewest instructions; products with them are put right at the end of a
// granule, in fp32, where the sum of x times the zero point is subtracted. Tensor cores sum x up too, as products with 1.
template <class T>
struct MaskedNibbles;

template <>
struct MaskedNibbles<Float16> {
    // A code in the last bits of a float16 is a subnormal, n * 2^-24. Rows g + 8 keep the four bits of row g below theirs:
    // 16 n' + n, of which row g's product takes n away.
    //
    // Tensor cores align products by the exponents of their factors, and that of a subnormal is -14 whatever its leading
    // bit: a product loses what is below some 2^-14 of the largest x of 16. Rounding x to float16 has lost more, unless
    // that x is exact: 2^-12 of it.
    static constexpr u32 one = 0x3C003C00u;
    static constexpr float unit = 1.0f / (1 << 24), offset = 0.0f;

    static __device__ void decode(u32 (&a)[4], u32 word) {
        a[1] = word & 0x00FF00FFu;
        a[3] = __byte_perm(word, 0, 0x4341);  // (word >> 8) & 0x00FF00FF
        a[0] = a[1] & 0x000F000Fu;
        a[2] = a[3] & 0x000F000Fu;
    }
    // Of row g + 8, `row_g` being that of row g; and what remains to be multiplied by.
    static __device__ float second(float product, float row_g) { return product - row_g; }
    static constexpr float second_unit = 1.0f / 16;
};

template <>
struct MaskedNibbles<BFloat16> {
    static constexpr u32 one = 0x3F803F80u;
    static constexpr float unit = 1.0f, offset = 128.0f;

    static __device__ void decode(u32 (&a)[4], u32 word) {
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = lift<0x000F000F, 0x43004300>(word >> (4 * p));
    }
    static __device__ float second(float product, float) { return product; }
    static constexpr float second_unit = 1.0f;
};

// The `Products` of integers of 4 bits and less; Codec::nibbles(atom) is their word, Codec::zero_point(group, i) is that of row g + 8 i. Sums count in `unit`.
template <class Codec, class T>
struct NibbleProducts : MaskedNibbles<T> {
    using Masked = MaskedNibbles<T>;
    static constexpr bool needs_sums_of_x = true;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const typename Codec::Group&, u32) {
        Masked::decode(a, Codec::nibbles(atom));
    }

    static __device__ void add(float (&sums)[4], const float (&products)[4], const float (&x)[4],
                               const typename Codec::Group& group, const float (&scale)[2]) {
        const float zero = (Masked::offset + Codec::zero_point(group, 0)) * Masked::unit;
        const float second_zero = (Masked::offset + Codec::zero_point(group, 1)) * (Masked::unit / Masked::second_unit);
        const float second_scale = scale[1] * Masked::second_unit;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sums[i] += (products[i] - zero * x[i]) * scale[0];
            sums[i + 2] += (Masked::second(products[i + 2], products[i]) - second_zero * x[i]) * second_scale;
        }
    }
};

// Weights times their scales; Word::of(atom) is the word of nibbles.
template <class T, class Word>
struct ScaledNibbles : SubnormalScales<T, ZERO_CODE, 4> {
    using Base = SubnormalScales<T, ZERO_CODE, 4>;
    using Base::SubnormalScales, Base::scale, Base::zero;

    template <class Atom>
    __device__ void decode(u32 (&a)[4], const Atom& atom, u32) const {
        const u32 word = Word::of(atom), shifted = word >> 8;
        a[0] = T::fma(word & 0x000F000Fu, scale[0], zero[0]);
        a[1] = T::fma(word & 0x00F000F0u, scale[1], zero[1]);
        a[2] = T::fma(shifted & 0x000F000Fu, scale[0], zero[0]);
        a[3] = T::fma(shifted & 0x00F000F0u, scale[1], zero[1]);
    }
};

// Integers of 4 bits and less around ZERO_CODE.
template <class T, class Word>
struct SymmetricNibbles : ScaleOnly {
    using Scaled = ScaledNibbles<T, Word>;
    using Products = NibbleProducts<SymmetricNibbles, T>;

    static __device__ float zero_point(const Group&, int) { return ZERO_CODE; }

    template <class Atom>
    static __device__ u32 nibbles(const Atom& atom) {
        return Word::of(atom);
    }

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group&, u32) {
        const auto zero = Nibbles<T>::zero(ZERO_CODE);
        const u32 word = nibbles(atom);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Nibbles<T>::pair(p, word, zero);
    }
};
