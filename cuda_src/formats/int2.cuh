// int2: code - 2. A word holds the nibbles of two atoms, two bits of each.
#pragma once
#include "formats/nibble.cuh"

struct NibblesOfPairs {
    template <class Atom>
    static __device__ u32 of(const Atom& atom) {
        const u32 pairs = atom.template word<Slab::plane0>();
        return (atom.number % 2 ? pairs >> 2 : pairs) & 0x33333333u;
    }
};

template <class T>
using Codec = SymmetricNibbles<T, NibblesOfPairs>;
