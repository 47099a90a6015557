// fp8_e4m3: a sign, four bits of exponent, three of mantissa. Bytes 2 p and 2 p + 1 of a unit are the pair of register p.
//
// As bits of a wider float the value is times a power of two, since the biases of exponents differ. Subnormals stay right.
#pragma once
#include "formats/codec.cuh"

template <class T>
struct Float8;

// From Ada on an instruction converts a pair to float16, exactly.
template <>
struct Float8<Float16> {
    static constexpr float unit = 1.0f, lifted = 1.0f / LARGEST_VALUE;

    template <class Atom>
    static __device__ void pairs(u32 (&a)[4], const Atom& atom) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 word = atom.template word<Slab::plane0>(p / 2);
#if __CUDA_ARCH__ >= 890
            asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
                : "=r"(a[p])
                : "r"(p % 2 ? word >> 16 : word));
#else
            const u32 bytes = __byte_perm(word, 0, p % 2 ? 0x3424 : 0x1404);  // in the high bytes of halves
            const u32 values = (bytes & 0x80008000u) | ((bytes >> 1) & 0x3F803F80u);
            a[p] = Float16::multiply(values, 0x5C005C00u /* 256: biases are 15 and 7 */);
#endif
        }
    }
    static __device__ u32 whole(u32 pair) { return pair; }
};

template <>
struct Float8<BFloat16> {
    static constexpr float unit = 0x1p-120f, lifted = 0x1p109f;

    template <class Atom>
    static __device__ void pairs(u32 (&a)[4], const Atom& atom) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 bytes = __byte_perm(atom.template word<Slab::plane0>(p / 2), 0, p % 2 ? 0x3424 : 0x1404);
            a[p] = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07F007F0u);
        }
    }
    static __device__ u32 whole(u32 pair) { return BFloat16::multiply(pair, 0x7B807B80u /* 2^120: biases are 127 and 7 */); }
};

template <class T>
struct Codec : ScaleOnly {
    using Scaled = typename Either<Slab::has_scale, ScaledUnits<T, Float8<T>>, OutputScaled<Codec>>::Type;
    using Products = ExactProducts<Codec>;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group&, u32) {
        Float8<T>::pairs(a, atom);
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Float8<T>::whole(a[p]);
    }
};
