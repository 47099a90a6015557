// int3: code - 4. Two planes make a word of nibbles: the lower bits of two atoms in a word, the upper bit of four.
#pragma once
#include "formats/nibble.cuh"

struct NibblesOfPlanes {
    template <class Atom>
    static __device__ u32 of(const Atom& atom) {
        const u32 pairs = atom.template word<Slab::plane0>(), singles = atom.template word<Slab::plane1>();
        const int at = atom.number % 4;
        const u32 low = at % 2 ? pairs >> 2 : pairs, high = at < 2 ? singles << (2 - at) : singles >> (at - 2);
        return (low & 0x33333333u) | (high & 0x44444444u);
    }
};

template <class T>
using Codec = SymmetricNibbles<T, NibblesOfPlanes>;
