// cp.async.bulk: one thread copies a contiguous piece global -> shared, completing on an mbarrier (sm_90).
#pragma once
#include "ptx/types.cuh"

__device__ inline void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Weights are read once: they leave L2 first.
__device__ inline u64 policy_evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ inline u64 policy_evict_normal() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Arrives, and lets the phase end no sooner than `bytes` have been copied.
__device__ inline void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The same without arriving.
__device__ inline void barrier_expect_more(u32 barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A predicate, not a branch: between wgmma that are under way, a branch makes the compiler wait for them.
__device__ inline void barrier_arrive_if(bool condition, u32 barrier) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %1, 0;\n"
        "@p mbarrier.arrive.shared::cta.b64 _, [%0]; }" ::"r"(barrier),
        "r"(static_cast<int>(condition))
        : "memory");
}

// Starts a copy that `barrier` expects; addresses and size are multiples of 16.
__device__ inline void copy_bulk(u32 shared, const void* global, int bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared),
        "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// Until the phase of that parity has ended.
#define BARRIER_WAIT(name, order)                                                   \
    __device__ inline void name(u32 barrier, u32 parity) {                          \
        asm volatile(                                                               \
            "{\n"                                                                   \
            ".reg .pred done;\n"                                                    \
            "again:\n"                                                              \
            "mbarrier.try_wait.parity" order ".shared::cta.b64 done, [%0], %1;\n"   \
            "@done bra over;\n"                                                     \
            "bra again;\n"                                                          \
            "over:\n"                                                               \
            "}\n" ::"r"(barrier),                                                   \
            "r"(parity)                                                             \
            : "memory");                                                            \
    }
BARRIER_WAIT(barrier_wait, "")
BARRIER_WAIT(barrier_wait_cluster, ".acquire.cluster")  // at which other blocks of the cluster arrive
#undef BARRIER_WAIT
