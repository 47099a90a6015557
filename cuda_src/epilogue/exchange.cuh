// Adds up the parts of a tile of sm90_wgmma that different warpgroups and blocks have, always in the same order.
//
//   K groups of a block      through shared memory, in the first of them
//   blocks of a cluster      through the shared memory of the first of them, which their stores reach
//   blocks along a stripe    through global memory, in the one that arrives last
//
// A share is the tile as float32 in the order in which threads hold it, so that all go on with float4 side by side:
//
//   share    | row block 0: quad 0 | quad 1 | ... | row block 1: quad 0 | ...     of warpgroup 0, then of warpgroup 1, ...
//   quad     | thread 0: 4 sums | thread 1: 4 sums | ... | thread 127: 4 sums |
//
// Each function returns whether this thread goes on with the sum.
#pragma once
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/global_memory.cuh"
#include "ptx/shared_memory.cuh"
#include "schedule/roles.cuh"
#include "schedule/segments.cuh"

template <class Tile, class Memory>
struct Exchange {
    static constexpr int quads = Tile::sums / 4;  // of a row block

    const Memory memory;
    const Consumer<Tile>& me;
    float (&sums)[Tile::row_blocks][Tile::sums];

    // Adds the K groups up in the first one.
    __device__ bool add_k_groups() {
        barrier_sync(CONSUMERS, Tile::consumers);  // the segment before has been read
        if (me.wg_k > 0)
            each_quad([&](int r, int i) {
                const float* s = sums[r] + 4 * i;
                store_shared_vec4(memory.k_share(me.wg_k - 1) + offset() + quad(r, i),
                                  {__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3])});
            });
        barrier_sync(CONSUMERS, Tile::consumers);
        if (me.wg_k > 0) return false;
#pragma unroll
        for (int other = 0; other < Tile::wgs_k - 1; ++other) add_share(memory.k_share(other));
        return true;
    }

    // Adds the blocks of the cluster up in the first one. The others' stores count on its barrier `arrived`. Large shares
    // go where its stages were: it says when it has read them, at the `arrived` of each other block.
    __device__ bool add_cluster() {
        const int rank = static_cast<int>(cluster_rank());
        const u32 arrived = memory.arrived();
        if (rank > 0) {
            if (Memory::lends_stages)
                barrier_wait_cluster(arrived, 0);
            else
                cluster_wait();  // the first block has started
            const u32 remote = cluster_address(memory.cluster_share(rank - 1) + offset(), 0);
            const u32 barrier = cluster_address(arrived, 0);
            each_quad([&](int r, int i) {
                const float* s = sums[r] + 4 * i;
                store_cluster_async(remote + quad(r, i), {s[0], s[1], s[2], s[3]}, barrier);
            });
            return false;
        }
        if (Memory::lends_stages) {
            cluster_wait();  // the others have started
            barrier_arrive_remote_if(me.lane > 0 && me.lane < Tile::cluster, cluster_address(arrived, me.lane % Tile::cluster));
        }
        barrier_wait_cluster(arrived, 0);
#pragma unroll
        for (int other = 0; other < Tile::cluster - 1; ++other) add_share(memory.cluster_share(other));
        return true;
    }

    // Blocks that share a tile leave their parts in global memory; the last to arrive adds them up in block order.
    // The counter releases and acquires for all threads, which the barriers before and after it order.
    template <class Args>
    __device__ bool add_blocks(const Args& args, const Segments& all) {
        constexpr int threads = 4 * WARP * Tile::wgs_n;
        u8* const partials = reinterpret_cast<u8*>(args.partials);
        const auto part = [&](int block) {
            return partials + static_cast<i64>(all.slot(block)) * Tile::share_bytes + offset();
        };
        u8* const own = part(all.block);
        each_quad([&](int r, int i) {
            const float* s = sums[r] + 4 * i;
            *reinterpret_cast<float4*>(own + quad(r, i)) = {s[0], s[1], s[2], s[3]};
        });
        barrier_sync(FIRST_K_GROUP, threads);
        const int first = all.first_block(), last = all.last_block();
        const u32 count = memory.count();
        if (threadIdx.x == 0) store_shared(count, increment_wrapping(args.counters + all.shared_tile(), last - first));
        barrier_sync(FIRST_K_GROUP, threads);
        const bool is_last = load_shared(count) == static_cast<u32>(last - first);
        barrier_sync(FIRST_K_GROUP, threads);  // read before it is written for the next segment
        if (!is_last) return false;
        // This block's own part is read back too: it has its place in the order, and registers for a second sum do not exist.
        constexpr int batch = quads % 8 == 0 ? 8 : quads % 4 == 0 ? 4 : 2;  // loads under way
        each_quad([&](int r, int i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[r][4 * i + j] = 0.0f;
        });
        for (int block = first; block <= last; ++block) {
            const u8* const other = part(block);
#pragma unroll
            for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
                for (int i = 0; i < quads; i += batch) {
                    float4 v[batch];
#pragma unroll
                    for (int j = 0; j < batch; ++j)
                        v[j] = load_global_l2(reinterpret_cast<const float4*>(other + quad(r, i + j)));
#pragma unroll
                    for (int j = 0; j < batch; ++j) add(sums[r] + 4 * (i + j), v[j]);
                }
        }
        return true;
    }

private:
    // Where this thread's first quad lies in a share, and the i-th of row block r from there.
    __device__ int offset() const { return (me.wg_n * Tile::row_blocks * quads * 4 * WARP + me.warp * WARP + me.lane) * 16; }
    static __device__ constexpr int quad(int r, int i) { return (r * quads + i) * 4 * WARP * 16; }

    static __device__ void add(float* s, const float4& other) {
        s[0] += other.x, s[1] += other.y, s[2] += other.z, s[3] += other.w;
    }

    template <class Visit>
    static __device__ void each_quad(Visit visit) {
#pragma unroll
        for (int r = 0; r < Tile::row_blocks; ++r)
#pragma unroll
            for (int i = 0; i < quads; ++i) visit(r, i);
    }

    // Adds what another one has left in shared memory.
    __device__ void add_share(u32 share) {
        each_quad([&](int r, int i) {
            const Vec4 v = load_shared_vec4(share + offset() + quad(r, i));
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[r][4 * i + j] += __uint_as_float(v.word[j]);
        });
    }
};
