// Shared -> registers -> tensor cores: one warp's share of a K step.
//
// Weights are the row operand: a lane's 16 bytes are its A fragments of several atoms, decoded in registers. Then either
// products of one granule gather in `partial`, and its scale is applied when they join `sums`, in fp32: weights are not
// rounded, and it is cheap for few tokens. With Tile::sums_of_x a format may decode to less than its values and put that
// right there. Or (Tile::scale_weights) decoding multiplies by the scale, which rounds each weight once, and the products
// join `sums` at once: fewer registers and instructions for many tokens.
#pragma once
#include "layout.cuh"
#include "mainloop/mma.cuh"
#include "ptx/shared_memory.cuh"

template <bool first, class A, class B>
struct Either {
    using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
    using Type = B;
};

// Place says where weights and x lie in what step() is given.
template <class Tile, class Place, class Layout, class Codec, class Mma, class S, int granule>
struct WarpTile {
    static constexpr int row_atoms = Tile::row_atoms;
    static constexpr int token_tiles = Tile::token_tiles;
    static constexpr int granule_atoms = granule / Mma::k;
    static_assert(token_tiles == 1 || token_tiles % 2 == 0, "ldmatrix brings two");

    using Scaled = typename Codec::Scaled;
    // At granules of 16 the end of a granule costs more than decoding saves.
    using Products = typename Either<Tile::sums_of_x && granule >= 32, typename Codec::Products, ExactProducts<Codec>>::Type;

    float sums[row_atoms][token_tiles][4];
    float factor[row_atoms][2];  // of rows g and g + 8, see Scaled

    // Before the first step of a tile: `row` is this warp's first output.
    __device__ void load_factors(const float* factors, int row, int rows) {
        if (!Tile::scale_weights) return;
#pragma unroll
        for (int r = 0; r < row_atoms; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int mine = row + 16 * r + 8 * i + threadIdx.x % WARP / 4;
                factor[r][i] = Scaled::needs_factors && mine < rows ? factors[mine] : 1.0f;
            }
    }

    // After the last: sums of weights times scales, without factors and units.
    __device__ void undo_factors() {
        if (!Tile::scale_weights && Products::unit == 1.0f) return;
#pragma unroll
        for (int r = 0; r < row_atoms; ++r)
#pragma unroll
            for (int t = 0; t < token_tiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[r][t][i] *= Tile::scale_weights ? inverse_power(factor[r][i / 2] * Scaled::unit) : 1.0f / Products::unit;
    }

    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < row_atoms; ++r)
#pragma unroll
            for (int t = 0; t < token_tiles; ++t) clear(sums[r][t]);
    }

    // Keeps all products of the steps before, and so all loads that they need, ahead of what follows.
    __device__ void pin_sums() {
#pragma unroll
        for (int r = 0; r < row_atoms; ++r)
#pragma unroll
            for (int t = 0; t < token_tiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) pin(sums[r][t][i]);
    }

    // `row_atom`, `token`, `k_atom`: where this warp's share starts in the tile. `meanwhile` is called once while the
    // first products are under way.
    template <class Meanwhile>
    __device__ void step(u32 weights, u32 x, u32 table, int row_atom, int token, int k_atom, Meanwhile meanwhile) {
        const int lane = threadIdx.x % WARP;
        float partial[row_atoms][token_tiles][4], sums_of_x[token_tiles][4];
        u32 b[token_tiles == 1 ? 2 : token_tiles][2];
        typename Codec::Group group[row_atoms];
        Scaled scaled[row_atoms];
        Vec4 codes[row_atoms];

#pragma unroll
        for (int a = 0; a < Tile::k_atoms; ++a) {
            const int atom = k_atom + a;  // k_atom is a multiple of the atoms of a 16-byte load, and of k_atoms
            const bool opens = a == 0 || a % granule_atoms == 0;
            const bool closes = a + 1 == Tile::k_atoms || (a + 1) % granule_atoms == 0;

            if (a % Layout::atoms_per_block == 0) {
#pragma unroll
                for (int r = 0; r < row_atoms; ++r) codes[r] = load_codes(weights, row_atom + r, atom, lane);
            }
            if (opens) {
#pragma unroll
                for (int r = 0; r < row_atoms; ++r) {
                    group[r] = Codec::group([&](int i) { return load_param(weights, i, row_atom + r, atom, lane); });
                    if (Tile::scale_weights) {
                        const u32 pair = load_param(weights, 0, row_atom + r, atom, lane);
                        scaled[r] = Scaled(group[r], S::to_float(pair & 0xFFFFu) * factor[r][0],
                                           S::to_float(pair >> 16) * factor[r][1]);
                    }
                }
            }

            if (token_tiles > 1 || a % 2 == 0) Mma::template load<Place, token_tiles == 1>(b, x, token, atom);
            const int lone = token_tiles == 1 ? a % 2 : 0;
            if (Products::needs_sums_of_x) {
                const u32 ones[4] = {Products::one, Products::one, Products::one, Products::one};
#pragma unroll
                for (int t = 0; t < token_tiles; ++t) {
                    if (opens) clear(sums_of_x[t]);
                    Mma::multiply(sums_of_x[t], ones, b[t + lone]);
                }
            }
#pragma unroll
            for (int r = 0; r < row_atoms; ++r) {
                u32 decoded[4];
                const u32* const words = &codes[r].word[(a % Layout::atoms_per_block) * Layout::words];
                if (Tile::scale_weights)
                    scaled[r].decode(decoded, words, table);
                else
                    Products::decode(decoded, words, group[r], table);
#pragma unroll
                for (int t = 0; t < token_tiles; ++t) {
                    if (opens && !Tile::scale_weights) clear(partial[r][t]);
                    Mma::multiply(Tile::scale_weights ? sums[r][t] : partial[r][t], decoded, b[t + lone]);
                }
            }

            if (a == 0) meanwhile();
            if (closes && !Tile::scale_weights) {
#pragma unroll
                for (int r = 0; r < row_atoms; ++r) {
                    const u32 pair = load_param(weights, 0, row_atom + r, atom, lane);
                    const float scale[2] = {S::to_float(pair & 0xFFFFu), S::to_float(pair >> 16)};  // rows g, g + 8
#pragma unroll
                    for (int t = 0; t < token_tiles; ++t)
                        Products::add(sums[r][t], partial[r][t], sums_of_x[t], group[r], scale);
                }
            }
        }
    }

private:
    static __device__ void clear(float (&values)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = 0.0f;
    }

    static __device__ u32 half_of(u32 weights, int row_atom, int atom) {
        return weights + Place::half(row_atom / 2, atom / (SLAB_K / Mma::k));
    }

    // This lane's 16 bytes of codes that `atom` begins.
    static __device__ Vec4 load_codes(u32 weights, int row_atom, int atom, int lane) {
        const int k_block = atom % (SLAB_K / Mma::k) / Layout::atoms_per_block;
        return load_shared_vec4(half_of(weights, row_atom, atom) + 16 * lane + Layout::block(k_block, row_atom % 2));
    }

    // Parameter `index` of rows g and g + 8, of the granule that `atom` lies in.
    static __device__ u32 load_param(u32 weights, int index, int row_atom, int atom, int lane) {
        const int k_granule = atom % (SLAB_K / Mma::k) * Mma::k / granule;
        return load_shared(half_of(weights, row_atom, atom) + Layout::param(index, k_granule, row_atom % 2) + lane / 4 * 4);
    }
};
