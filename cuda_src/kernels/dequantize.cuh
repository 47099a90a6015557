// W^T of a run of slabs along K as a dense array: every weight times its scale in float32, rounded once. sm_80 and up.
//
//            K ->    first_slab                     The generated preamble defines
//          +------+------+------+------+              Config       threads of a block
//   N  W   | slab | slab | slab | slab |              Activation   Float16 or BFloat16: what is written
//   |      +------+======+======+------+              Slab         where codes and parameters lie
//   v             |     slabs   |                     SHARED_BYTES
//                 v             v                     Args         what it is launched with
//          dense (N, 128 * slabs), row-major        and includes formats/<format>.cuh for Codec.
//
// Bound by memory: half a byte or one is read per weight, and two are written. A block takes slab after slab, a warp 16
// of its 64 outputs. Lanes hold pairs of neighbouring K in rows g and g + 8; by way of shared memory they become
// whole lines of 256 bytes. Padding beyond K is written too, outputs beyond N are not.
//
// Codes are decoded to float16 whatever the activations are, which is exact for integers and rounds a table less.
#pragma once
#include "layout.cuh"
#include "ptx/shared_memory.cuh"

constexpr int ROW_BYTES = 2 * SLAB_K + 16;  // in shared memory: rows start in different banks, at multiples of 16 bytes

extern "C" __global__ void __launch_bounds__(Config::threads) dequantize(const __grid_constant__ Args args) {
    using Decoder = Codec<Float16>;
    static_assert(Config::threads == SLAB_N / 16 * WARP, "a warp for 16 outputs");
    static_assert(Decoder::table_bytes + SLAB_N * ROW_BYTES == SHARED_BYTES, "the host twin reserves this much");

    extern __shared__ __align__(128) u8 shared[];
    const u32 table = shared_address(shared), tile = table + Decoder::table_bytes;
    Decoder::fill_table(table, threadIdx.x, Config::threads);
    __syncthreads();

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 mine = tile + (16 * warp + lane / 4) * ROW_BYTES + 4 * (lane % 4);
    const int total = (args.N + SLAB_N - 1) / SLAB_N * args.slabs;
    for (int slab = blockIdx.x; slab < total; slab += gridDim.x) {
        const int n = slab / args.slabs, k = slab % args.slabs;
        const u8* const half = args.weight + (static_cast<i64>(n) * args.slabs_k + args.first_slab + k) * Slab::slab_bytes +
                               warp / 2 * Slab::half_bytes;
        LaneCodes<SLAB_ATOMS> codes;
#pragma unroll
        for (int atom = 0; atom < SLAB_ATOMS; ++atom) {
            const GlobalBytes bytes{half};
            codes.load(bytes, warp % 2, atom, atom, lane);
            const Parameters<GlobalBytes> parameters{bytes, 16 * atom / Slab::granule, warp % 2, lane};
            const auto pair = parameters.scale();
            float scale[2] = {pair.of(0), pair.of(1)};
            if constexpr (!Slab::has_scale)
#pragma unroll
                for (int i = 0; i < 2; ++i) scale[i] = args.output_scales[SLAB_N * n + 16 * warp + lane / 4 + 8 * i];
            u32 values[4];
            Decoder::decode(values, Atom<SLAB_ATOMS>{codes, atom}, Decoder::group(parameters), table);
#pragma unroll
            for (int p = 0; p < 4; ++p)  // registers 1 and 3 belong to row g + 8, 2 and 3 to the later columns
                store_shared(mine + p % 2 * 8 * ROW_BYTES + 32 * atom + p / 2 * 16,
                             Activation::pack(Float16::to_float(values[p] & 0xFFFFu) * scale[p % 2],
                                              Float16::to_float(values[p] >> 16) * scale[p % 2]));
        }
        __syncthreads();
        for (int i = threadIdx.x; i < SLAB_N * SLAB_K / 8; i += Config::threads) {
            const int row = i / (SLAB_K / 8), chunk = i % (SLAB_K / 8);
            u16* const line = args.dense + static_cast<i64>(SLAB_N * n + row) * (SLAB_K * args.slabs) + SLAB_K * k;
            if (SLAB_N * n + row < args.N)
                reinterpret_cast<Vec4*>(line)[chunk] = load_shared_vec4(tile + row * ROW_BYTES + 16 * chunk);
        }
        __syncthreads();
    }
}
