// y (M, N) = x (M, K) @ W (K, N) + bias for up to 16 rows of x: every warp streams weights on its own (sm_90).
//
//   K ->                                               a column: one slab, 64 outputs x 128 K, contiguous
//   | 0 1 2 3 4 5 6 7 | 0 1 ...       | rank 1 ...     the number: the warp of the block that takes it, into a ring of
//   |<--- a round --->|               |                its own, by one bulk copy and the x of that slab beside it
//   |<------ cluster rank 0 --------->|
//
// A warp waits for nothing but its own copies: no barrier of the block, no work of other warps. It decodes a slab,
// multiplies it, and refills the slot. Nobody else needs these weights or this x, so nothing is shared until a segment
// (schedule/segments.cuh) of a tile of 64 outputs ends. Then the warps add up through shared memory; if the tile is
// shared, the blocks of a cluster through the shared memory of its first, other blocks through global memory, all in a
// fixed order. Copies for the next segment are under way meanwhile.
//
// In a dependent launch the first weights are copied while the kernel ahead still runs; x and y wait for its end. The
// next kernel may start at once, for the same reason.
//
// Against sm80_gemm this changes several things at once: bulk copies that leave L2 first, rings without a block barrier
// (24 slabs an SM, 100 KB of int4), sums exchanged in the cluster. What each is worth was not measured apart.
//
// The preamble defines Config, Activation, Scale, GRANULE and SHARED_BYTES, as for sm80_gemm.
#pragma once
#include "epilogue/store.cuh"
#include "mainloop/warp_tile.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/warpgroup.cuh"
#include "schedule/segments.cuh"

struct Args {
    const u8* weight;
    const u16* x;
    const u16* bias;  // or null
    u16* y;
    float* partials;  // two tiles per block where blocks share tiles
    u32* counters;    // one per shared tile, 0 before and after
    i64 x_stride;     // elements between tokens
    i64 y_stride;
    int M, N, K;
    int x_vector;     // token rows start at multiples of 16 bytes
    int y_vector;     // of 8 bytes
    Schedule schedule;
};

struct Tile : Config {
    static constexpr int row_atoms = SLAB_N / 16;
    static constexpr int k_atoms = SLAB_K / 16;
    static constexpr int warps_n = 1, warps_m = 1;
    static constexpr int threads = WARP * Config::warps_k;
    static constexpr int rows = SLAB_N;
    static constexpr int tokens = 8 * Config::token_tiles;
    static constexpr int k = SLAB_K;
};

__device__ inline Segments segments_of(const Args& args) {
    return {args.schedule, static_cast<int>(blockIdx.x) / Config::cluster};
}

// The slabs of a warp: every warps_k-th of the block's, counted on from one segment to the next.
struct Walk {
    Segments segments;
    Segment now{};
    int slab = 0;
    bool left = true;

    __device__ Walk(const Args& args, int warp) : segments(segments_of(args)) { skip(warp); }

    __device__ void skip(int slabs) {
        slab += slabs;
        while (left && slab >= now.end) {
            const int over = slab - now.end;
            left = segments.next();
            now = segments.now.part(static_cast<int>(cluster_rank()), Config::cluster);
            slab = now.begin + over;
        }
    }
};

// The x of one slab, by one warp: half a warp copies a token.
template <class Place>
__device__ inline void copy_tokens(const Args& args, u32 stage, int slab) {
    const int within = threadIdx.x % 16, first = threadIdx.x % WARP / 16;
    const int k = slab * SLAB_K + 8 * within;
    if (args.x_vector && (slab + 1) * SLAB_K <= args.K) {
#pragma unroll
        for (int token = first; token < Tile::tokens; token += 2)
            if (token < args.M) copy_async(stage + Place::token_chunk(token, within), args.x + token * args.x_stride + k, 16);
        return;
    }
#pragma unroll 1
    for (int token = first; token < args.M; token += 2) {
        const u16* row = args.x + token * args.x_stride;
        Vec4 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 low = k + 2 * i < args.K ? row[k + 2 * i] : 0, high = k + 2 * i + 1 < args.K ? row[k + 2 * i + 1] : 0;
            v.word[i] = low | high << 16;
        }
        store_shared_vec4(stage + Place::token_chunk(token, within), v);
    }
}

extern "C" __global__ void __cluster_dims__(Config::cluster) __launch_bounds__(Tile::threads, Config::blocks_per_sm)
    gemm(const __grid_constant__ Args args) {
    using Decoder = Codec<Activation, Scale>;
    using Packed = Layout<Decoder, GRANULE>;
    using Output = Epilogue<Tile, Activation>;
    using Place = Stage<Tile, Packed>;
    constexpr int ring_bytes = Tile::warps_k * Config::slots * Place::bytes;
    constexpr int barrier_bytes = (Tile::warps_k * Config::slots + 2) * 8;
    constexpr int share_bytes = (Config::cluster - 1) * Tile::tokens * Tile::rows * 4;
    static_assert(Decoder::table_bytes + ring_bytes + barrier_bytes + Output::bytes + share_bytes == SHARED_BYTES,
                  "the host twin reserves this much");

    allow_next_kernel();
    extern __shared__ __align__(128) u8 shared[];
    const u32 table = shared_address(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 ring = table + Decoder::table_bytes + warp * Config::slots * Place::bytes;
    const u32 barriers = table + Decoder::table_bytes + ring_bytes + warp * Config::slots * 8;
    const u32 arrived = table + Decoder::table_bytes + ring_bytes + Tile::warps_k * Config::slots * 8;
    u8* const after = shared + Decoder::table_bytes + ring_bytes + barrier_bytes;
    float* const exchange = reinterpret_cast<float*>(after);
    const u32 shares = shared_address(after + Output::bytes);

    const u64 policy = policy_evict_first();
    auto copy_weights = [&](int slot, const Walk& at) {
        if (at.left && elect_lane()) {
            const i64 slab = static_cast<i64>(at.now.tile) * args.schedule.steps + at.slab;
            barrier_expect(barriers + 8 * slot, Packed::slab_bytes);
            copy_bulk(ring + slot * Place::bytes, args.weight + slab * Packed::slab_bytes, Packed::slab_bytes,
                      barriers + 8 * slot, policy);
        }
    };
    auto copy_x = [&](int slot, const Walk& at) {
        if (at.left) copy_tokens<Place>(args, ring + slot * Place::bytes, at.slab);
        copy_commit();  // a group for each slot, also an empty one: copy_wait counts groups
    };
    if (lane == 0) {
        for (int slot = 0; slot < Config::slots; ++slot) barrier_init(barriers + 8 * slot, 1);
        if (Config::cluster > 1 && warp == 0) {
            barrier_init(arrived, 1);
            barrier_expect(arrived, (Config::cluster - 1) * args.M * Tile::rows * 4);
        }
        barrier_init_fence();
    }
    __syncwarp();
    Walk next(args, warp);
    Walk ahead = next;
    for (int slot = 0; slot < Config::slots; ++slot) {
        copy_weights(slot, ahead);
        ahead.skip(Tile::warps_k);
    }
    if (Config::cluster > 1) cluster_arrive();
    Decoder::fill_table(table, threadIdx.x, Tile::threads);
    if (Decoder::table_bytes) __syncthreads();

    wait_for_previous_kernel();
    for (int slot = 0; slot < Config::slots; ++slot) {
        copy_x(slot, next);
        next.skip(Tile::warps_k);
    }

    WarpTile<Tile, Packed, Decoder, Activation, Scale, GRANULE> work;
    int slot = 0, first = warp;  // of the slabs of a segment, this warp's first
    u32 parity = 0;
    for (Segments all = segments_of(args); all.next();) {
        const Segment mine = all.now.part(static_cast<int>(cluster_rank()), Config::cluster);
        work.clear();
        int k = mine.begin + first;
        for (; k < mine.end; k += Tile::warps_k) {
            copy_wait<Config::slots - 1>();
            __syncwarp();
            barrier_wait(barriers + 8 * slot, parity);
            const u32 stage = ring + slot * Place::bytes;
            work.step(stage, table, 0, 0, 0, [] {});
            __syncwarp();
            copy_weights(slot, next);
            copy_x(slot, next);
            next.skip(Tile::warps_k);
            if (++slot == Config::slots) slot = 0, parity ^= 1;
        }
        first = k - mine.end;

        const int row = all.now.tile * Tile::rows;
        if (Config::cluster > 1) {  // one tile: all blocks but the first send their sums to it
            const int rank = static_cast<int>(cluster_rank());
            if (rank > 0)
                cluster_wait();  // the first block has started
            else
                barrier_wait(arrived, 0);
            const u32 remote = cluster_address(shares + (rank - 1) * Tile::tokens * Tile::rows * 4, 0);
            const u32 remote_arrived = cluster_address(arrived, 0);
            Output::gather(work.sums, exchange, args.M, [&](int token, int r, const float4& sum) {
                const u32 offset = (token * Tile::rows + r) * 4;
                if (rank > 0) {
                    store_cluster_async(remote + offset, sum, remote_arrived);
                    return;
                }
                float4 total = sum;
#pragma unroll
                for (int other = 0; other < Config::cluster - 1; ++other) {
                    const Vec4 v = load_shared_vec4(shares + other * Tile::tokens * Tile::rows * 4 + offset);
                    Output::add(total, {__uint_as_float(v.word[0]), __uint_as_float(v.word[1]),
                                        __uint_as_float(v.word[2]), __uint_as_float(v.word[3])});
                }
                Output::store(args, token, row + r, total);
            });
        } else if (all.is_shared()) {
            Output::finish_shared(
                args, work.sums, exchange, row, 0, all.block, all.first_block(), all.last_block(),
                [&](int block) { return all.slot(block); }, args.counters + all.shared_tile());
        } else {
            Output::finish(args, work.sums, exchange, row, 0);
        }
    }
}
