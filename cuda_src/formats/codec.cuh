// What cuda_src/formats/<name>.cuh provides: `template <class T> struct Codec` with
//
//   table_bytes     shared memory it wants; fill_table() is called once by all threads of the block
//   Group           what decoding needs to know of a granule, for this lane's rows g and g + 8
//   group(...)      makes it from Parameters (layout.cuh), those after the scale
//   decode(...)     an Atom (layout.cuh) -> the four registers of an m16k16 A fragment: 8 unscaled values of type T
//
//   Scaled          decodes weights times their scales, for kernels that do not scale accumulators; see ScaledWeights
//   Products        how products with codes become sums, for kernels that do; see ExactProducts
//
// T is the type of the activations. The preamble defines Slab, ZERO_CODE and LARGEST_VALUE of the format. Kernels multiply
// accumulators by the scale, so a decoded value carries no rounding error unless the format's values have no exact T.
#pragma once
#include "layout.cuh"
#include "ptx/types.cuh"

template <bool first, class A, class B>
struct Either {
    using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
    using Type = B;
};

// The parts of a format whose only parameter is the scale and which needs no table.
struct ScaleOnly {
    static constexpr int table_bytes = 0;
    struct Group {};

    static __device__ void fill_table(u32, int, int) {}

    template <class Parameters>
    static __device__ Group group(const Parameters&) {
        return {};
    }
};

// Weights times scale times `unit`, a power of two: decoded, then multiplied, which rounds them once.
//
// Float16 has little range, so its kernels give scales times a factor of each output, a power of two that puts the
// largest near 2^15; what is multiplied by them must then stay below 1 or so. `unit` is there for that.
template <class Codec, class T>
struct ScaledWeights {
    static constexpr bool needs_factors = T::narrow;
    static constexpr float unit = 1.0f / LARGEST_VALUE;
    typename Codec::Group group;
    u32 scale[2];  // of rows g and g + 8, in both halves

    ScaledWeights() = default;
    __device__ ScaledWeights(const typename Codec::Group& group, float scale_g, float scale_g8)
        : group(group), scale{T::pack(scale_g * unit, scale_g * unit), T::pack(scale_g8 * unit, scale_g8 * unit)} {}

    // What sums of such weights are multiplied by at the end of a tile.
    static __device__ float undo(float factor) { return inverse_power(factor * unit); }

    // Registers 0 and 2 of a fragment belong to row g, 1 and 3 to row g + 8.
    template <class Atom>
    __device__ void decode(u32 (&a)[4], const Atom& atom, u32 table) const {
        Codec::decode(a, atom, group, table);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = T::multiply(a[p], scale[p % 2]);
    }
};

// Values times a unit, a power of two that decodes in the fewest instructions, times their scale: rounded once. Scales carry
// a factor that puts an output's largest at 2^14 to 2^15; `lifted`, a power of two, brings the product into the type's range.
template <class T, class Values>
struct ScaledUnits {
    static constexpr bool needs_factors = true;
    static constexpr float unit = Values::unit * Values::lifted;
    u32 scale[2];  // of rows g and g + 8, in both halves

    ScaledUnits() = default;
    template <class Group>
    __device__ ScaledUnits(const Group&, float scale_g, float scale_g8)
        : scale{T::pack(scale_g * Values::lifted, scale_g * Values::lifted),
                T::pack(scale_g8 * Values::lifted, scale_g8 * Values::lifted)} {}

    static __device__ float undo(float factor) { return inverse_power(factor * unit); }

    template <class Atom>
    __device__ void decode(u32 (&a)[4], const Atom& atom, u32) const {
        Values::pairs(a, atom);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = T::multiply(a[p], scale[p % 2]);
    }
};

// Where the scale is one per output, which multiplies sums: weights are decoded and no more. What kernels know as an
// output's factor is its scale.
template <class Codec>
struct OutputScaled {
    static constexpr bool needs_factors = true;
    typename Codec::Group group;

    OutputScaled() = default;
    __device__ OutputScaled(const typename Codec::Group& group, float, float) : group(group) {}

    static __device__ float undo(float scale) { return scale; }

    template <class Atom>
    __device__ void decode(u32 (&a)[4], const Atom& atom, u32 table) const {
        Codec::decode(a, atom, group, table);
    }
};

// Decoded values are those of the format: products of a granule of K, times its scale, join the sums.
template <class Codec>
struct ExactProducts {
    static constexpr bool needs_sums_of_x = false;
    static constexpr u32 one = 0;
    static constexpr float unit = 1.0f;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const typename Codec::Group& group, u32 table) {
        Codec::decode(a, atom, group, table);
    }

    // Accumulators 0 and 1 belong to row g, 2 and 3 to row g + 8.
    static __device__ void add(float (&sums)[4], const float (&products)[4], const float (&)[4], const typename Codec::Group&,
                               const float (&scale)[2]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += products[i] * scale[i / 2];
    }
};

// As ExactProducts, of values times a unit, a power of two, where that saves a multiplication: the end of a tile undoes it.
template <class Codec, class Values, bool keeps_unit>
struct UnitProducts : ExactProducts<Codec> {
    static constexpr float unit = keeps_unit ? Values::unit : 1.0f;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const typename Codec::Group& group, u32 table) {
        if constexpr (keeps_unit)
            Values::pairs(a, atom);
        else
            Codec::decode(a, atom, group, table);
    }
};

// Scales for weights that are integer codes minus a zero point, decoded by one fma per pair. A code in the last bits of a
// 16-bit float is a subnormal, code * least; in bfloat16 the eighth bit is the first of the exponent, which counts on. So
// (code - zero_point) * least * scale is one fma, which rounds once. Scales carry a factor that puts an output's largest
// at 2^14 to 2^15, and in bfloat16 2^109 more, which leave `unit`. In float16 the product may be subnormal too: it is then
// a multiple of 2^-24, fine enough for scales within some 2^8 of the largest.
//
// The codes of rows g + 8 sit at bit 0 as those of rows g, or at bit 4, where they are 16 times as much.
template <class T, u32 zero_point, int second_bit>
struct SubnormalScales {
    static constexpr bool needs_factors = true;
    static constexpr float unit = 1.0f / (1 << 24), lifted = T::narrow ? 1.0f : 0x1p109f;
    u32 scale[2], zero[2];  // of rows g and g + 8, in both halves

    static __device__ float undo(float factor) { return inverse_power(factor * unit); }

    SubnormalScales() = default;
    template <class Group>
    __device__ SubnormalScales(const Group&, float scale_g, float scale_g8) {
        static_assert(second_bit == 0 || second_bit == 4, "sixteen times, or as it is");
        constexpr u32 minus_zero_point = 0x80008000u | zero_point * 0x00010001u;
        scale[0] = T::pack(scale_g * lifted, scale_g * lifted);
        const u32 second = T::pack(scale_g8 * lifted, scale_g8 * lifted);
        scale[1] = second_bit ? T::multiply(second, T::sixteenth) : second;
        zero[0] = T::multiply(scale[0], minus_zero_point);
        zero[1] = T::multiply(second, minus_zero_point);
    }
};
