// Who is who in a block of warpgroups, and where they meet.
//
//   warpgroup     0   1   ...  wgs_n - 1  |  wgs_n  ...  2 wgs_n - 1  |  ...  |  wgs_n wgs_k
//   K group       0                       |  1                        |  ...  |
//   outputs       wg_n = 0, 1, ...        |  wg_n = 0, 1, ...         |  ...  |  copies: a warp for weights, one for x
#pragma once
#include "ptx/warpgroup.cuh"

// Named barriers, by who meets there. Each warpgroup of the first K group has one of its own: STORE + wg_n.
enum Barrier { ALL = 1, CONSUMERS, FIRST_K_GROUP, STORE };

// A thread that multiplies: its place in its warpgroup, and which outputs and which share of K that has.
template <class Tile>
struct Consumer {
    const int lane, warp, wg_n, wg_k;

    __device__ Consumer()
        : lane(threadIdx.x % WARP), warp(threadIdx.x / WARP % 4), wg_n(warpgroup_index() % Tile::wgs_n),
          wg_k(Tile::wgs_k == 1 ? 0 : warpgroup_index() / Tile::wgs_n) {}
};
