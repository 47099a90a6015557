// What a warp multiplies with: K per instruction, and how it gets its operands. A is a decoded atom of weights, 16 outputs
// x 16 K in four registers; B is x, 16 K x 8 tokens, which ldmatrix brings from rows of 16-byte chunks along K.
#pragma once
#include "ptx/mma.cuh"
#include "ptx/shared_memory.cuh"

template <class T>
struct HalfMma {
    static constexpr int k = 16;

    static __device__ void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma<T>(sums, a, b[0], b[1]); }

    // B of `atom` for `count` times 8 tokens, two at a time by one ldmatrix; with `lone` of 8 tokens for two atoms.
    // Place::token_chunk says where a chunk of a token is.
    template <class Place, bool lone, int count>
    static __device__ void load(u32 (&b)[count][2], u32 x, int token, int atom) {
        const int lane = threadIdx.x % WARP, matrix = lane / 8, row = lane % 8;
#pragma unroll
        for (int t = 0; t < count; t += 2) {
            const int tile = lone ? 0 : t + matrix / 2, chunk = 2 * atom + (lone ? matrix : matrix % 2);
            const Vec4 v = load_matrix_x4(x + Place::token_chunk(token + 8 * tile + row, chunk));
            b[t][0] = v.word[0];
            b[t][1] = v.word[1];
            b[t + 1][0] = v.word[2];
            b[t + 1][1] = v.word[3];
        }
    }
};
