// fp8_e4m3: a sign, four bits of exponent, three of mantissa. Bytes 2 p and 2 p + 1 of a unit are the pair of register p.
#pragma once
#include "formats/codec.cuh"

template <class T>
struct Float8;

template <>
struct Float8<Float16> {
    static __device__ u32 pair(int p, u32 word) {
#if __CUDA_ARCH__ >= 890
        u32 values;
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
            : "=r"(values)
            : "r"(p % 2 ? word >> 16 : word));
        return values;
#else
        const u32 bytes = __byte_perm(word, 0, p % 2 ? 0x3424 : 0x1404);  // in the high bytes of halves
        const u32 values = (bytes & 0x80008000u) | ((bytes >> 1) & 0x3F803F80u);
        return Float16::multiply(values, 0x5C005C00u /* 256: the exponents' biases are 15 and 7 */);
#endif
    }
};

template <>
struct Float8<BFloat16> {
    static __device__ u32 pair(int p, u32 word) {
        const u32 bytes = __byte_perm(word, 0, p % 2 ? 0x3424 : 0x1404);
        const u32 values = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07F007F0u);
        return BFloat16::multiply(values, 0x7B807B80u /* 2^120: the biases are 127 and 7 */);
    }
};

template <class T>
struct Codec : ScaleOnly {
    using Scaled = typename Either<Slab::has_scale, ScaledWeights<Codec, T>, OutputScaled<Codec>>::Type;
    using Products = ExactProducts<Codec>;

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group&, u32) {
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Float8<T>::pair(p, atom.template word<Slab::plane0>(p / 2));
    }
};
