// Lifts the 4-bit codes of a word into four pairs of 16-bit floats, minus an integer zero point, exactly.
//
//   word   n7 n6 n5 n4 n3 n2 n1 n0        pair p = (n[p], n[p + 4]): one mask takes both halves of a register
//
// A code ORed into the mantissa of a power of two whose last bit counts 1 is that power plus the code.
#pragma once
#include "ptx/types.cuh"

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
        return p % 2 == 0 ? Float16::add((shifted & 0x000F000Fu) | 0x64006400u, zero.low)
                          : Float16::fma((shifted & 0x00F000F0u) | 0x64006400u, 0x2C002C00u /* 1/16 */, zero.high);
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
        return BFloat16::add(((word >> (4 * p)) & 0x000F000Fu) | 0x43004300u, zero.low);
    }
};
