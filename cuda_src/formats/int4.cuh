// int4: code - 8.
#pragma once
#include "formats/nibble.cuh"

struct WholeNibbles {
    template <class Atom>
    static __device__ u32 of(const Atom& atom) {
        return atom.template word<Slab::plane0>();
    }
};

template <class T>
using Codec = SymmetricNibbles<T, WholeNibbles>;
