// y (M, N) = x (M, K) @ W (K, N) + bias for up to 16 rows of x: every warp streams weights on its own (sm_90).
//
//   K ->                                               a column: one slab, 64 outputs x 128 K, contiguous, or half
//   | 0 1 2 3 4 5 6 7 | 0 1 ...       | rank 1 ...     the number: the warp of the block that takes it, into a ring of
//   |<--- a round --->|               |                its own, by one bulk copy, and its x by two tensor copies
//   |<------ cluster rank 0 --------->|
//
// What bounds it: each weight is read once, 4.125 bits at group size 128, and takes M fused multiply-adds. With 16 rows or
// less the tensor cores have several times the rate that this needs; the time is that of the memory, if enough bytes are
// asked for all the time, if decoding keeps up, and if little happens before the first copy and after the last.
//
// Decoding is most of the instructions. So 4-bit codes go to the tensor cores as they are masked out of a word, and what is
// wrong with them is put right once per granule, in fp32, where the scale is applied too (formats/nibble.cuh).
//
// A warp waits for nothing but its own copies: no barrier of the block, no work of other warps. It decodes a slab,
// multiplies it, and one lane refills the slot; 70 to 100 KB of weights are under way on an SM. Weights are read once and
// leave L2 first. Nobody else needs these weights or this x, so nothing is shared until a tile ends. Then the warps add up
// through shared memory, and the blocks of a cluster, each with a share of K, through each other's shared memory, both in
// a fixed order. Copies for the next tile are under way meanwhile. A tile is 64 outputs, or 32 where that keeps more SMs
// busy.
//
// The kernel ahead in the stream may still run when this one starts (ptx/dependent_launch.cuh). It does not write weights,
// the host sees to that, so the rings' first slabs are under way before the wait; x, bias and y are touched after it.
//
// What was tried and what each thing gave: examples/results/laboratory.md.
//
// The preamble defines Config, Activation, Slab, SHARED_BYTES and Args, as for sm80_gemm.
#pragma once
#include "epilogue/store.cuh"
#include "mainloop/warp_tile.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"

struct Tile : Config {
    static constexpr int rows = HALF_N * Config::halves;
    static constexpr int row_atoms = rows / 16;
    static constexpr int k_atoms = SLAB_K / 16;
    static constexpr int warps_n = 1, warps_m = 1;
    static constexpr int threads = WARP * Config::warps_k;
    static constexpr int tokens = 8 * Config::token_tiles;
    static constexpr bool scale_weights = false, sums_of_x = true;
};

using Decoder = Codec<Activation>;
using Output = Epilogue<Tile, Activation>;

// A slot: a slab or half a slab, and x, which has memory of its own for the alignment of its swizzle.
struct Place {
    static constexpr int weight_bytes = Tile::halves * Slab::half_bytes;
    static constexpr int x_half = Tile::tokens * 128;  // 64 K
    static constexpr int x_bytes = 2 * x_half;

    static __device__ constexpr int half(int half_row, int) { return half_row * Slab::half_bytes; }
    static __device__ constexpr int token_chunk(int token, int chunk) {
        return chunk / 8 * x_half + token * 128 + 16 * (chunk % 8 ^ token % 8);
    }
};

// Shared memory, by what lies there:
//
//   | x of all slots | table | weights of all slots | their barriers | exchange of the warps | shares for the cluster, twice |
struct Memory {
    static constexpr int slots = Tile::warps_k * Config::slots;
    static constexpr int table_at = slots * Place::x_bytes;
    static constexpr int weights_at = table_at + Decoder::table_bytes;
    static constexpr int barriers_at = weights_at + slots * Place::weight_bytes;
    static constexpr int exchange_at = barriers_at + 8 * slots;
    static constexpr int shares_at = exchange_at + Output::bytes;
    static constexpr int share_floats = Tile::tokens * Tile::rows;
    static constexpr int bytes = shares_at + (Config::cluster > 1 ? 2 * share_floats * 4 : 0);
    static_assert(bytes == SHARED_BYTES, "the host twin reserves this much");
};

// The slots of a warp, by address.
struct Slots {
    u32 first_x, first_weights, first_barrier;

    __device__ Slots(u32 shared, int warp)
        : first_x(shared + warp * Config::slots * Place::x_bytes),
          first_weights(shared + Memory::weights_at + warp * Config::slots * Place::weight_bytes),
          first_barrier(shared + Memory::barriers_at + warp * Config::slots * 8) {
        pin(first_x);
        pin(first_weights);
        pin(first_barrier);
    }
    __device__ u32 x(int slot) const { return first_x + slot * Place::x_bytes; }
    __device__ u32 weights(int slot) const { return first_weights + slot * Place::weight_bytes; }
    __device__ u32 barrier(int slot) const { return first_barrier + 8 * slot; }
};

// What a warp computes: of each tile of its cluster, every warps_k-th slab of this rank's share of K.
struct Share {
    const int rank, clusters, first_tile;
    const int k_begin, k_end, per_tile;  // slabs
    const int tiles;

    __device__ Share(const Args& args, int warp)
        : rank(static_cast<int>(cluster_rank())), clusters(gridDim.x / Config::cluster), first_tile(blockIdx.x / Config::cluster),
          k_begin(args.slabs_k * rank / Config::cluster + warp), k_end(args.slabs_k * (rank + 1) / Config::cluster),
          per_tile(k_begin < k_end ? (k_end - k_begin + Tile::warps_k - 1) / Tile::warps_k : 0),
          tiles(args.rounds - (first_tile + (args.rounds - 1) * clusters < args.tiles_n ? 0 : 1)) {}
};

// Where a warp's copies are on the way through its share.
struct Walk {
    int tile, slab, left;

    __device__ explicit Walk(const Share& share)
        : tile(share.first_tile), slab(share.k_begin), left(share.tiles * share.per_tile) {}

    __device__ void advance(const Share& share) {
        --left;
        slab += Tile::warps_k;
        if (slab >= share.k_end) slab = share.k_begin, tile += share.clusters;
    }
};

// Fills slots: one lane issues the copies.
struct Copies {
    const Args& args;
    const Slots& slots;
    const int x_bytes;  // tokens beyond M are not copied: a token's products depend on no other
    const u64 policy;
    const i64 first;    // of a stack, where the weight begins

    __device__ Copies(const Args& args, const Slots& slots)
        : args(args), slots(slots), x_bytes(args.M * SLAB_K * 2), policy(policy_evict_first()),
          first(args.stack.number() * (args.tiles_n * Config::halves / 2) * args.slabs_k * Slab::slab_bytes) {}

    __device__ void weights(int slot, const Walk& at) const {
        constexpr int per_slab = 2 / Config::halves;  // tiles
        const u8* source = args.weight + first +
                           (static_cast<i64>(at.tile / per_slab) * args.slabs_k + at.slab) * Slab::slab_bytes +
                           at.tile % per_slab * Slab::half_bytes;
        copy_bulk(slots.weights(slot), source, Place::weight_bytes, slots.barrier(slot), policy);
    }
    __device__ void x(int slot, const Walk& at) const {
        copy_box(slots.x(slot), &args.x, at.slab * SLAB_K, 0, slots.barrier(slot));
        copy_box(slots.x(slot) + Place::x_half, &args.x, at.slab * SLAB_K + 64, 0, slots.barrier(slot));
    }
    __device__ void both(int slot, const Walk& at) const {
        if (at.left > 0 && elect_lane()) {
            barrier_expect(slots.barrier(slot), Place::weight_bytes + x_bytes);
            weights(slot, at);
            x(slot, at);
        }
    }
};

extern "C" __global__ void __cluster_dims__(Config::cluster) __launch_bounds__(Tile::threads, Config::blocks_per_sm)
    gemm(const __grid_constant__ Args args) {
    allow_next_kernel();
    extern __shared__ __align__(1024) u8 shared[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 table = shared_address(shared) + Memory::table_at;
    const Slots slots(shared_address(shared), warp);
    float* const exchange = reinterpret_cast<float*>(shared + Memory::exchange_at);
    float* const shares = reinterpret_cast<float*>(shared + Memory::shares_at);
    const Share share(args, warp);
    const Copies copy(args, slots);

    // ---- load: the first slabs
    if (lane == 0) {
        prefetch_map(&args.x);
        for (int slot = 0; slot < Config::slots; ++slot) barrier_init(slots.barrier(slot), 1);
        barrier_init_fence();
    }
    __syncwarp();
    // Weights do not wait for the kernel ahead, x does. Where none is ahead, a slot's x goes right behind its weights:
    // behind those of all slots it would arrive after them. So do most slots where x is as large as the weights.
    Walk next(share);
    const int early = args.dependent ? (Tile::token_tiles == 1 ? Config::slots : 1) : 0;
    if (args.dependent) {
        Walk ahead = next;
#pragma unroll 1
        for (int slot = 0; slot < early; ++slot) {
            if (ahead.left > 0 && elect_lane()) {
                barrier_expect_more(slots.barrier(slot), Place::weight_bytes);
                copy.weights(slot, ahead);
            }
            ahead.advance(share);
        }
        Decoder::fill_table(table, threadIdx.x, Tile::threads);
        wait_for_previous_kernel();
#pragma unroll 1
        for (int slot = 0; slot < early; ++slot) {
            if (next.left > 0 && elect_lane()) {
                barrier_expect(slots.barrier(slot), copy.x_bytes);
                copy.x(slot, next);
            }
            next.advance(share);
        }
    }
#pragma unroll 1
    for (int slot = early; slot < Config::slots; ++slot) {
        copy.both(slot, next);
        next.advance(share);
    }
    if (!args.dependent) Decoder::fill_table(table, threadIdx.x, Tile::threads);
    if (Decoder::table_bytes) __syncthreads();

    WarpTile<Tile, Place, Decoder, HalfMma<Activation>> work;
    int slot = 0;
    u32 parity = 0;
    for (int t = 0; t < share.tiles; ++t) {
        const int row = (share.first_tile + t * share.clusters) * Tile::rows;
        // ---- compute: a slab, and its slot is refilled
        work.clear();
        if constexpr (!Slab::has_scale) {
            const int rows = args.tiles_n * Tile::rows;
            work.load_factors(args.output_scales + args.stack.number() * rows, row, rows);
        }
        for (int i = 0; i < share.per_tile; ++i) {
            barrier_wait(slots.barrier(slot), parity);
            work.step(slots.weights(slot), slots.x(slot), table, 0, 0, 0, [] {});
            // Loads of the slot have ended in all lanes where their products are in the sums: it may be overwritten then. A load
            // that has only been issued may still read what the copy writes. tests/test_machine_order.py reads the machine code.
            work.pin_sums();
            __syncwarp();
            copy.both(slot, next);
            next.advance(share);
            if (++slot == Config::slots) slot = 0, parity ^= 1;
        }

        // ---- finish: the warps' sums, and those of the cluster
        work.undo_factors();
        if (Config::cluster == 1)
            Output::finish(args, work.sums, exchange, row, 0);
        else  // a block may still read the share of the tile before
            Output::finish_cluster(args, work.sums, exchange, row, shares + t % 2 * Memory::share_floats, share.rank);
    }
    if (Config::cluster > 1) {  // no block leaves while another reads its shared memory
        cluster_arrive_relaxed();
        cluster_wait();
    }
}
