// mma.sync m16n8k16: D (16x8, fp32) += A (16x16) B (16x8), one warp (sm_80).
#pragma once
#include "ptx/types.cuh"

template <class T>
__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high);

template <>
__device__ inline void mma<Float16>(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

template <>
__device__ inline void mma<BFloat16>(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
