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
// The preamble defines Config, Activation, Scale, GRANULE, SHARED_BYTES and Args, as for sm80_gemm.
#pragma once
#include "layout.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "schedule/segments.cuh"

struct Tile : Config {
    static constexpr int slabs = Config::wgs_n * Config::row_blocks;  // 64-output blocks
    static constexpr int rows = SLAB_N * slabs;
    static constexpr int pieces = (Config::tokens + 127) / 128;       // wgmma per row block and 16 K
    static constexpr int piece = Config::tokens / pieces;
    static constexpr int consumers = 4 * WARP * Config::wgs_n * Config::wgs_k;
    static constexpr int threads = consumers + 4 * WARP;
    static constexpr int sums = Config::tokens / 2;                   // accumulators per thread and row block
    static_assert(Config::stages % Config::wgs_k == 0, "a K group that runs ahead must not meet another's stages");
    static_assert(Config::stages >= 2 * Config::wgs_k, "a K group gives a stage back when it works on its next");
};

enum Barrier { ALL = 1, CONSUMERS, FIRST_K_GROUP, STORE };  // STORE + wg_n

using Decoder = Codec<Activation, Scale>;
using Packed = Layout<Decoder, GRANULE>;

// Shared memory, from the start: x needs the alignment of its swizzle.
struct Place {
    static constexpr int LENT_BYTES = 16384;                          // less than that is not worth waiting for the ring
    static constexpr int x_bytes = Tile::tokens * SLAB_K * 2;
    static constexpr int x_half = x_bytes / 2;                        // 64 K
    static constexpr int weight_bytes = Tile::slabs * Packed::slab_bytes;
    static constexpr int share_bytes = Tile::rows * Tile::tokens * 4;
    static constexpr int turn_bytes = 16 * SLAB_N * 2;                // 16 tokens of a row block

    static constexpr int weights = Tile::stages * x_bytes;
    static constexpr int table = weights + Tile::stages * weight_bytes;
    static constexpr int k_shares = table + Decoder::table_bytes;     // of K groups but the first
    static constexpr int others_bytes = (Tile::cluster - 1) * share_bytes;  // what other blocks of the cluster leave
    static constexpr bool lends_stages = others_bytes > LENT_BYTES;
    static constexpr int own = k_shares + (Tile::wgs_k - 1) * share_bytes;
    static constexpr int turn = own + (lends_stages ? 0 : others_bytes);
    static constexpr int barriers = turn + Tile::wgs_n * 2 * turn_bytes;
    static constexpr int full = barriers, empty = full + 8 * Tile::stages, arrived = empty + 8 * Tile::stages;
    static constexpr int bytes = arrived + 16;
    static_assert(bytes == SHARED_BYTES, "the host twin reserves this much");

    static constexpr int cluster_shares = lends_stages ? 0 : own;     // a cluster computes one tile: its ring is free then
    static_assert(others_bytes <= table, "what other blocks leave goes where stages were");
};

__device__ inline Segments segments_of(const Args& args) {
    return {args.schedule, static_cast<int>(blockIdx.x) / Tile::cluster};
}

struct Ring {
    int stage = 0;
    u32 parity = 0;
    __device__ void advance(int by) {  // by no more than there are stages
        stage += by;
        if (stage >= Tile::stages) stage -= Tile::stages, parity ^= 1;
    }
    __device__ void advance_far(int by) {
        const int at = stage + by;
        parity ^= at / Tile::stages & 1;
        stage = at % Tile::stages;
    }
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

// One thread copies the weights, another x. What it does for a stage is kept short: ten warps may wait for the next one.
__device__ inline void produce_weights(const Args& args, u32 shared) {
    pin(shared);
    const u64 policy = args.tiles_m == 1 ? policy_evict_first() : policy_evict_normal();
    Ring ring;
    for (Segments all = segments_of(args); all.next();) {
        const int first = Corner(args, all.now.tile).row_block;
        const int count = args.slabs_n - first < Tile::slabs ? args.slabs_n - first : Tile::slabs;
        const i64 pitch = static_cast<i64>(args.schedule.steps) * Packed::slab_bytes;
        const Segment range = all.now.part(static_cast<int>(cluster_rank()), Tile::cluster);
        const u8* source = args.weight + first * pitch + static_cast<i64>(range.begin) * Packed::slab_bytes;
        if (STACKED) source += args.stack.number() * args.slabs_n * pitch;
#pragma unroll 1
        for (int k = range.begin; k < range.end; ++k, source += Packed::slab_bytes) {
            const u32 full = shared + Place::full + 8 * ring.stage;
            const u32 stage = shared + Place::weights + ring.stage * Place::weight_bytes;
            barrier_wait(shared + Place::empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(full, count * Packed::slab_bytes);
#pragma unroll
            for (int i = 0; i < Tile::slabs; ++i)
                if (i == 0 || i < count)
                    copy_bulk(stage + i * Packed::slab_bytes, source + i * pitch, Packed::slab_bytes, full, policy);
            ring.advance(1);
        }
    }
}

__device__ inline void produce_x(const Args& args, u32 shared) {
    pin(shared);
    wait_for_previous_kernel();
    Ring ring;
    for (Segments all = segments_of(args); all.next();) {
        const int token = Corner(args, all.now.tile).token;
        const Segment range = all.now.part(static_cast<int>(cluster_rank()), Tile::cluster);
#pragma unroll 1
        for (int k = range.begin; k < range.end; ++k) {
            const u32 full = shared + Place::full + 8 * ring.stage, x = shared + ring.stage * Place::x_bytes;
            barrier_wait(shared + Place::empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(full, Place::x_bytes);
            copy_box(x, &args.x, k * SLAB_K, token, full);
            copy_box(x + Place::x_half, &args.x, k * SLAB_K + 64, token, full);
            ring.advance(1);
        }
    }
}

// What a consumer warpgroup does, and its accumulators.
struct Consumer {
    static constexpr int atoms = Tile::tokens < 192 ? 2 : 1;           // of 16 K, decoded together: so many as fit in registers
    static constexpr int groups = SLAB_K / (16 * atoms);               // of wgmma in a slab
    static constexpr int sets = 2;                                     // of A registers: one in use by wgmma, one in the making

    using Scaled = typename Decoder::Scaled;

    const Args& args;
    const u32 shared;
    const int lane, warp, wg_n, wg_k;                                  // warp: in its warpgroup
    float sums[Tile::row_blocks][Tile::sums];
    float factor[Tile::row_blocks][2];                                 // of rows g and g + 8

    __device__ Consumer(const Args& args, u32 shared)
        : args(args), shared(shared), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP % 4),
          wg_n(warpgroup_index() % Tile::wgs_n), wg_k(Tile::wgs_k == 1 ? 0 : warpgroup_index() / Tile::wgs_n) {}

    __device__ void run() {
        Ring ring;
        for (Segments all = segments_of(args); all.next();) {
            const Segment range = all.now.part(static_cast<int>(cluster_rank()), Tile::cluster);
            const Corner corner(args, all.now.tile);
            load_factors(corner.row_block);
            multiply(ring, range.end - range.begin);
            finish(all, corner);
        }
    }

private:
    __device__ void release(int stage) {
        barrier_arrive_if(lane == 0 && stage >= 0, shared + Place::empty + 8 * stage);
    }

    __device__ void load_factors(int row_block) {
        const i64 first = args.stack.number() * args.slabs_n * SLAB_N;
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r) {
            const int block = row_block + wg_n * Tile::row_blocks + r;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                factor[r][i] = Scaled::needs_factors && block < args.slabs_n
                                   ? (args.factors + first)[SLAB_N * block + 16 * warp + lane / 4 + 8 * i]
                                   : 1.0f;
        }
    }

    // This K group's share of `count` stages.
    __device__ void multiply(Ring& ring, int count) {
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
            for (int i = 0; i < Tile::sums; ++i) sums[r][i] = 0.0f;

        u32 a[sets][Tile::row_blocks][atoms][4];
        Vec4 codes[Tile::row_blocks];
        Scaled scaled[Tile::row_blocks];
        int before = -1;  // the stage whose last products may be under way
        const int skip = (wg_k + Tile::wgs_k - ring.stage % Tile::wgs_k) % Tile::wgs_k;
        Ring mine = ring;
        mine.advance(skip);
        for (int i = skip; i < count; i += Tile::wgs_k) {
            barrier_wait(shared + Place::full + 8 * mine.stage, mine.parity);
            const u64 x = wgmma_descriptor(uniform(shared + mine.stage * Place::x_bytes));
            const u32 slab = shared + Place::weights + mine.stage * Place::weight_bytes +
                             wg_n * Tile::row_blocks * Packed::slab_bytes + warp / 2 * Packed::half_bytes;
#pragma unroll
            for (int group = 0; group < groups; ++group) {
                const int set = group % sets;
#pragma unroll
                for (int j = 0; j < atoms; ++j)
#pragma unroll
                    for (int r = 0; r < Tile::row_blocks; ++r)
                        decode(a[set][r][j], codes[r], scaled[r], factor[r], slab + r * Packed::slab_bytes, group * atoms + j);
                wgmma_fence();
#pragma unroll
                for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
                    for (int j = 0; j < atoms; ++j)
#pragma unroll
                        for (int piece = 0; piece < Tile::pieces; ++piece)
                            wgmma<Activation, Tile::piece>(sums[r] + piece * Tile::piece / 2, a[set][r][j],
                                                           x + (x_offset(group * atoms + j, piece) >> 4));
                wgmma_commit();
                wgmma_wait<sets - 1>();
                if (group == sets - 2) release(before);
            }
            before = mine.stage;
            mine.advance(Tile::wgs_k);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
            for (int i = 0; i < Tile::sums; ++i) asm volatile("" : "+f"(sums[r][i])::"memory");
        release(before);
        ring.advance_far(count);
    }

    static __device__ constexpr int x_offset(int atom, int piece) {
        return atom / 4 * Place::x_half + atom % 4 * 32 + piece * Tile::piece * 128;
    }

    // The A fragment of 16 rows x 16 K of a slab, times its scales. Codes and scales are loaded where theirs begin.
    __device__ void decode(u32 (&a)[4], Vec4& codes, Scaled& scaled, const float (&factor)[2], u32 half_slab, int atom) const {
        if (atom % Packed::atoms_per_block == 0)
            codes = load_shared_vec4(half_slab + Packed::block(atom / Packed::atoms_per_block, warp % 2) + 16 * lane);
        if (atom * 16 % GRANULE == 0) {
            const auto param = [&](int i) {
                return load_shared(half_slab + Packed::param(i, atom * 16 / GRANULE, warp % 2) + lane / 4 * 4);
            };
            const u32 pair = param(0);
            scaled = Scaled(Decoder::group(param), Scale::to_float(pair & 0xFFFFu) * factor[0],
                            Scale::to_float(pair >> 16) * factor[1]);
        }
        u32* const words = &codes.word[atom % Packed::atoms_per_block * Packed::words];
#pragma unroll
        for (int i = 0; i < Packed::words; ++i) pin(words[i]);
        scaled.decode(a, words, shared + Place::table);
#pragma unroll
        for (int i = 0; i < 4; ++i) pin(a[i]);
    }

    // ---- the end of a segment

    __device__ void finish(const Segments& all, const Corner& corner) {
        wait_for_previous_kernel();
        if (Tile::wgs_k > 1 && !add_k_groups()) return;
        if (Tile::cluster > 1 && !add_cluster()) return;
        if (all.is_shared() && !add_blocks(all)) return;
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
            store(sums[r], factor[r], SLAB_N * (corner.row_block + wg_n * Tile::row_blocks + r), corner.token);
    }

    // Where this thread's accumulators lie in a share of the tile, and the i-th four of row block r from there:
    // neighbours side by side.
    __device__ int share_offset() const {
        return (wg_n * Tile::row_blocks * quads_per_block * 4 * WARP + warp * WARP + lane) * 16;
    }
    static constexpr int quads_per_block = Tile::sums / 4;
    static __device__ constexpr int quad_offset(int r, int i) { return (r * quads_per_block + i) * 4 * WARP * 16; }

    __device__ void put(float* at, const float* s) const {
        *reinterpret_cast<float4*>(at) = {s[0], s[1], s[2], s[3]};
    }

    static __device__ void add(float* s, const float4& other) {
        s[0] += other.x, s[1] += other.y, s[2] += other.z, s[3] += other.w;
    }

    template <class Visit>
    static __device__ void each_quad(Visit visit) {
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
            for (int i = 0; i < quads_per_block; ++i) visit(r, i);
    }

    // Adds what others have left in shared memory, one after the other.
    template <int OTHERS>
    __device__ void add_shares(u32 shares) {
#pragma unroll
        for (int other = 0; other < OTHERS; ++other)
            each_quad([&](int r, int i) {
                const Vec4 v = load_shared_vec4(shares + other * Place::share_bytes + share_offset() + quad_offset(r, i));
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[r][4 * i + j] += __uint_as_float(v.word[j]);
            });
    }

    // Adds the K groups up in the first one; false for the others.
    __device__ bool add_k_groups() {
        const u32 shares = shared + Place::k_shares;
        barrier_sync(CONSUMERS, Tile::consumers);  // the segment before has been read
        if (wg_k > 0)
            each_quad([&](int r, int i) {
                const float* s = sums[r] + 4 * i;
                store_shared_vec4(shares + (wg_k - 1) * Place::share_bytes + share_offset() + quad_offset(r, i),
                                  {__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3])});
            });
        barrier_sync(CONSUMERS, Tile::consumers);
        if (wg_k > 0) return false;
        add_shares<Tile::wgs_k - 1>(shares);
        return true;
    }

    // Adds the blocks of the cluster up in the first one; false for the others. Where they are to overwrite its stages, the
    // first one says when they may.
    __device__ bool add_cluster() {
        const int rank = static_cast<int>(cluster_rank());
        const u32 shares = shared + Place::cluster_shares, arrived = shared + Place::arrived;
        if (rank > 0) {
            if (Place::lends_stages)
                barrier_wait_cluster(arrived, 0);
            else
                cluster_wait();  // the first block has started
            const u32 remote = cluster_address(shares + (rank - 1) * Place::share_bytes + share_offset(), 0);
            const u32 barrier = cluster_address(arrived, 0);
            each_quad([&](int r, int i) {
                const float* s = sums[r] + 4 * i;
                store_cluster_async(remote + quad_offset(r, i), {s[0], s[1], s[2], s[3]}, barrier);
            });
            return false;
        }
        if (Place::lends_stages) {
            cluster_wait();  // the others have started
            barrier_arrive_remote_if(lane > 0 && lane < Tile::cluster, cluster_address(arrived, lane % Tile::cluster));
        }
        barrier_wait(arrived, 0);
        add_shares<Tile::cluster - 1>(shares);
        return true;
    }

    // Blocks that share a tile leave their parts in global memory; the last to arrive adds them up in block order.
    // The counter releases and acquires for all threads, which the barriers before and after it order.
    __device__ bool add_blocks(const Segments& all) {
        constexpr int threads = 4 * WARP * Tile::wgs_n;
        u8* const partials = reinterpret_cast<u8*>(args.partials);
        const auto part = [&](int block) {
            return partials + static_cast<i64>(all.slot(block)) * Place::share_bytes + share_offset();
        };
        u8* const own = part(all.block);
        each_quad([&](int r, int i) { put(reinterpret_cast<float*>(own + quad_offset(r, i)), sums[r] + 4 * i); });
        barrier_sync(FIRST_K_GROUP, threads);
        const int first = all.first_block(), last = all.last_block();
        const u32 flag = shared + Place::arrived + 8;
        if (threadIdx.x == 0) store_shared(flag, increment_wrapping(args.counters + all.shared_tile(), last - first));
        barrier_sync(FIRST_K_GROUP, threads);
        const bool is_last = load_shared(flag) == static_cast<u32>(last - first);
        barrier_sync(FIRST_K_GROUP, threads);  // read before it is written for the next segment
        if (!is_last) return false;
        // This block's own part is read back too: it has its place in the order, and registers for a second sum do not exist.
        constexpr int batch = quads_per_block % 8 == 0 ? 8 : quads_per_block % 4 == 0 ? 4 : 2;  // loads under way
        each_quad([&](int r, int i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[r][4 * i + j] = 0.0f;
        });
        for (int block = first; block <= last; ++block) {
            const u8* const other = part(block);
#pragma unroll
            for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
                for (int i = 0; i < quads_per_block; i += batch) {
                    float4 v[batch];
#pragma unroll
                    for (int j = 0; j < batch; ++j)
                        v[j] = load_global_l2(reinterpret_cast<const float4*>(other + quad_offset(r, i + j)));
#pragma unroll
                    for (int j = 0; j < batch; ++j) add(sums[r] + 4 * (i + j), v[j]);
                }
        }
        return true;
    }

    // A row block, turned over 16 tokens at a time: y wants a token's outputs side by side, and the warps' outputs too, so
    // that a store is whole cache lines. Two buffers take turns: at the barrier between, all have read the other one.
    __device__ void store(const float* s, const float (&factor)[2], int row, int token) const {
        constexpr int pitch = 2 * SLAB_N;  // 16-byte chunks of a token, swizzled against bank conflicts
        const u32 turn = shared + Place::turn + wg_n * 2 * Place::turn_bytes;
        const int from = lane / 16 * 8 + lane % 8, to = 4 * warp + lane / 8;  // token in the buffer
        const u32 put = turn + from * pitch + ((2 * warp + lane / 8 % 2) ^ (from % 8)) * 16;
        const u32 get = turn + to * pitch + ((lane % 8) ^ (to % 8)) * 16;
        float bias[2] = {0.0f, 0.0f};
        const float undo[2] = {inverse_power(factor[0] * Scaled::unit), inverse_power(factor[1] * Scaled::unit)};
        if (args.bias) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int mine = row + 16 * warp + lane / 4 + 8 * i;
                if (mine < args.N) bias[i] = Activation::to_float(args.bias[mine]);
            }
        }
        const int my_row = row + lane % 8 * 8;
        barrier_sync(STORE + wg_n, 4 * WARP);  // the row block before has been read
#pragma unroll
        for (int t = 0; t < Tile::tokens / 16; ++t) {
            if (token + 16 * t >= args.M) break;
            Vec4 pairs;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs.word[i] = Activation::pack(s[8 * t + 2 * i] * undo[i % 2] + bias[i % 2],
                                                 s[8 * t + 2 * i + 1] * undo[i % 2] + bias[i % 2]);
            store_matrix_x4_turned(put + t % 2 * Place::turn_bytes, pairs);
            barrier_sync(STORE + wg_n, 4 * WARP);
            const int my_token = token + 16 * t + to;
            if (my_token >= args.M) continue;
            const Vec4 out = load_shared_vec4(get + t % 2 * Place::turn_bytes);
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

extern "C" __global__ void __cluster_dims__(Config::cluster) __launch_bounds__(Tile::threads, 1)
    gemm(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) u8 memory[];
    const u32 shared = shared_address(memory);
    allow_next_kernel();

    // The first weights are on their way before the other warps have met.
    const bool copies_weights = threadIdx.x / WARP == Tile::consumers / WARP;
    if (threadIdx.x == Tile::consumers) {
        for (int stage = 0; stage < Tile::stages; ++stage) {
            barrier_init(shared + Place::full + 8 * stage, 2);
            barrier_init(shared + Place::empty + 8 * stage, 4 * Tile::wgs_n);
        }
        const bool adds = cluster_rank() == 0;
        barrier_init(shared + Place::arrived, adds ? 1 : 4 * Tile::wgs_n);
        if (Tile::cluster > 1 && adds) barrier_expect(shared + Place::arrived, (Tile::cluster - 1) * Place::share_bytes);
        barrier_init_fence();
    } else if (threadIdx.x == Tile::consumers + WARP) {
        prefetch_map(&args.x);
    }
    __syncwarp();
    if (Tile::cluster > 1) cluster_arrive_relaxed();  // barriers are set up: their fence has released that
    if (copies_weights) {
        barrier_arrive_only(ALL, Tile::threads);
    } else {
        if (threadIdx.x < Tile::consumers) Decoder::fill_table(shared + Place::table, threadIdx.x, Tile::consumers);
        barrier_sync(ALL, Tile::threads);
    }

    if (warpgroup_index() == Tile::wgs_n * Tile::wgs_k) {
        warpgroup_give_registers<Config::producer_registers>();
        const int role = static_cast<int>(uniform(threadIdx.x / WARP)) - Tile::consumers / WARP;
        if (role == 0 && elect_lane()) produce_weights(args, shared);
        if (role == 1 && elect_lane()) produce_x(args, shared);
    } else {
        warpgroup_take_registers<Config::consumer_registers>();
        Consumer(args, shared).run();
    }
}
