// Striped partitioning (MARLIN, Frantar et al. 2024, section 3.4): the K steps of all output tiles form one line,
// and each block takes an equal stretch of it.
//
//   tiles    |--- 0 ---|--- 1 ---|--- 2 ---|--- 3 ---|
//   blocks   |-- 0 --|-- 1 --|-- 2 --|-- 3 --|-- 4 --|     tile 1 is summed from blocks 1 and 2
//
// Any shape spreads over any number of blocks. A tile that one block covers needs no exchange; the host picks
// `blocks` as a multiple of the tiles where that fills the GPU.
#pragma once
#include "ptx/types.cuh"

struct Stripes {
    int steps;   // per tile
    int blocks;
    i64 total;   // steps of all tiles

    __device__ i64 begin(int block) const { return block * total / blocks; }
    __device__ int block_of(i64 step) const { return static_cast<int>(((step + 1) * blocks - 1) / total); }
    __device__ int first_block(int tile) const { return block_of(static_cast<i64>(tile) * steps); }
    __device__ int last_block(int tile) const { return block_of(static_cast<i64>(tile + 1) * steps - 1); }

    // A block has partial sums of at most two tiles: the one it starts in (slot 0) and the one it ends in (slot 1).
    __device__ int slot(int block, int tile) const {
        return 2 * block + (begin(block) < static_cast<i64>(tile) * steps ? 1 : 0);
    }
};
