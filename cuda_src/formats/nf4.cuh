// nf4: a look-up of pairs. Byte p of a word is the pair of register p, so one 256-entry table of pairs decodes two
// codes at once; each lane has a copy of its own in its own bank (256 x 32 words), so that no look-up conflicts.
//
// FORMAT_TABLE comes from the Python format.
#pragma once
#include "formats/codec.cuh"

template <class T>
struct Codec : ScaleOnly {
    using Scaled = ScaledWeights<Codec, T>;
    using Products = ExactProducts<Codec>;

    static constexpr int table_bytes = 256 * WARP * 4;

    static __device__ void fill_table(u32 table, int thread, int threads) {
        for (int i = thread; i < 256 * WARP; i += threads) {
            const int pair = i / WARP;
            store_shared(table + 4 * i, T::pack(FORMAT_TABLE[pair % 16], FORMAT_TABLE[pair / 16]));
        }
    }

    template <class Atom>
    static __device__ void decode(u32 (&a)[4], const Atom& atom, const Group&, u32 table) {
        const u32 word = atom.template word<Slab::plane0>();
        const u32 bank = table + 4 * (threadIdx.x % WARP);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const u32 row = p == 0 ? word << 7 : word >> (8 * p - 7);  // byte p, times 128 bytes
            a[p] = load_shared(bank + (row & 0x7F80u));
        }
    }
};
