// Global -> shared: a ring of stages filled by cp.async, each one K step of a tile.
//
//   stage     [ weights: 64-row block x slab, as packed ][ activations: tokens x K, 16-byte chunks swizzled ]
//
// Weights are copied as they lie, scales aboard. Activations are swizzled (chunk ^ row % 8), so that ldmatrix meets
// no bank conflict. Everything beyond N and K arrives as zeros; rows of tokens beyond M are not copied, since a
// token's column of the product depends on no other.
#pragma once
#include "layout.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"

template <class Tile, class Layout>
struct Pipeline {
    static constexpr int pair_halves = Tile::rows >= SLAB_N ? 2 : 1;           // halves copied as one piece
    static constexpr int piece_bytes = pair_halves * Layout::half_bytes;
    static constexpr int piece_chunks = piece_bytes / 16;
    static constexpr int row_blocks = Tile::rows / (pair_halves * HALF_N);
    static constexpr int slabs = Tile::k / SLAB_K;
    static constexpr int weight_bytes = row_blocks * slabs * piece_bytes;
    static constexpr int token_bytes = 2 * Tile::k;
    static constexpr int token_chunks = token_bytes / 16;
    static constexpr int stage_bytes = weight_bytes + Tile::tokens * token_bytes;
    static constexpr int bytes = Tile::stages * stage_bytes;

    static_assert(Tile::rows % (pair_halves * HALF_N) == 0 && Tile::k % SLAB_K == 0, "a stage is whole slabs");

    // Offsets in a stage.
    static __device__ constexpr int half(int half_row, int slab) {
        return ((half_row / pair_halves) * slabs + slab) * piece_bytes + (half_row % pair_halves) * Layout::half_bytes;
    }
    static __device__ constexpr int token_chunk(int token, int chunk) {
        return weight_bytes + token * token_bytes + 16 * (chunk ^ (token % 8));
    }

    // Issues the copies of step `step` of the tile whose first output is row_block * (32 or 64) and first token `token`.
    template <class Args>
    static __device__ void load(const Args& args, u32 stage, int row_block, int token, int step, u64 policy) {
        load_weights(args, stage, row_block, step, policy);
        load_tokens(args, stage + weight_bytes, token, step);
    }

private:
    template <class Args>
    static __device__ void load_weights(const Args& args, u32 stage, int row_block, int step, u64 policy) {
        constexpr int chunks = row_blocks * slabs * piece_chunks;
        constexpr int blocks_per_slab = 2 / pair_halves;
        const int slab_row_bytes = args.slabs_k * Layout::slab_bytes;
        const u8* tile = args.weight + static_cast<i64>(row_block / blocks_per_slab) * slab_row_bytes +
                         (row_block % blocks_per_slab) * piece_bytes + static_cast<i64>(step) * slabs * Layout::slab_bytes;
        const int rows_left = args.slabs_n * blocks_per_slab - row_block;
        const int slabs_left = args.slabs_k - step * slabs;
#pragma unroll
        for (int first = 0; first < chunks; first += Tile::threads) {
            const int chunk = first + static_cast<int>(threadIdx.x);
            if (chunks % Tile::threads != 0 && chunk >= chunks) break;
            const int piece = chunk / piece_chunks, within = chunk % piece_chunks;
            const int block = piece / slabs, slab = piece % slabs;
            const bool inside = block < rows_left && slab < slabs_left;
            const u8* source = tile + block * slab_row_bytes + slab * Layout::slab_bytes + 16 * within;
            copy_async(stage + 16 * chunk, inside ? source : args.weight, inside ? 16 : 0, policy);
        }
    }

    template <class Args>
    static __device__ void load_tokens(const Args& args, u32 stage, int token, int step) {
        constexpr int chunks = Tile::tokens * token_chunks;
        const int tokens_left = args.M - token;
        const int k = step * Tile::k;
#pragma unroll
        for (int first = 0; first < chunks; first += Tile::threads) {
            const int chunk = first + static_cast<int>(threadIdx.x);
            const int row = chunk / token_chunks, within = chunk % token_chunks;
            if (row >= tokens_left || row >= Tile::tokens) break;
            const u32 target = stage + row * token_bytes + 16 * (within ^ (row % 8));
            const int left = args.K - (k + 8 * within);
            const int valid = left <= 0 ? 0 : left >= 8 ? 8 : left;
            const u16* source = args.x + static_cast<i64>(token + row) * args.x_stride + (valid ? k + 8 * within : 0);
            if (args.x_vector) {
                copy_async(target, source, 2 * valid);
            } else {  // rows that do not start at a multiple of 16 bytes
                Vec4 v;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 low = 2 * i < valid ? source[2 * i] : 0, high = 2 * i + 1 < valid ? source[2 * i + 1] : 0;
                    v.word[i] = low | high << 16;
                }
                store_shared_vec4(target, v);
            }
        }
    }
};
