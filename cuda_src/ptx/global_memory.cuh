// Exchange between blocks through L2: loads that skip L1, and a counter that wraps by itself.
#pragma once
#include "ptx/types.cuh"

__device__ inline float4 load_global_l2(const float4* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address));
    return v;
}

// Returns the old value; the counter goes to 0 when it was `last`.
__device__ inline u32 increment_wrapping(u32* counter, u32 last) {
    u32 old;
    asm volatile("atom.global.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
    return old;
}
