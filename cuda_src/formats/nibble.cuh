// Lifts the 4-bit codes of a word into four pairs of 16-bit floats, minus an integer zero point, exactly.
//
//   word   n7 n6 n5 n4 n3 n2 n1 n0        pair p = (n[p], n[p + 4]): one mask takes both halves of a register
//
// A code ORed into the mantissa of a power of two whose last bit counts 1 is that power plus the code.
#pragma once
#include "ptx/types.cuh"

// (word & mask) | magic in one instruction; the compiler makes two of the expression, both constants immediate.
template <u32 mask, u32 magic>
__device__ inline u32 lift(u32 word) {
    u32 lifted;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(lifted) : "r"(word), "n"(mask), "n"(magic));
    return lifted;
}

template <class T>
struct Nibbles;

template <>
struct Nibbles<Float16> {
    // Pairs 0 and 2 read 1024 + n; pairs 1 and 3 sit four bits higher and read 1024 + 16 n.
    struct Zero {
        u32 low, high;  // -(1024 + zero), -(64 + zero), in both halves
    };
    static __device__ Zero zero(float z) {
        return {Float16::pack(-1024.0f - z, -1024.0f - z), Float16::pack(-64.0f - z, -64.0f - z)};
    }
    static __device__ u32 pair(int p, u32 word, const Zero& zero) {
        const u32 shifted = p < 2 ? word : word >> 8;
        return p % 2 == 0 ? Float16::add(lift<0x000F000F, 0x64006400>(shifted), zero.low)
                          : Float16::fma(lift<0x00F000F0, 0x64006400>(shifted), 0x2C002C00u /* 1/16 */, zero.high);
    }
};

template <>
struct Nibbles<BFloat16> {
    // Seven mantissa bits: every pair is shifted down and reads 128 + n.
    struct Zero {
        u32 low;  // -(128 + zero)
    };
    static __device__ Zero zero(float z) {
        return {BFloat16::pack(-128.0f - z, -128.0f - z)};
    }
    static __device__ u32 pair(int p, u32 word, const Zero& zero) {
        return BFloat16::add(lift<0x000F000F, 0x43004300>(word >> (4 * p)), zero.low);
    }
};
