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
// The preamble defines Config, Activation, Scale, GRANULE, SHARED_BYTES and Args, as for sm80_gemm.
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

using Decoder = Codec<Activation, Scale>;
using Packed = Layout<Decoder, GRANULE>;

// A slot: a slab or half a slab, and x, which has memory of its own for the alignment of its swizzle.
struct Place {
    static constexpr int weight_bytes = Tile::halves * Packed::half_bytes;
    static constexpr int x_half = Tile::tokens * 128;  // 64 K
    static constexpr int x_bytes = 2 * x_half;

    static __device__ constexpr int half(int half_row, int) { return half_row * Packed::half_bytes; }
    static __device__ constexpr int token_chunk(int token, int chunk) {
        return chunk / 8 * x_half + token * 128 + 16 * (chunk % 8 ^ token % 8);
    }
};

// Where a warp is on its way through its slabs: a share of K of one tile, then the same of the next tile.
struct Walk {
    int tile, slab, left;

    __device__ void advance(int k_begin, int k_end, int clusters) {
        --left;
        slab += Tile::warps_k;
        if (slab >= k_end) slab = k_begin, tile += clusters;
    }
};

extern "C" __global__ void __cluster_dims__(Config::cluster) __launch_bounds__(Tile::threads, Config::blocks_per_sm)
    gemm(const __grid_constant__ Args args) {
    using Output = Epilogue<Tile, Activation>;
    constexpr int all_slots = Tile::warps_k * Config::slots;
    constexpr int share_bytes = Config::cluster > 1 ? 2 * Tile::tokens * Tile::rows * 4 : 0;
    constexpr int slots_bytes = all_slots * (Place::x_bytes + Place::weight_bytes + 8);
    static_assert(Decoder::table_bytes + slots_bytes + Output::bytes + share_bytes == SHARED_BYTES, "the host twin reserves this much");

    allow_next_kernel();
    extern __shared__ __align__(1024) u8 shared[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 x_ring = shared_address(shared) + warp * Config::slots * Place::x_bytes;
    const u32 table = shared_address(shared) + all_slots * Place::x_bytes;
    u32 ring = table + Decoder::table_bytes + warp * Config::slots * Place::weight_bytes;
    u32 barriers = table + Decoder::table_bytes + all_slots * Place::weight_bytes + warp * Config::slots * 8;
    pin(x_ring);
    pin(ring);
    pin(barriers);
    float* const exchange = reinterpret_cast<float*>(shared + Decoder::table_bytes + slots_bytes);
    float* const shares = exchange + Output::bytes / 4;

    // This warp's slabs: for each tile of this cluster, every warps_k-th slab of this rank's share of K.
    const int rank = static_cast<int>(cluster_rank());
    const int clusters = gridDim.x / Config::cluster, first_tile = blockIdx.x / Config::cluster;
    const int k_begin = args.slabs_k * rank / Config::cluster + warp;
    const int k_end = args.slabs_k * (rank + 1) / Config::cluster;
    const int per_tile = k_begin < k_end ? (k_end - k_begin + Tile::warps_k - 1) / Tile::warps_k : 0;
    const int tiles = args.rounds - (first_tile + (args.rounds - 1) * clusters < args.tiles_n ? 0 : 1);
    const int x_bytes = args.M * SLAB_K * 2;  // tokens beyond M are not copied: a token's products depend on no other
    const u64 policy = policy_evict_first();
    const i64 first = args.stack.number() * (args.tiles_n * Config::halves / 2) * args.slabs_k * Packed::slab_bytes;

    auto copy_weights = [&](int slot, const Walk& at) {
        constexpr int per_slab = 2 / Config::halves;  // tiles
        const u8* source = args.weight + first +
                           (static_cast<i64>(at.tile / per_slab) * args.slabs_k + at.slab) * Packed::slab_bytes +
                           at.tile % per_slab * Packed::half_bytes;
        copy_bulk(ring + slot * Place::weight_bytes, source, Place::weight_bytes, barriers + 8 * slot, policy);
    };
    auto copy_x = [&](int slot, const Walk& at) {
        const u32 x = x_ring + slot * Place::x_bytes;
        copy_box(x, &args.x, at.slab * SLAB_K, 0, barriers + 8 * slot);
        copy_box(x + Place::x_half, &args.x, at.slab * SLAB_K + 64, 0, barriers + 8 * slot);
    };
    auto copy = [&](int slot, const Walk& at) {
        if (at.left > 0 && elect_lane()) {
            barrier_expect(barriers + 8 * slot, Place::weight_bytes + x_bytes);
            copy_weights(slot, at);
            copy_x(slot, at);
        }
    };
    if (lane == 0) {
        prefetch_map(&args.x);
        for (int slot = 0; slot < Config::slots; ++slot) barrier_init(barriers + 8 * slot, 1);
        barrier_init_fence();
    }
    __syncwarp();
    // Weights do not wait for the kernel ahead, x does. Where none is ahead, a slot's x goes right behind its weights:
    // behind those of all slots it would arrive after them. So do most slots where x is as large as the weights.
    Walk next = {first_tile, k_begin, tiles * per_tile};
    const int early = args.dependent ? (Tile::token_tiles == 1 ? Config::slots : 1) : 0;
    if (args.dependent) {
        Walk ahead = next;
#pragma unroll 1
        for (int slot = 0; slot < early; ++slot) {
            if (ahead.left > 0 && elect_lane()) {
                barrier_expect_more(barriers + 8 * slot, Place::weight_bytes);
                copy_weights(slot, ahead);
            }
            ahead.advance(k_begin, k_end, clusters);
        }
        Decoder::fill_table(table, threadIdx.x, Tile::threads);
        wait_for_previous_kernel();
#pragma unroll 1
        for (int slot = 0; slot < early; ++slot) {
            if (next.left > 0 && elect_lane()) {
                barrier_expect(barriers + 8 * slot, x_bytes);
                copy_x(slot, next);
            }
            next.advance(k_begin, k_end, clusters);
        }
    }
#pragma unroll 1
    for (int slot = early; slot < Config::slots; ++slot) {
        copy(slot, next);
        next.advance(k_begin, k_end, clusters);
    }
    if (!args.dependent) Decoder::fill_table(table, threadIdx.x, Tile::threads);
    if (Decoder::table_bytes) __syncthreads();

    WarpTile<Tile, Place, Packed, Decoder, Activation, Scale, GRANULE> work;
    int slot = 0;
    u32 parity = 0;
    for (int t = 0; t < tiles; ++t) {
        work.clear();
        for (int i = 0; i < per_tile; ++i) {
            barrier_wait(barriers + 8 * slot, parity);
            work.step(ring + slot * Place::weight_bytes, x_ring + slot * Place::x_bytes, table, 0, 0, 0, [] {});
            __syncwarp();
            copy(slot, next);
            next.advance(k_begin, k_end, clusters);
            if (++slot == Config::slots) slot = 0, parity ^= 1;
        }

        work.undo_factors();
        const int row = (first_tile + t * clusters) * Tile::rows;
        if (Config::cluster == 1) {
            Output::gather(work.sums, exchange, args.M,
                           [&](int token, int r, const float4& sum) { Output::store(args, token, row + r, sum); });
            continue;
        }
        float* const mine = shares + t % 2 * Tile::tokens * Tile::rows;
        Output::gather(work.sums, exchange, args.M, [&](int token, int r, const float4& sum) {
            *reinterpret_cast<float4*>(mine + token * Tile::rows + r) = sum;
        });
        cluster_arrive();
        cluster_wait();
        const int quads = args.M * Output::quads;
        for (int q = threadIdx.x * Config::cluster + rank; q < quads; q += Tile::threads * Config::cluster) {
            float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < Config::cluster; ++r) Output::add(sum, load_cluster(shared_address(mine + 4 * q), r));
            Output::store(args, q / Output::quads, row + q % Output::quads * 4, sum);
        }
    }
    if (Config::cluster > 1) {  // no block leaves while another reads its shared memory
        cluster_arrive_relaxed();
        cluster_wait();
    }
}
