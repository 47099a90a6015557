// Names for the widths that PTX speaks of, and the two 16-bit floating-point types.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int WARP = 32;

struct alignas(16) Vec4 {
    u32 word[4];
};

// Keeps what computes `value` before, and what uses it after this point. Registers of wgmma must not be written while a
// group is under way, and the compiler would move arithmetic across; and it would compute an address anew in every turn
// of a loop.
__device__ inline void pin(u32& value) {
    asm volatile("" : "+r"(value)::"memory");
}
__device__ inline void pin(float& value) {
    asm volatile("" : "+f"(value)::"memory");
}

// Of a power of two that is a normal number, as is the result; exact, and no division.
__device__ inline float inverse_power(float power) {
    return __uint_as_float(0x7F000000u - __float_as_uint(power));
}

// fp16: 11 significant bits.
struct Float16 {
    static constexpr int bits = 16;
    static constexpr bool narrow = true;  // 5 bits of exponent
    static constexpr u32 sixteenth = 0x2C002C00u;  // in both halves
    static __device__ float to_float(u32 low_half) {
        float value;
        asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(low_half));
        return value;
    }
    static __device__ u32 pack(float low, float high) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
    static __device__ u32 add(u32 a, u32 b) {
        u32 pair;
        asm("add.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
        return pair;
    }
    static __device__ u32 multiply(u32 a, u32 b) {
        u32 pair;
        asm("mul.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
        return pair;
    }
    static __device__ u32 fma(u32 a, u32 b, u32 c) {
        u32 pair;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
        return pair;
    }
};

// bf16: 8 significant bits.
struct BFloat16 {
    static constexpr int bits = 16;
    static constexpr bool narrow = false;
    static constexpr u32 sixteenth = 0x3D803D80u;
    static __device__ float to_float(u32 low_half) {
        return __int_as_float(static_cast<int>(low_half << 16));
    }
    static __device__ u32 pack(float low, float high) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
    static __device__ u32 fma(u32 a, u32 b, u32 c) {
        u32 pair;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
        return pair;
    }
    // Before Hopper bf16 has no add nor product of its own: a * 1 + b and a * b - 0 round alike.
    static __device__ u32 add(u32 a, u32 b) { return fma(a, 0x3F803F80u, b); }
    static __device__ u32 multiply(u32 a, u32 b) { return fma(a, b, 0x80008000u); }
};

// Types of parameters alone.
struct Float32 {
    static constexpr int bits = 32;
    static __device__ float to_float(u32 word) { return __uint_as_float(word); }
};

// 2^(bits - 127): e8m0 of the OCP MX formats. The least one is a subnormal float.
struct PowerOfTwo {
    static constexpr int bits = 8;
    static __device__ float to_float(u32 byte) {
        const u32 shifted = byte << 23;
        return __uint_as_float(shifted > 0x00400000u ? shifted : 0x00400000u);
    }
};
