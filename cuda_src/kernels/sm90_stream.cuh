// y (M, N) = x (M, K) @ W (K, N) + bias for up to 16 rows of x: every warp streams weights on its own (sm_90).
//
//   K ->                                               a column: one slab, 64 outputs x 128 K, contiguous, or half
//   | 0 1 2 3 4 5 6 7 | 0 1 ...       | rank 1 ...     the number: the warp of the block that takes it, into a ring of
//   |<--- a round --->|               |                its own, by one bulk copy and the x of that slab beside it
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
// multiplies it, and refills the slot; about 100 KB of weights are under way on an SM (24 slabs). Weights are read once and
// leave L2 first. Nobody else needs these weights or this x, so nothing is shared until a tile of 64 outputs ends. Then the
// warps add up through shared memory, and the blocks of a cluster, each with a share of K, through each other's shared
// memory, both in a fixed order. Copies for the next tile are under way meanwhile.
//
// The kernel ahead in the stream may still run when this one starts (ptx/dependent_launch.cuh). It does not write weights,
// the host sees to that, so the rings' first slabs are under way before the wait; x, bias and y are touched after it.
//
// What was tried and what each thing gave: examples/results/laboratory.md.
//
// The preamble defines Config, Activation, Scale, GRANULE and SHARED_BYTES, as for sm80_gemm.
#pragma once
#include "epilogue/store.cuh"
#include "mainloop/warp_tile.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/warpgroup.cuh"

struct Args {
    const u8* weight;
    const u16* x;
    const u16* bias;  // or null
    u16* y;
    i64 x_stride;     // elements between tokens
    i64 y_stride;
    int M, N, K;
    int tiles_n, slabs_k;
    int rounds;       // tiles of the busiest cluster
    int x_vector;     // token rows start at multiples of 16 bytes
    int y_vector;     // of 8 bytes
    int dependent;    // a kernel ahead may still run
};

struct Tile : Config {
    static constexpr int rows = HALF_N * Config::halves;
    static constexpr int row_atoms = rows / 16;
    static constexpr int k_atoms = SLAB_K / 16;
    static constexpr int warps_n = 1, warps_m = 1;
    static constexpr int threads = WARP * Config::warps_k;
    static constexpr int tokens = 8 * Config::token_tiles;
    static constexpr int k = SLAB_K;
    static constexpr bool scale_weights = false, sums_of_x = true;
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

// The x of a slab, by one warp: half a warp copies a token, a lane 8 K of every other one.
template <class Place>
struct TokenCopies {
    static constexpr int passes = Tile::tokens / 2;
    const Args& args;
    const int first = threadIdx.x % WARP / 16, within = threadIdx.x % 16;
    const int mine = (args.M - first + 1) / 2;                          // tokens of this lane
    const u16* const source = args.x + first * args.x_stride + 8 * within;
    const i64 step = 2 * args.x_stride;
    u32 place[passes];

    __device__ TokenCopies(const Args& args) : args(args) {
#pragma unroll
        for (int i = 0; i < passes; ++i) {
            place[i] = Place::token_chunk(first + 2 * i, within);
            pin(place[i]);
        }
    }

    __device__ void copy(u32 stage, int slab) const {
        const u16* const from = source + slab * SLAB_K;
        if (args.x_vector && (slab + 1) * SLAB_K <= args.K) {
#pragma unroll
            for (int i = 0; i < passes; ++i)
                if (i < mine) copy_async(stage + place[i], from + i * step, 16);
            return;
        }
        const int left = args.K - slab * SLAB_K - 8 * within;
#pragma unroll 1
        for (int i = 0; i < mine; ++i) {
            const u16* const row = from + i * step;
            Vec4 v;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 low = 2 * j < left ? row[2 * j] : 0, high = 2 * j + 1 < left ? row[2 * j + 1] : 0;
                v.word[j] = low | high << 16;
            }
            store_shared_vec4(stage + Place::token_chunk(first + 2 * i, within), v);
        }
    }
};

extern "C" __global__ void __cluster_dims__(Config::cluster) __launch_bounds__(Tile::threads, Config::blocks_per_sm)
    gemm(const __grid_constant__ Args args) {
    using Decoder = Codec<Activation, Scale>;
    using Packed = Layout<Decoder, GRANULE>;
    using Output = Epilogue<Tile, Activation>;
    using Place = Stage<Tile, Packed>;
    constexpr int ring_bytes = Tile::warps_k * Config::slots * Place::bytes;
    constexpr int barrier_bytes = Tile::warps_k * Config::slots * 8;
    constexpr int share_bytes = Config::cluster > 1 ? 2 * Tile::tokens * Tile::rows * 4 : 0;
    constexpr int bytes = Decoder::table_bytes + ring_bytes + barrier_bytes + Output::bytes + share_bytes;
    static_assert(bytes == SHARED_BYTES, "the host twin reserves this much");

    allow_next_kernel();
    extern __shared__ __align__(128) u8 shared[];
    const u32 table = shared_address(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 ring = table + Decoder::table_bytes + warp * Config::slots * Place::bytes;
    u32 barriers = table + Decoder::table_bytes + ring_bytes + warp * Config::slots * 8;
    pin(ring);
    pin(barriers);
    u8* const after = shared + Decoder::table_bytes + ring_bytes + barrier_bytes;
    float* const exchange = reinterpret_cast<float*>(after);
    float* const shares = reinterpret_cast<float*>(after + Output::bytes);

    // This warp's slabs: for each tile of this cluster, every warps_k-th slab of this rank's share of K.
    const int rank = static_cast<int>(cluster_rank());
    const int clusters = gridDim.x / Config::cluster, first_tile = blockIdx.x / Config::cluster;
    const int k_begin = args.slabs_k * rank / Config::cluster + warp;
    const int k_end = args.slabs_k * (rank + 1) / Config::cluster;
    const int per_tile = k_begin < k_end ? (k_end - k_begin + Tile::warps_k - 1) / Tile::warps_k : 0;
    const int tiles = args.rounds - (first_tile + (args.rounds - 1) * clusters < args.tiles_n ? 0 : 1);
    const u64 policy = policy_evict_first();

    auto copy_weights = [&](int slot, const Walk& at) {
        constexpr int per_slab = 2 / Config::halves;  // tiles
        const u8* source = args.weight + (static_cast<i64>(at.tile / per_slab) * args.slabs_k + at.slab) * Packed::slab_bytes +
                           at.tile % per_slab * Packed::half_bytes;
        if (at.left > 0 && elect_lane()) {
            barrier_expect(barriers + 8 * slot, Place::weight_bytes);
            copy_bulk(ring + slot * Place::bytes, source, Place::weight_bytes, barriers + 8 * slot, policy);
        }
    };
    const TokenCopies<Place> tokens(args);
    auto copy_x = [&](int slot, const Walk& at) {
        if (at.left > 0) tokens.copy(ring + slot * Place::bytes, at.slab);
        copy_commit();  // a group for each slot, also an empty one: copy_wait counts groups
    };
    if (lane == 0) {
        for (int slot = 0; slot < Config::slots; ++slot) barrier_init(barriers + 8 * slot, 1);
        barrier_init_fence();
    }
    __syncwarp();
    // Weights do not wait for the kernel ahead, x does. Where none is ahead, a slot's x goes right behind its weights:
    // behind those of all slots it would arrive after them. So do most slots where x is as large as the weights.
    Walk next = {first_tile, k_begin, tiles * per_tile};
    const int early = args.dependent ? (Tile::token_tiles == 1 ? Config::slots : 1) : 0;
    Walk ahead = next;
#pragma unroll 1
    for (int slot = 0; slot < early; ++slot) {
        copy_weights(slot, ahead);
        ahead.advance(k_begin, k_end, clusters);
    }
    if (args.dependent) Decoder::fill_table(table, threadIdx.x, Tile::threads);
    wait_for_previous_kernel();
#pragma unroll 1
    for (int slot = 0; slot < Config::slots; ++slot) {
        if (slot >= early) copy_weights(slot, next);
        copy_x(slot, next);
        next.advance(k_begin, k_end, clusters);
    }
    if (!args.dependent) Decoder::fill_table(table, threadIdx.x, Tile::threads);
    if (Decoder::table_bytes) __syncthreads();

    WarpTile<Tile, Packed, Decoder, Activation, Scale, GRANULE> work;
    int slot = 0;
    u32 parity = 0;
    for (int t = 0; t < tiles; ++t) {
        work.clear();
        for (int i = 0; i < per_tile; ++i) {
            copy_wait<Config::slots - 1>();
            __syncwarp();
            barrier_wait(barriers + 8 * slot, parity);
            const u32 stage = ring + slot * Place::bytes;
            work.step(stage, table, 0, 0, 0, [] {});
            __syncwarp();
            copy_weights(slot, next);
            copy_x(slot, next);
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
        cluster_arrive();
        cluster_wait();
    }
}
