// Shared -> registers -> tensor cores: a warpgroup's share of a tile, weights decoded into the A registers of wgmma.
//
//   slab, 128 K     | group 0 | group 1 | group 2 | group 3 |     a group is `atoms` x 16 K, committed together
//   ALUs            | decode 0| decode 1| decode 2| decode 3|
//   tensor cores              | wgmma 0 | wgmma 1 | wgmma 2 | wgmma 3 |
//   A registers       set 0     set 1     set 0     set 1         one set is read by wgmma while the other one is filled
//
// The ALUs go on to the next slab while the last group of this one is under way, so a stage is given back one group late.
#pragma once
#include "layout.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/wgmma.cuh"
#include "schedule/ring.cuh"
#include "schedule/roles.cuh"

// What a warpgroup multiplies with: K per instruction, and where x of an atom of weights is.
template <class T>
struct HalfWgmma {
    static constexpr int k = 16;

    // `x` describes the first atom of a stage, in two halves of 64 K; tokens are rows of 128 bytes there.
    template <int tokens>
    static __device__ void multiply(float* sums, const u32 (&a)[4], u64 x, int half_bytes, int atom, int token) {
        wgmma<T, tokens>(sums, a, x + ((atom / 4 * half_bytes + atom % 4 * 32 + token * 128) >> 4));
    }
};

template <class Tile, class Memory, class Codec, class Mma>
struct WgmmaTile {
    static constexpr int atoms = Tile::tokens < 192 ? 2 : 1;  // decoded together: as many as fit in registers
    static constexpr int groups = SLAB_K / (Mma::k * atoms);
    static constexpr int sets = 2;

    using Scaled = typename Codec::Scaled;

    const Memory memory;
    const Consumer<Tile> me;
    float sums[Tile::row_blocks][Tile::sums];
    float factor[Tile::row_blocks][2];  // of rows g and g + 8, see Scaled

    __device__ explicit WgmmaTile(Memory memory) : memory(memory) {}

    // Before a tile whose first 64 outputs are `row_block`.
    template <class Weights>
    __device__ void load_factors(const Weights& weights, int row_block) {
        const i64 first = weights.first_output();
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r) {
            const int block = row_block + me.wg_n * Tile::row_blocks + r;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                factor[r][i] = Scaled::needs_factors && block < weights.args.slabs_n
                                   ? weights.factor(first, SLAB_N * block + 16 * me.warp + me.lane / 4 + 8 * i)
                                   : 1.0f;
        }
    }

    // What `sums` of a row are to be multiplied by.
    __device__ float undo(int r, int i) const { return Scaled::undo(factor[r][i]); }

    // The products of the next `count` stages, of which the K groups take turns.
    __device__ void multiply(Ring<Tile::stages>& ring, int count) {
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
            for (int i = 0; i < Tile::sums; ++i) sums[r][i] = 0.0f;

        u32 a[sets][Tile::row_blocks][atoms][4];
        LaneCodes<SLAB_K / Mma::k> codes[Tile::row_blocks];
        Scaled scaled[Tile::row_blocks];
        int before = -1;  // the stage whose last products may be under way
        const int skip = (me.wg_k + Tile::wgs_k - ring.stage % Tile::wgs_k) % Tile::wgs_k;
        Ring<Tile::stages> mine = ring;
        mine.advance(skip);
        for (int i = skip; i < count; i += Tile::wgs_k) {
            barrier_wait(memory.full(mine.stage), mine.parity);
            const u64 x = wgmma_descriptor(uniform(memory.x(mine.stage)));
            const u32 half_slab = memory.weights(mine.stage) + me.wg_n * Tile::row_blocks * Slab::slab_bytes +
                                  me.warp / 2 * Slab::half_bytes;
#pragma unroll
            for (int group = 0; group < groups; ++group) {
                const int set = group % sets;
#pragma unroll
                for (int j = 0; j < atoms; ++j)
#pragma unroll
                    for (int r = 0; r < Tile::row_blocks; ++r)
                        decode(a[set][r][j], codes[r], scaled[r], factor[r], half_slab + r * Slab::slab_bytes,
                               group * atoms + j);
                wgmma_fence();  // the registers just written go to the tensor cores
#pragma unroll
                for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
                    for (int j = 0; j < atoms; ++j)
#pragma unroll
                        for (int piece = 0; piece < Tile::pieces; ++piece)
                            Mma::template multiply<Tile::piece>(sums[r] + piece * Tile::piece / 2, a[set][r][j], x,
                                                                Memory::x_half, group * atoms + j, piece * Tile::piece);
                wgmma_commit();
                wgmma_wait<sets - 1>();  // the set that is filled next is free
                if (group == sets - 2) release(before);
            }
            before = mine.stage;
            mine.advance(Tile::wgs_k);
        }
        wgmma_wait<0>();
        // Sums may not be touched while wgmma is under way: nothing that reads them moves up across this.
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
            for (int i = 0; i < Tile::sums; ++i) pin(sums[r][i]);
        release(before);
        ring.advance_far(count);
    }

private:
    // Each warp gives a stage back.
    __device__ void release(int stage) { barrier_arrive_if(me.lane == 0 && stage >= 0, memory.empty(stage)); }

    // The A fragment of 16 rows x 16 K, times its scales. Codes and scales are loaded where theirs begin.
    __device__ void decode(u32 (&a)[4], LaneCodes<SLAB_K / Mma::k>& codes, Scaled& scaled, const float (&factor)[2],
                           u32 half_slab, int atom) const {
        const SharedBytes half{half_slab};
        codes.load(half, me.warp % 2, atom, atom, me.lane);
        if (atom * Mma::k % Slab::granule == 0) {
            const Parameters<SharedBytes> parameters{half, atom * Mma::k / Slab::granule, me.warp % 2, me.lane};
            const auto scale = parameters.scale();
            scaled = Scaled(Codec::group(parameters), scale.of(0) * factor[0], scale.of(1) * factor[1]);
        }
        // Nothing of this moves into the products before, whose registers are in use, nor behind those that follow.
        codes.keep(atom);
        scaled.decode(a, Atom<SLAB_K / Mma::k>{codes, atom}, memory.table());
#pragma unroll
        for (int i = 0; i < 4; ++i) pin(a[i]);
    }
};
