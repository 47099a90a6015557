// y (M, N) = x (M, K) @ W (K, N) + bias for packed W: mma.sync and cp.async, sm_80 and up.
//
//            K ->                                  The generated preamble defines
//          +-------------------+                     Config       the tile, see marlin_cupy/kernels/sm80_gemm.py
//   N  W   | slab | slab | ... |  one block:         Activation   Float16 or BFloat16: x, bias and y
//   |      +-------------------+  rows x tokens      Slab         where codes and parameters lie
//   v             x                                  SHARED_BYTES
//          +---------+   y is written as             Args         what it is launched with
//   K  x^T | tokens  |   tokens x rows             and includes formats/<format>.cuh for Codec.
//          +---------+
//
// A block walks its stripe (schedule/stripes.cuh): load stages ahead (mainloop/pipeline.cuh), multiply
// (mainloop/warp_tile.cuh), and at the end of a tile, or of the stripe, reduce and store (epilogue/store.cuh).
// One barrier per step: it ends both the wait for this stage and the reading of the stage that is refilled next.
#pragma once
#include "epilogue/store.cuh"
#include "mainloop/pipeline.cuh"
#include "mainloop/warp_tile.cuh"
#include "schedule/stripes.cuh"

struct Tile : Config {
    static constexpr int threads = WARP * Config::warps_n * Config::warps_m * Config::warps_k;
    static constexpr int rows = 16 * Config::row_atoms * Config::warps_n;
    static constexpr int tokens = 8 * Config::token_tiles * Config::warps_m;
    static constexpr int k = 16 * Config::k_atoms * Config::warps_k;
    static constexpr bool sums_of_x = false;
};

extern "C" __global__ void __launch_bounds__(Tile::threads, Config::blocks_per_sm) gemm(const __grid_constant__ Args args) {
    using Decoder = Codec<Activation>;
    using Ring = Stage<Tile>;
    using Output = Epilogue<Tile, Activation>;
    constexpr int ring_bytes = Tile::stages * Ring::bytes;
    static_assert(Decoder::table_bytes + ring_bytes + Output::bytes == SHARED_BYTES, "the host twin reserves this much");

    extern __shared__ __align__(128) u8 shared[];
    const u32 table = shared_address(shared);
    const u32 ring = table + Decoder::table_bytes;
    float* const exchange = reinterpret_cast<float*>(shared + Decoder::table_bytes + ring_bytes);

    __shared__ u32 arrived;
    const int steps = (args.slabs_k + Ring::slabs - 1) / Ring::slabs;
    const Stripes stripes{steps, static_cast<int>(gridDim.x), static_cast<i64>(args.tiles) * steps};
    const i64 begin = stripes.begin(blockIdx.x);
    int left = static_cast<int>(stripes.begin(blockIdx.x + 1) - begin);

    Feed<Tile, Args> feed(args, steps, begin, left);
#pragma unroll
    for (int stage = 0; stage < Tile::stages - 1; ++stage) feed.next(ring + stage * Ring::bytes);
    Decoder::fill_table(table, threadIdx.x, Tile::threads);

    const int warp = threadIdx.x / WARP;
    const int row_atom = warp % Tile::warps_n * Tile::row_atoms;
    const int token = warp / Tile::warps_n % Tile::warps_m * 8 * Tile::token_tiles;
    const int k_atom = warp / (Tile::warps_n * Tile::warps_m) * Tile::k_atoms;
    WarpTile<Tile, Ring, Decoder, HalfMma<Activation>> work;
    work.clear();

    int tile = static_cast<int>(begin / steps), step = static_cast<int>(begin % steps);
    const auto load_factors = [&](int tile) {
        const float* const factors = args.factors + args.stack.number() * args.slabs_n * SLAB_N;
        work.load_factors(factors, tile / args.tiles_m * Tile::rows + 16 * row_atom, args.slabs_n * SLAB_N);
    };
    load_factors(tile);
    u32 now = ring, refill = ring + ring_bytes - Ring::bytes;
    for (; left > 0; --left) {
        copy_wait<Tile::stages - 2>();
        __syncthreads();
        work.step(now, now, table, row_atom, token, k_atom, [&] { feed.next(refill); });
        refill = now;
        now = now + Ring::bytes == ring + ring_bytes ? ring : now + Ring::bytes;

        if (++step == steps || left == 1) {
            work.undo_factors();
            const int first = stripes.first_block(tile), last = stripes.last_block(tile);
            const int row = tile / args.tiles_m * Tile::rows, token_in_y = tile % args.tiles_m * Tile::tokens;
            if (first == last)
                Output::finish(args, work.sums, exchange, row, token_in_y);
            else
                Output::finish_shared(
                    args, work.sums, exchange, row, token_in_y, static_cast<int>(blockIdx.x), first, last,
                    [&](int block) { return stripes.slot(block, tile); }, args.counters + tile,
                    shared_address(&arrived));
            work.clear();
            step = 0;
            load_factors(++tile);
        }
    }
}
