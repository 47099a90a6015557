// What cuda_src/formats/<name>.cuh provides: `template <class T, class S> struct Codec` with
//
//   params          16-bit parameters per output and granule, the scale first (the Python format's `params`)
//   bits            width of a code
//   table_bytes     shared memory it wants; fill_table() is called once by all threads of the block
//   Group           what decoding needs to know of a granule, for this lane's rows g and g + 8
//   group(...)      makes it from parameters after the scale: param(i) is the pair (row g, row g + 8) of parameter i
//   decode(...)     bits / 4 words -> the four registers of an m16k16 A fragment: 8 unscaled values of type T
//
// T is the type of the activations, S that of the parameters. Kernels multiply accumulators by the scale, so a
// decoded value carries no rounding error unless the format's values have no exact T.
#pragma once
#include "ptx/types.cuh"

// The parts of a format whose only parameter is the scale and which needs no table.
template <int code_bits>
struct ScaleOnly {
    static constexpr int params = 1;
    static constexpr int bits = code_bits;
    static constexpr int table_bytes = 0;
    struct Group {};

    static __device__ void fill_table(u32, int, int) {}

    template <class Param>
    static __device__ Group group(Param) {
        return {};
    }
};
