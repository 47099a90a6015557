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

template <class Tile>
struct Stage {
    static constexpr int piece_halves = Tile::rows >= SLAB_N ? 2 : 1;  // halves copied as one piece
    static constexpr int pieces_per_slab = 2 / piece_halves;
    static constexpr int piece_bytes = piece_halves * Slab::half_bytes;
    static constexpr int row_blocks = Tile::rows / (piece_halves * HALF_N);
    static constexpr int slabs = Tile::k / SLAB_K;
    static constexpr int weight_bytes = row_blocks * slabs * piece_bytes;
    static constexpr int token_bytes = 2 * Tile::k;
    static constexpr int bytes = weight_bytes + Tile::tokens * token_bytes;

    static_assert(Tile::rows % (piece_halves * HALF_N) == 0 && Tile::k % SLAB_K == 0, "a stage is whole slabs");

    // Offsets in a stage.
    static __device__ constexpr int half(int half_row, int slab) {
        return ((half_row / piece_halves) * slabs + slab) * piece_bytes + half_row % piece_halves * Slab::half_bytes;
    }
    static __device__ constexpr int token_chunk(int token, int chunk) {
        return weight_bytes + token * token_bytes + 16 * (chunk ^ (token % 8));
    }
};

// Walks a stretch of K steps and issues their copies. A thread copies the same chunks of every stage, so that a step
// inside the matrices costs one addition and one copy per chunk; steps at an edge go through slower loops.
template <class Tile, class Args>
class Feed {
    using S = Stage<Tile>;
    static constexpr int piece_chunks = S::piece_bytes / 16;
    static constexpr int weight_chunks = S::weight_bytes / 16;
    static constexpr int weight_passes = (weight_chunks + Tile::threads - 1) / Tile::threads;
    static constexpr int row_chunks = S::token_bytes / 16;
    static constexpr int rows_per_pass = Tile::threads / row_chunks;
    static constexpr int token_passes = Tile::tokens / rows_per_pass;
    static_assert(Tile::threads % row_chunks == 0 && Tile::tokens % rows_per_pass == 0, "a pass copies whole rows");

    const Args& args;
    const int steps;        // per tile
    int tile, step, left;   // the step that is copied next, and how many there are from it on
    const u8* weights;      // its first slab
    const u16* tokens;      // this thread's first chunk of it
    int rows_left, tokens_left;
    int weight_offset[weight_passes];

public:
    __device__ Feed(const Args& args, int steps, i64 begin, int count)
        : args(args), steps(steps), tile(static_cast<int>(begin / steps)), step(static_cast<int>(begin % steps)), left(count) {
#pragma unroll
        for (int i = 0; i < weight_passes; ++i) weight_offset[i] = offset_of(static_cast<int>(threadIdx.x) + i * Tile::threads);
        seek();
    }

    // Issues the copies of the next step, if there is one, and ends a group of them either way.
    __device__ void next(u32 stage) {
        if (left > 0) {
            copy_weights(stage);
            copy_tokens(stage + S::weight_bytes);
            --left;
            if (++step < steps) {
                weights += S::slabs * Slab::slab_bytes;
                tokens += Tile::k;
            } else {
                step = 0;
                ++tile;
                seek();
            }
        }
        copy_commit();
    }

private:
    __device__ int slab_row_bytes() const { return args.slabs_k * Slab::slab_bytes; }

    // Offset from `weights` of a stage's chunk.
    __device__ int offset_of(int chunk) const {
        if (S::row_blocks == 1 && S::piece_halves == 2) return 16 * chunk;
        const int piece = chunk / piece_chunks;
        return piece / S::slabs * slab_row_bytes() + piece % S::slabs * Slab::slab_bytes + 16 * (chunk % piece_chunks);
    }

    __device__ void seek() {
        const int row_block = tile / args.tiles_m * S::row_blocks, token = tile % args.tiles_m * Tile::tokens;
        rows_left = args.slabs_n * S::pieces_per_slab - row_block;
        tokens_left = args.M - token;
        weights = args.weight + static_cast<i64>(row_block / S::pieces_per_slab) * slab_row_bytes() +
                  row_block % S::pieces_per_slab * S::piece_bytes + static_cast<i64>(step) * S::slabs * Slab::slab_bytes;
        if (STACKED) weights += args.stack.number() * args.slabs_n * slab_row_bytes();
        tokens = args.x + static_cast<i64>(token + static_cast<int>(threadIdx.x) / row_chunks) * args.x_stride +
                 step * Tile::k + 8 * (threadIdx.x % row_chunks);
    }

    __device__ void copy_weights(u32 stage) {
        const int slabs_left = args.slabs_k - step * S::slabs;
        if (rows_left >= S::row_blocks && slabs_left >= S::slabs) {
#pragma unroll
            for (int i = 0; i < weight_passes; ++i) {
                const int chunk = static_cast<int>(threadIdx.x) + i * Tile::threads;
                if (weight_chunks % Tile::threads == 0 || i + 1 < weight_passes || chunk < weight_chunks)
                    copy_async(stage + 16 * chunk, weights + weight_offset[i], 16);
            }
            return;
        }
#pragma unroll 1
        for (int chunk = threadIdx.x; chunk < weight_chunks; chunk += Tile::threads) {
            const int piece = chunk / piece_chunks;
            const bool inside = piece / S::slabs < rows_left && piece % S::slabs < slabs_left;
            copy_async(stage + 16 * chunk, inside ? weights + offset_of(chunk) : args.weight, inside ? 16 : 0);
        }
    }

    __device__ void copy_tokens(u32 target) {
        const int first = threadIdx.x / row_chunks, within = threadIdx.x % row_chunks;
        const int k = step * Tile::k + 8 * within;
        if (args.x_vector && (step + 1) * Tile::k <= args.K) {
#pragma unroll
            for (int i = 0; i < token_passes; ++i) {
                const int row = first + i * rows_per_pass;
                if (row < tokens_left)
                    copy_async(target + row * S::token_bytes + 16 * (within ^ (row % 8)),
                               tokens + i * rows_per_pass * args.x_stride, 16);
            }
            return;
        }
        const int valid = k >= args.K ? 0 : args.K - k >= 8 ? 8 : args.K - k;
#pragma unroll 1
        for (int row = first; row < Tile::tokens && row < tokens_left; row += rows_per_pass) {
            const u32 shared = target + row * S::token_bytes + 16 * (within ^ (row % 8));
            const u16* source = tokens + (row - first) * args.x_stride;
            if (args.x_vector) {
                copy_async(shared, valid ? source : args.x, 2 * valid);
            } else {  // rows that do not start at a multiple of 16 bytes
                Vec4 v;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 low = 2 * i < valid ? source[2 * i] : 0, high = 2 * i + 1 < valid ? source[2 * i + 1] : 0;
                    v.word[i] = low | high << 16;
                }
                store_shared_vec4(shared, v);
            }
        }
    }
};
