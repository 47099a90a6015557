// y (M, N) = x (M, K) @ W (K, N) + bias for more rows of x than sm90_stream takes: wgmma (sm_90a).
//
//   producers (one warpgroup, two threads work)          consumers: wgs_k x wgs_n warpgroups
//
//   weights: bulk copies   \    ring of stages    /   stage i belongs to K group i % wgs_k;
//                           >  one slab of K each >   a warpgroup decodes row_blocks x 64 outputs into registers
//   x: tensor copies       /    (128) and its x   \   and multiplies them by the stage's x with wgmma
//
// Decoding is the work that a dense GEMM does not have. It runs on the ALUs while the tensor cores are busy with the
// fragments decoded before: two sets of A registers, one in use by wgmma, one being filled. Weights are multiplied by
// their scale in the activations' type, which rounds each once more: fp32 accumulators could be scaled exactly, but twice
// as many of them do not fit beside 128 tokens. Float16 products are kept in range by a power of two per output, which the
// end of a tile undoes (formats/codec.cuh).
//
// What bounds it: the memory up to some 30 rows, decoding beside it; from 64 rows on the tensor cores, and on large layers
// the power that they may take. A tile is chosen wide in outputs, since its x is read from L2 once per tile of outputs.
//
// The work is a list of segments (tile, K range); see schedule/segments.cuh. A tile of one segment is stored from
// registers. If several blocks share a tile, a cluster adds the parts in the shared memory of its first block, where its
// stages were, blocks elsewhere through global memory; both in a fixed order.
//
// What was tried and what each thing gave: examples/results/laboratory.md.
//
// The preamble defines Config, Activation, Slab, SHARED_BYTES and Args, as for sm80_gemm.
#pragma once
#include "epilogue/exchange.cuh"
#include "epilogue/turned_store.cuh"
#include "layout.cuh"
#include "mainloop/weights.cuh"
#include "mainloop/wgmma_tile.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "schedule/ring.cuh"
#include "schedule/roles.cuh"
#include "schedule/segments.cuh"

struct Tile : Config {
    static constexpr int slabs = Config::wgs_n * Config::row_blocks;  // 64-output blocks
    static constexpr int rows = SLAB_N * slabs;
    static constexpr int pieces = (Config::tokens + 127) / 128;       // wgmma per row block and 16 K
    static constexpr int piece = Config::tokens / pieces;
    static constexpr int consumers = 4 * WARP * Config::wgs_n * Config::wgs_k;
    static constexpr int threads = consumers + (Config::trades_registers ? 4 : 2) * WARP;  // warpgroups alone can trade
    static constexpr int sums = Config::tokens / 2;                   // accumulators per thread and row block
    static constexpr int share_bytes = rows * Config::tokens * 4;     // of the tile as float32
    static_assert(Config::stages % Config::wgs_k == 0, "a K group that runs ahead must not meet another's stages");
    static_assert(Config::stages >= 2 * Config::wgs_k, "a K group gives a stage back when it works on its next");
};

using Decoder = Codec<Activation>;
using Output = TurnedStore<Tile, Activation>;

// Shared memory, by what lies there:
//
//   | x of each stage | slabs of each stage | table | shares of K groups | shares of a cluster | turn | full empty arrived count |
//
// x comes first, since it needs the alignment of its swizzle. A cluster computes one tile, so that its ring is free when its
// blocks exchange shares: large ones go there.
struct Memory {
    static constexpr int LENT_BYTES = 16384;                                // less is not worth waiting for the ring
    static constexpr int cluster_bytes = (Tile::cluster - 1) * Tile::share_bytes;
    static constexpr bool lends_stages = cluster_bytes > LENT_BYTES;

    static constexpr int x_half = Tile::tokens * 128;                       // 64 K
    static constexpr int x_bytes = 2 * x_half;
    static constexpr int weight_bytes = Tile::slabs * Slab::slab_bytes;
    static constexpr int weights_at = Tile::stages * x_bytes;
    static constexpr int table_at = weights_at + Tile::stages * weight_bytes;
    static constexpr int k_shares_at = table_at + Decoder::table_bytes;     // of K groups but the first
    static constexpr int own_at = k_shares_at + (Tile::wgs_k - 1) * Tile::share_bytes;
    static constexpr int cluster_shares_at = lends_stages ? 0 : own_at;     // of blocks but the first
    static constexpr int turn_at = own_at + (lends_stages ? 0 : cluster_bytes);
    static constexpr int full_at = turn_at + Tile::wgs_n * 2 * Output::bytes;
    static constexpr int empty_at = full_at + 8 * Tile::stages;
    static constexpr int arrived_at = empty_at + 8 * Tile::stages;
    static constexpr int count_at = arrived_at + 8;
    static constexpr int bytes = count_at + 8;
    static_assert(bytes == SHARED_BYTES, "the host twin reserves this much");
    static_assert(cluster_bytes <= table_at, "what other blocks leave goes where stages were");

    u32 start;

    __device__ u32 x(int stage) const { return start + stage * x_bytes; }
    __device__ u32 weights(int stage) const { return start + weights_at + stage * weight_bytes; }
    __device__ u32 table() const { return start + table_at; }
    __device__ u32 k_share(int i) const { return start + k_shares_at + i * Tile::share_bytes; }
    __device__ u32 cluster_share(int i) const { return start + cluster_shares_at + i * Tile::share_bytes; }
    __device__ u32 turn(int wg_n) const { return start + turn_at + wg_n * 2 * Output::bytes; }

    // Barriers: a stage has been filled, by weights and by x; each warp that reads it has; what a cluster waits for.
    __device__ u32 full(int stage) const { return start + full_at + 8 * stage; }
    __device__ u32 empty(int stage) const { return start + empty_at + 8 * stage; }
    __device__ u32 arrived() const { return start + arrived_at; }
    __device__ u32 count() const { return start + count_at; }               // how many blocks had arrived before this one
};

// Which outputs and tokens a tile is. Token tiles run fastest, eight of them at a time, so that the blocks of a wave
// share both weights and x in L2.
struct Corner {
    int row_block, token;
    __device__ Corner(const Args& args, int tile) {
        constexpr int band = 8;
        if (args.tiles_m == 1) {
            row_block = tile * Tile::slabs;
            token = 0;
            return;
        }
        const int first = tile / (band * args.tiles_n) * band, within = tile % (band * args.tiles_n);
        const int width = args.tiles_m - first < band ? args.tiles_m - first : band;
        row_block = within / width * Tile::slabs;
        token = (first + within % width) * Tile::tokens;
    }
};

// The tiles of this block one after the other: where each is, and this block's part of its K.
struct Tiles : Segments {
    const Args& args;

    __device__ Tiles(const Args& args) : Segments(args.schedule, static_cast<int>(blockIdx.x) / Tile::cluster), args(args) {}

    __device__ Corner corner() const { return {args, now.tile}; }
    __device__ Segment slabs() const { return now.part(static_cast<int>(cluster_rank()), Tile::cluster); }
};

// ---- load: one thread copies the weights, another x. What it does for a stage is short: ten warps may wait for the next one.

__device__ inline void load_weights(const Args& args, Memory memory) {
    pin(memory.start);
    const u64 policy = args.tiles_m == 1 ? policy_evict_first() : policy_evict_normal();
    Ring<Tile::stages> ring;
    for (Tiles tiles(args); tiles.next();) {
        const int first = tiles.corner().row_block;
        const int count = args.slabs_n - first < Tile::slabs ? args.slabs_n - first : Tile::slabs;
        const Weights<Args> weights{args, args.schedule.steps};
        const i64 pitch = weights.pitch();
        const Segment slabs = tiles.slabs();
        const u8* source = weights.slab(first, slabs.begin);
#pragma unroll 1
        for (int k = slabs.begin; k < slabs.end; ++k, source += Slab::slab_bytes) {
            const u32 full = memory.full(ring.stage), target = memory.weights(ring.stage);
            barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
            barrier_expect(full, count * Slab::slab_bytes);
#pragma unroll
            for (int i = 0; i < Tile::slabs; ++i)
                if (i == 0 || i < count)
                    copy_bulk(target + i * Slab::slab_bytes, source + i * pitch, Slab::slab_bytes, full, policy);
            ring.advance(1);
        }
    }
}

__device__ inline void load_x(const Args& args, Memory memory) {
    pin(memory.start);
    wait_for_previous_kernel();
    Ring<Tile::stages> ring;
    for (Tiles tiles(args); tiles.next();) {
        const int token = tiles.corner().token;
        const Segment slabs = tiles.slabs();
#pragma unroll 1
        for (int k = slabs.begin; k < slabs.end; ++k) {
            const u32 full = memory.full(ring.stage), target = memory.x(ring.stage);
            barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
            barrier_expect(full, Memory::x_bytes);
            copy_box(target, &args.x, k * SLAB_K, token, full);
            copy_box(target + Memory::x_half, &args.x, k * SLAB_K + 64, token, full);
            ring.advance(1);
        }
    }
}

// ---- compute, and at the end of a segment finish

struct Compute {
    const Args& args;
    const Memory memory;
    WgmmaTile<Tile, Memory, Decoder, HalfWgmma<Activation>> work;

    __device__ Compute(const Args& args, Memory memory) : args(args), memory(memory), work(memory) {}

    __device__ void run() {
        Ring<Tile::stages> ring;
        for (Tiles tiles(args); tiles.next();) {
            const Segment slabs = tiles.slabs();
            const Corner corner = tiles.corner();
            work.load_factors(Weights<Args>{args, args.schedule.steps}, corner.row_block);
            work.multiply(ring, slabs.end - slabs.begin);
            finish(tiles, corner);
        }
    }

private:
    __device__ void finish(const Tiles& tiles, const Corner& corner) {
        Exchange<Tile, Memory> exchange{memory, work.me, work.sums};
        wait_for_previous_kernel();
        if (Tile::wgs_k > 1 && !exchange.add_k_groups()) return;
        if (Tile::cluster > 1 && !exchange.add_cluster()) return;
        if (tiles.is_shared() && !exchange.add_blocks(args, tiles)) return;
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r) {
            const float undo[2] = {work.undo(r, 0), work.undo(r, 1)};
            Output::store(args, work.me, memory.turn(work.me.wg_n), work.sums[r], undo,
                          SLAB_N * (corner.row_block + work.me.wg_n * Tile::row_blocks + r), corner.token);
        }
    }
};

extern "C" __global__ void __cluster_dims__(Config::cluster) __launch_bounds__(Tile::threads, 1)
    gemm(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) u8 shared[];
    const Memory memory{shared_address(shared)};
    allow_next_kernel();

    // The first weights are on their way before the other warps have met: the warp that copies them sets the barriers up,
    // and does not wait for anybody.
    const bool copies_weights = threadIdx.x / WARP == Tile::consumers / WARP;
    if (threadIdx.x == Tile::consumers) {
        for (int stage = 0; stage < Tile::stages; ++stage) {
            barrier_init(memory.full(stage), 2);
            barrier_init(memory.empty(stage), 4 * Tile::wgs_n);
        }
        const bool adds = cluster_rank() == 0;
        barrier_init(memory.arrived(), adds ? 1 : 4 * Tile::wgs_n);
        if (Tile::cluster > 1 && adds) barrier_expect(memory.arrived(), Memory::cluster_bytes);
        barrier_init_fence();
    } else if (threadIdx.x == Tile::consumers + WARP) {
        prefetch_map(&args.x);
    }
    __syncwarp();
    if (Tile::cluster > 1) cluster_arrive_relaxed();  // barriers are set up: their fence has released that
    if (copies_weights) {
        barrier_arrive_only(ALL, Tile::threads);
    } else {
        if (threadIdx.x < Tile::consumers) Decoder::fill_table(memory.table(), threadIdx.x, Tile::consumers);
        barrier_sync(ALL, Tile::threads);
    }

    if (warpgroup_index() == Tile::wgs_n * Tile::wgs_k) {
        if constexpr (Config::trades_registers) warpgroup_give_registers<Config::producer_registers>();
        const int role = static_cast<int>(uniform(threadIdx.x / WARP)) - Tile::consumers / WARP;
        if (role == 0 && elect_lane()) load_weights(args, memory);
        if (role == 1 && elect_lane()) load_x(args, memory);
    } else {
        if constexpr (Config::trades_registers) warpgroup_take_registers<Config::consumer_registers>();
        Compute(args, memory).run();
    }
}
