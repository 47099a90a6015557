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

// Place says where weights and x lie in what step() is given.
template <class Tile, class Place, class Codec, class Mma>
struct WarpTile {
    static constexpr int row_atoms = Tile::row_atoms;
    static constexpr int token_tiles = Tile::token_tiles;
    static constexpr int granule_atoms = Slab::granule / Mma::k;
    static constexpr bool scale_weights = Tile::scale_weights || !Slab::has_scale;  // or sums, granule by granule
    static_assert(token_tiles == 1 || token_tiles % 2 == 0, "ldmatrix brings two");

    using Scaled = typename Codec::Scaled;
    // At granules of 16 the end of a granule costs more than decoding saves.
    using Products = typename Either<Tile::sums_of_x && Slab::granule >= 32, typename Codec::Products, ExactProducts<Codec>>::Type;

    float sums[row_atoms][token_tiles][4];
    float factor[row_atoms][2];  // of rows g and g + 8, see Scaled

    // Before the first step of a tile: `row` is this warp's first output.
    __device__ void load_factors(const float* factors, int row, int rows) {
        if (!scale_weights) return;
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
        if (!scale_weights && Products::unit == 1.0f) return;
#pragma unroll
        for (int r = 0; r < row_atoms; ++r)
#pragma unroll
            for (int t = 0; t < token_tiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums[r][t][i] *= scale_weights ? Scaled::undo(factor[r][i / 2]) : 1.0f / Products::unit;
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
        LaneCodes<Tile::k_atoms> codes[row_atoms];

#pragma unroll
        for (int a = 0; a < Tile::k_atoms; ++a) {
            const int atom = k_atom + a;  // k_atom is a multiple of the atoms of a 16-byte load, and of k_atoms
            const bool opens = a == 0 || a % granule_atoms == 0;
            const bool closes = a + 1 == Tile::k_atoms || (a + 1) % granule_atoms == 0;

#pragma unroll
            for (int r = 0; r < row_atoms; ++r)
                codes[r].load(half_of(weights, row_atom + r, atom), (row_atom + r) % 2, a, atom % slab_atoms, lane);
            if (opens) {
#pragma unroll
                for (int r = 0; r < row_atoms; ++r) {
                    const auto parameters = parameters_of(weights, row_atom + r, atom, lane);
                    group[r] = Codec::group(parameters);
                    if (scale_weights) {
                        const auto scale = parameters.scale();
                        scaled[r] = Scaled(group[r], scale.of(0) * factor[r][0], scale.of(1) * factor[r][1]);
                    }
                }
            }

            if (token_tiles > 1 || a % 2 == 0) Mma::template load<Place, token_tiles == 1>(b, x, token, atom);
            const int lone = token_tiles == 1 ? a % 2 : 0;
            if (Products::needs_sums_of_x && !scale_weights) {
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
                const Atom<Tile::k_atoms> one{codes[r], a};
                if (scale_weights)
                    scaled[r].decode(decoded, one, table);
                else
                    Products::decode(decoded, one, group[r], table);
#pragma unroll
                for (int t = 0; t < token_tiles; ++t) {
                    if (opens && !scale_weights) clear(partial[r][t]);
                    Mma::multiply(scale_weights ? sums[r][t] : partial[r][t], decoded, b[t + lone]);
                }
            }

            if (a == 0) meanwhile();
            if (closes && !scale_weights) {
#pragma unroll
                for (int r = 0; r < row_atoms; ++r) {
                    const auto pair = parameters_of(weights, row_atom + r, atom, lane).scale();
                    const float scale[2] = {pair.of(0), pair.of(1)};
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

    static constexpr int slab_atoms = SLAB_K / Mma::k;

    static __device__ LaneBytes half_of(u32 weights, int row_atom, int atom) {
        return {{weights + Place::half(row_atom / 2, atom / slab_atoms)}};
    }

    // Of the granule that `atom` lies in.
    static __device__ Parameters<LaneBytes> parameters_of(u32 weights, int row_atom, int atom, int lane) {
        const int k_granule = atom % slab_atoms * Mma::k / Slab::granule;
        return {half_of(weights, row_atom, atom), k_granule, row_atom % 2, lane};
    }
};
