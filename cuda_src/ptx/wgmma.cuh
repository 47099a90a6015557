// wgmma m64nNk16 with A in registers and B in shared memory: four warps, asynchronous (sm_90a).
//
// A warp of the warpgroup holds 16 of the 64 rows of A and D, in the fragments of mma.sync m16n8k16: one packed layout
// serves both instructions. B is N tokens x 16 K, K-major, in the 128-byte swizzle that the tensor copy writes.
#pragma once
#include "ptx/types.cuh"

// Registers written before are visible to the wgmma that follow.
__device__ inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` groups are under way; the registers of the others are free.
template <int pending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Descriptor of B at `shared`: rows of 128 bytes (64 K), eight of them 1024 bytes apart from the next eight.
// Sixteen K further on is 2 more, eight tokens further on 64 more.
__device__ inline u64 wgmma_descriptor(u32 shared) {
    return static_cast<u64>((shared & 0x3FFFFu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// d (64 x tokens, fp32) += a (64 x 16) b^T; d[4 * j + i] as the accumulators of mma.sync for tokens 8 j to 8 j + 7.
template <class T, int tokens>
__device__ inline void wgmma(float* d, const u32 (&a)[4], u64 b);

// Operand lists, ten numbers at a time: D10(3) is "%30, ..., %39".
#define D2(t) "%" #t "0, %" #t "1"
#define D4(t) D2(t) ", %" #t "2, %" #t "3"
#define D6(t) D4(t) ", %" #t "4, %" #t "5"
#define D8(t) D6(t) ", %" #t "6, %" #t "7"
#define D10(t) D8(t) ", %" #t "8, %" #t "9"
#define D30 D10() ", " D10(1) ", " D10(2) ", "
#define D50 D30 D10(3) ", " D10(4) ", "
#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define SUMS16(i) SUMS8(i), SUMS8(i + 8)
#define SUMS32(i) SUMS16(i), SUMS16(i + 16)
#define WGMMA_OF(T, type, tokens, d_list, a_list, b, ...)                                                    \
    template <>                                                                                              \
    __device__ inline void wgmma<T, tokens>(float* d, const u32 (&a)[4], u64 descriptor) {                   \
        asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0;\n"                                                \
                     "wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type                    \
                     " {" d_list "}, {" a_list "}, " b ", p, 1, 1, 0; }"                                     \
                     : __VA_ARGS__                                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                         \
    }
#define WGMMA(...) WGMMA_OF(Float16, "f16", __VA_ARGS__) WGMMA_OF(BFloat16, "bf16", __VA_ARGS__)

WGMMA(16, D8(), "%8, %9, %10, %11", "%12", SUMS8(0))
WGMMA(32, D10() ", " D6(1), "%16, %17, %18, %19", "%20", SUMS16(0))
WGMMA(48, D10() ", " D10(1) ", " D4(2), "%24, %25, %26, %27", "%28", SUMS16(0), SUMS8(16))
WGMMA(64, D30 D2(3), "%32, %33, %34, %35", "%36", SUMS32(0))
WGMMA(72, D30 D6(3), "%36, %37, %38, %39", "%40", SUMS32(0), SUMS4(32))
WGMMA(80, D30 D10(3), "%40, %41, %42, %43", "%44", SUMS32(0), SUMS8(32))
WGMMA(88, D30 D10(3) ", " D4(4), "%44, %45, %46, %47", "%48", SUMS32(0), SUMS8(32), SUMS4(40))
WGMMA(96, D30 D10(3) ", " D8(4), "%48, %49, %50, %51", "%52", SUMS32(0), SUMS16(32))
WGMMA(104, D50 D2(5), "%52, %53, %54, %55", "%56", SUMS32(0), SUMS16(32), SUMS4(48))
WGMMA(112, D50 D6(5), "%56, %57, %58, %59", "%60", SUMS32(0), SUMS16(32), SUMS8(48))
WGMMA(120, D50 D10(5), "%60, %61, %62, %63", "%64", SUMS32(0), SUMS16(32), SUMS8(48), SUMS4(56))
WGMMA(128, D50 D10(5) ", " D4(6), "%64, %65, %66, %67", "%68", SUMS32(0), SUMS32(32))
#undef WGMMA
#undef WGMMA_OF
#undef SUMS32
#undef SUMS16
#undef SUMS8
#undef SUMS4
#undef D50
#undef D30
#undef D10
#undef D8
#undef D6
#undef D4
#undef D2
