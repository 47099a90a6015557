// Accumulators of wgmma -> y, by way of shared memory: y wants a token's outputs side by side, and the warps' outputs too,
// so that a store is whole cache lines.
//
//   warp, 16 outputs x 16 tokens     stmatrix turns them     buffer, 16 tokens x 64 outputs
//     lane g: outputs g, g + 8   ->                        ->  token 0  | warp 0 | warp 1 | warp 2 | warp 3 |   128 bytes,
//     of two tokens                                            token 1  | ...                                   chunks swizzled
//
// Each warpgroup has two buffers, which take turns: at the barrier between, all have read the other one.
#pragma once
#include "layout.cuh"
#include "ptx/shared_memory.cuh"
#include "schedule/roles.cuh"

template <class Tile, class T>
struct TurnedStore {
    static constexpr int tokens = 16;               // of a buffer
    static constexpr int pitch = 2 * SLAB_N;        // bytes of a token
    static constexpr int bytes = tokens * pitch;    // of a buffer

    // Row block of 64 outputs from `row` on, tokens from `token` on; `undo` are the factors of rows g and g + 8, `buffers` the
    // two of this warpgroup.
    template <class Args>
    static __device__ void store(const Args& args, const Consumer<Tile>& me, u32 buffers, const float* s, const float (&undo)[2],
                                 int row, int token) {
        // A lane names a column for stmatrix: its token and a chunk of 8 outputs. It reads a chunk of a token back.
        const int from = me.lane / 16 * 8 + me.lane % 8, to = 4 * me.warp + me.lane / 8;
        const u32 put = buffers + from * pitch + ((2 * me.warp + me.lane / 8 % 2) ^ (from % 8)) * 16;
        const u32 get = buffers + to * pitch + ((me.lane % 8) ^ (to % 8)) * 16;
        float bias[2] = {0.0f, 0.0f};
        if (args.bias) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int mine = row + 16 * me.warp + me.lane / 4 + 8 * i;
                if (mine < args.N) bias[i] = T::to_float(args.bias[mine]);
            }
        }
        const int my_row = row + me.lane % 8 * 8;
        barrier_sync(STORE + me.wg_n, 4 * WARP);  // the row block before has been read
#pragma unroll
        for (int t = 0; t < Tile::tokens / tokens; ++t) {
            if (token + tokens * t >= args.M) break;
            Vec4 pairs;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs.word[i] = T::pack(s[8 * t + 2 * i] * undo[i % 2] + bias[i % 2],
                                        s[8 * t + 2 * i + 1] * undo[i % 2] + bias[i % 2]);
            store_matrix_x4_turned(put + t % 2 * bytes, pairs);
            barrier_sync(STORE + me.wg_n, 4 * WARP);
            const int my_token = token + tokens * t + to;
            if (my_token >= args.M) continue;
            const Vec4 out = load_shared_vec4(get + t % 2 * bytes);
            u16* y = args.y + my_token * args.y_stride + my_row;
            if (args.y_vector && my_row + 8 <= args.N) {
                *reinterpret_cast<Vec4*>(y) = out;
                continue;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (my_row + i < args.N) y[i] = static_cast<u16>(out.word[i / 2] >> (i % 2 * 16));
        }
    }
};
