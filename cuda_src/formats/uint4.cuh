// uint4: code - zero point, the zero point an integer per granule and output.
#pragma once
#include "formats/nibble.cuh"

template <class T>
struct Codec {
    using Scaled = ScaledWeights<Codec, T>;
    using Products = NibbleProducts<Codec, T>;

    static constexpr int table_bytes = 0;
    struct Group {
        float zero[2];  // of rows g and g + 8
    };

    static __device__ void fill_table(u32, int, int) {}

    template <class Parameters>
    static __device__ Group group(const Parameters& parameters) {
        const auto zero = parameters.template read<Slab::zero_point>();
        return {{zero.of(0), zero.of(1)}};
    }
    static __device__ float zero_point(const Group& group, int i) { return group.zero[i]; }

    template <class Atom>
    static __device__ u32 nibbles(const Atom& atom) {
        return atom.template word<Slab::plane0>();
    }

    // Registers 0 and 2 of a fragment belong to row g, 1 and 3 to row g + 8.
    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group& group, u32) {
        const typename Nibbles<T>::Zero zero[2] = {Nibbles<T>::zero(group.zero[0]), Nibbles<T>::zero(group.zero[1])};
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Nibbles<T>::pair(p, nibbles(atom), zero[p % 2]);
    }
};
