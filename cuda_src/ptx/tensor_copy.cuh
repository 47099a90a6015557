// cp.async.bulk.tensor: one thread copies a box of a matrix global -> shared, zeros beyond its edges (sm_90).
#pragma once
#include "ptx/types.cuh"

// A CUtensorMap, encoded by the host; it must lie in a kernel parameter.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ inline void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box whose first element is (row, column); its bytes count on `barrier`, which has been told to expect them.
__device__ inline void copy_box(u32 shared, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
