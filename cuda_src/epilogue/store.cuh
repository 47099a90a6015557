// Registers -> output: add up the warps that split K, exchange partial tiles between blocks, add the bias, round once.
//
// Accumulators hold outputs in rows and tokens in columns; y wants a token's outputs side by side. A pass through
// shared memory, 8 tokens at a time, turns them over and adds the K warps in order.
#pragma once
#include "ptx/cluster.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/shared_memory.cuh"

template <class Tile, class T>
struct Epilogue {
    static constexpr int pitch = Tile::rows + 4;  // 2 * pitch = 8 mod 32: the four columns of a fragment miss each other
    static constexpr int tokens = 8 * Tile::warps_m;
    static constexpr int bytes = Tile::warps_k * tokens * pitch * 4;
    static constexpr int quads = Tile::rows / 4;
    static constexpr int tile_floats = Tile::tokens * Tile::rows;
    static constexpr int batch = 4;  // loads that a thread has under way while it adds up partial tiles

    // Sums over the K warps, 8 tokens of each warp column at a time; sink(token in tile, first row in tile, 4 sums).
    template <class Sums, class Sink>
    static __device__ void gather(const Sums& sums, float* buffer, int tokens_left, Sink sink) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const int warp_n = warp % Tile::warps_n, warp_m = warp / Tile::warps_n % Tile::warps_m;
        const int warp_k = warp / (Tile::warps_n * Tile::warps_m);
#pragma unroll
        for (int t = 0; t < Tile::token_tiles; ++t) {
            if (8 * t >= tokens_left) break;
            float* mine = buffer + (warp_k * tokens + 8 * warp_m + 2 * (lane % 4)) * pitch +
                          16 * Tile::row_atoms * warp_n + lane / 4;
#pragma unroll
            for (int r = 0; r < Tile::row_atoms; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) mine[i % 2 * pitch + 16 * r + 8 * (i / 2)] = sums[r][t][i];
            __syncthreads();
            for (int i = threadIdx.x; i < tokens * quads; i += Tile::threads) {
                const int token = i / quads, row = i % quads * 4;
                const int token_in_tile = token / 8 * 8 * Tile::token_tiles + 8 * t + token % 8;
                if (token_in_tile >= tokens_left) continue;
                float4 sum = *reinterpret_cast<const float4*>(buffer + token * pitch + row);
#pragma unroll
                for (int k = 1; k < Tile::warps_k; ++k)
                    add(sum, *reinterpret_cast<const float4*>(buffer + (k * tokens + token) * pitch + row));
                sink(token_in_tile, row, sum);
            }
            __syncthreads();
        }
    }

    // Writes a tile that this block has computed alone.
    template <class Args, class Sums>
    static __device__ void finish(const Args& args, const Sums& sums, float* buffer, int row, int token) {
        gather(sums, buffer, args.M - token,
               [&](int t, int r, const float4& sum) { store(args, token + t, row + r, sum); });
    }

    // Leaves this block's part of a tile in global memory; of the blocks `first` to `last` that share it, the one that
    // arrives last adds the parts in block order, so that the result does not depend on who that is. `slot(block)`
    // numbers the parts; `arrived` is a word of shared memory. The counter releases and acquires for all threads, which the
    // barriers around it order.
    template <class Args, class Sums, class Slot>
    static __device__ void finish_shared(const Args& args, const Sums& sums, float* buffer, int row, int token, int block,
                                         int first, int last, Slot slot, u32* counter, u32 arrived) {
        const int tokens_left = args.M - token;
        float* part = args.partials + static_cast<i64>(slot(block)) * tile_floats;
        gather(sums, buffer, tokens_left, [&](int t, int r, const float4& sum) {
            *reinterpret_cast<float4*>(part + t * Tile::rows + r) = sum;
        });
        if (threadIdx.x == 0) store_shared(arrived, increment_wrapping(counter, last - first));
        __syncthreads();
        if (load_shared(arrived) != static_cast<u32>(last - first)) return;
        const int valid = (tokens_left < Tile::tokens ? tokens_left : Tile::tokens) * quads;
#pragma unroll 1
        for (int base = threadIdx.x; base < valid; base += batch * Tile::threads) {
            float4 sum[batch] = {};
#pragma unroll 1
            for (int each = first; each <= last; ++each) {
                const float* other = args.partials + static_cast<i64>(slot(each)) * tile_floats;
                float4 next[batch];
#pragma unroll
                for (int j = 0; j < batch; ++j)
                    if (base + j * Tile::threads < valid)
                        next[j] = load_global_l2(reinterpret_cast<const float4*>(other) + base + j * Tile::threads);
#pragma unroll
                for (int j = 0; j < batch; ++j) add(sum[j], next[j]);
            }
#pragma unroll
            for (int j = 0; j < batch; ++j) {
                const int i = base + j * Tile::threads;
                if (i < valid) store(args, token + i / quads, row + i % quads * 4, sum[j]);
            }
        }
    }

    // Leaves this block's part of a tile in `mine`, shared memory; each block of the cluster then adds some quads up, in rank
    // order. No block may write to `mine` again before all others have added.
    template <class Args, class Sums>
    static __device__ void finish_cluster(const Args& args, const Sums& sums, float* buffer, int row, float* mine, int rank) {
        gather(sums, buffer, args.M, [&](int t, int r, const float4& sum) {
            *reinterpret_cast<float4*>(mine + t * Tile::rows + r) = sum;
        });
        cluster_arrive();
        cluster_wait();
        const int all = args.M * quads;
        for (int q = threadIdx.x * Tile::cluster + rank; q < all; q += Tile::threads * Tile::cluster) {
            float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < Tile::cluster; ++r) add(sum, load_cluster(shared_address(mine + 4 * q), r));
            store(args, q / quads, row + q % quads * 4, sum);
        }
    }

    static __device__ void add(float4& sum, const float4& other) {
        sum.x += other.x;
        sum.y += other.y;
        sum.z += other.z;
        sum.w += other.w;
    }

    template <class Args>
    static __device__ void store(const Args& args, int token, int row, float4 v) {
        if (args.bias) {
            const u16* bias = args.bias + row;
            v.x += row + 0 < args.N ? T::to_float(bias[0]) : 0.0f;
            v.y += row + 1 < args.N ? T::to_float(bias[1]) : 0.0f;
            v.z += row + 2 < args.N ? T::to_float(bias[2]) : 0.0f;
            v.w += row + 3 < args.N ? T::to_float(bias[3]) : 0.0f;
        }
        u16* y = args.y + token * args.y_stride + row;
        const u32 low = T::pack(v.x, v.y), high = T::pack(v.z, v.w);
        if (args.y_vector && row + 4 <= args.N) {
            *reinterpret_cast<uint2*>(y) = {low, high};
            return;
        }
        if (row + 0 < args.N) y[0] = static_cast<u16>(low);
        if (row + 1 < args.N) y[1] = static_cast<u16>(low >> 16);
        if (row + 2 < args.N) y[2] = static_cast<u16>(high);
        if (row + 3 < args.N) y[3] = static_cast<u16>(high >> 16);
    }
};
