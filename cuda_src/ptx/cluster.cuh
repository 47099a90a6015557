// Thread block clusters: rank, barrier, and a neighbour's shared memory (sm_90).
#pragma once
#include "ptx/types.cuh"

__device__ inline u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The two halves of a barrier of all threads of all blocks.
__device__ inline void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// The same where there is nothing to make visible. Release costs a fence of the whole GPU.
__device__ inline void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ inline void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address in the whole cluster of what lies at `shared` in block `rank`.
__device__ inline u32 cluster_address(u32 shared, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

// At a barrier in another block, to say that shared memory has been read: nothing is released beyond this block, which would
// cost a fence of the whole GPU. A predicate, not a branch, as in barrier_arrive_if.
__device__ inline void barrier_arrive_remote_if(bool condition, u32 remote) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %1, 0;\n"
        "@p mbarrier.arrive.shared::cluster.b64 _, [%0]; }" ::"r"(remote),
        "r"(static_cast<int>(condition))
        : "memory");
}

// Stores into another block; the bytes count on `barrier`, which lies there too.
__device__ inline void store_cluster_async(u32 remote, float4 v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
}

__device__ inline float4 load_cluster(u32 shared, u32 rank) {
    const u32 remote = cluster_address(shared, rank);
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(remote)
                 : "memory");
    return v;
}
