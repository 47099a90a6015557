// Who computes what, tile by tile: whole tiles first, then stripes over what is left.
//
//   blocks = 4, tiles = 10, whole = 2          block b takes tiles b and b + 4 alone; tiles 8 and 9 form a line of K
//                                              steps of which each block takes an equal stretch (MARLIN, Frantar et
//   |0|1|2|3|4|5|6|7|--- 8 ---|--- 9 ---|      al. 2024, section 3.4). All blocks end together, and only the tiles of
//                    | 0  | 1 | 2  | 3  |      the last wave are put together from parts.
#pragma once
#include "ptx/types.cuh"

struct Segment {
    int tile, begin, end;  // K steps
};

struct Segments {
    const int tiles, steps, whole, blocks, block;
    Segment now{};
    int count = 0;
    i64 at = 0;

    __device__ Segments(int tiles, int steps, int whole, int blocks, int block)
        : tiles(tiles), steps(steps), whole(whole), blocks(blocks), block(block), at(begin(block)) {}

    // Goes on to the next segment; false after the last.
    __device__ bool next() {
        if (count < whole) {
            now = {block + count++ * blocks, 0, steps};
            return now.tile < tiles;
        }
        const i64 end = begin(block + 1);
        if (at >= end) return false;
        const int tile = static_cast<int>(at / steps), from = static_cast<int>(at % steps);
        const int length = end - at < steps - from ? static_cast<int>(end - at) : steps - from;
        now = {whole * blocks + tile, from, from + length};
        at += length;
        return true;
    }

    // Of the segment at hand.
    __device__ bool is_shared() const { return now.end - now.begin < steps; }
    __device__ int shared_tile() const { return now.tile - whole * blocks; }
    __device__ int first_block() const { return block_of(static_cast<i64>(shared_tile()) * steps); }
    __device__ int last_block() const { return block_of(static_cast<i64>(shared_tile() + 1) * steps - 1); }

    // A block has parts of at most two tiles: the one it starts in (slot 0) and the one it ends in (slot 1).
    __device__ int slot(int other) const {
        return 2 * other + (begin(other) < static_cast<i64>(shared_tile()) * steps ? 1 : 0);
    }

private:
    __device__ i64 total() const {
        const int left = tiles - whole * blocks;
        return left > 0 ? static_cast<i64>(left) * steps : 0;
    }
    __device__ i64 begin(int other) const { return other * total() / blocks; }
    __device__ int block_of(i64 step) const { return static_cast<int>(((step + 1) * blocks - 1) / total()); }
};
