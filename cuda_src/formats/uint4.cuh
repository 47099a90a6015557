// uint4: code - zero point, the zero point an integer per granule and output.
#pragma once
#include "formats/codec.cuh"
#include "formats/nibble.cuh"

template <class T, class S>
struct Codec {
    using Scaled = ScaledWeights<Codec, T, 16>;
    using Products = NibbleProducts<Codec, T>;

    static constexpr int params = 2;
    static constexpr int bits = 4;
    static constexpr int table_bytes = 0;
    struct Group {
        float zero[2];  // of rows g and g + 8
    };

    static __device__ void fill_table(u32, int, int) {}

    template <class Param>
    static __device__ Group group(Param param) {
        const u32 pair = param(1);
        return {{S::to_float(pair & 0xFFFFu), S::to_float(pair >> 16)}};
    }
    static __device__ float zero_point(const Group& group, int i) { return group.zero[i]; }

    // Registers 0 and 2 of a fragment belong to row g, 1 and 3 to row g + 8.
    static __device__ void decode(u32 (&a)[4], const u32* words, const Group& group, u32) {
        const typename Nibbles<T>::Zero zero[2] = {Nibbles<T>::zero(group.zero[0]), Nibbles<T>::zero(group.zero[1])};
#pragma unroll
        for (int p = 0; p < 4; ++p) a[p] = Nibbles<T>::pair(p, words[0], zero[p % 2]);
    }
};
