// Who computes what, tile by tile: stripes over the tiles that do not divide evenly, then whole tiles.
//
//   blocks = 4, tiles = 10, whole = 2          tiles 8 and 9 form a line of K steps of which each block takes an equal
//                                              stretch (MARLIN, Frantar et al. 2024, section 3.4); block b then takes
//   |--- 8 ---|--- 9 ---|0|1|2|3|4|5|6|7|      tiles b and b + 4 alone. All blocks end together, few tiles are put
//   | 0  | 1 | 2  | 3  |                       together from parts, and that while the next weights are on their way.
//
// Divisions are slow, and nothing can be copied before the first segment is known: the host divides what it can.
#pragma once
#include "ptx/types.cuh"

struct Schedule {
    int tiles, steps;    // steps of K per tile
    int blocks;          // or clusters
    int whole;           // tiles that each block computes alone, the first `whole * blocks`
    int stretch, longer; // steps of the line per block, and how many blocks have one more
};

struct Segment {
    int tile, begin, end;  // steps of K

    // Of the blocks of a cluster each takes a part of K.
    __device__ Segment part(int rank, int parts) const {
        const int length = end - begin;
        return {tile, begin + length * rank / parts, begin + length * (rank + 1) / parts};
    }
};

struct Segments {
    const Schedule plan;
    const int block;
    Segment now{};
    int count = 0;
    int at;

    __device__ Segments(const Schedule& plan, int block) : plan(plan), block(block), at(begin(block)) {}

    // Goes on to the next segment; false after the last.
    __device__ bool next() {
        const int line_end = begin(block + 1);
        if (at < line_end) {
            const int tile = at / plan.steps, from = at - tile * plan.steps;
            const int length = line_end - at < plan.steps - from ? line_end - at : plan.steps - from;
            now = {plan.whole * plan.blocks + tile, from, from + length};
            at += length;
            return true;
        }
        now = {block + count * plan.blocks, 0, plan.steps};
        return count++ < plan.whole && now.tile < plan.tiles;
    }

    // Of the segment at hand.
    __device__ bool is_shared() const { return now.end - now.begin < plan.steps; }
    __device__ int shared_tile() const { return now.tile - plan.whole * plan.blocks; }
    __device__ int first_block() const { return block_of(shared_tile() * plan.steps); }
    __device__ int last_block() const { return block_of((shared_tile() + 1) * plan.steps - 1); }

    // A block has parts of at most two tiles: the one it starts in (slot 0) and the one it ends in (slot 1).
    __device__ int slot(int other) const { return 2 * other + (begin(other) < shared_tile() * plan.steps ? 1 : 0); }

private:
    __device__ int begin(int other) const {
        return other * plan.stretch + (other < plan.longer ? other : plan.longer);
    }
    __device__ int block_of(int step) const {
        const int first = plan.longer * (plan.stretch + 1);  // of the blocks with the usual stretch
        return step < first ? step / (plan.stretch + 1) : plan.longer + (step - first) / plan.stretch;
    }
};
