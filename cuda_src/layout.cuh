// Where a code sits: the device's view of marlin_cupy/layout.py, which draws and explains it.
//
// The preamble defines `struct Slab`, printed by the host: sizes, and for each parameter and each plane of codes where it
// lies in a half slab. Nothing here computes a place of its own.
#pragma once
#include "ptx/shared_memory.cuh"
#include "ptx/types.cuh"

constexpr int SLAB_N = 64;
constexpr int SLAB_K = 128;
constexpr int HALF_N = 32;
constexpr int SLAB_ATOMS = SLAB_K / 16;  // 16x16 atoms along K

// Which weight of a stack is multiplied, in kernels that are built for one (STACKED). Its number stands in device memory,
// so that a loop on the device can count. The kernel ahead may have written it: such a launch is never a dependent one.
struct Stack {
    const int* layer;
    int layers;  // numbers below 0 count from the end, those beyond as the nearest

    __device__ i64 number() const {
        if (!STACKED) return 0;
        const int given = *layer, found = given < 0 ? given + layers : given;
        return found < 0 ? 0 : found < layers ? found : layers - 1;
    }
};

// Bytes of a half slab, wherever it is: at a place, and within that where a lane's are.
struct SharedBytes {
    u32 address;

    __device__ u32 u16_at(int place, int own) const { return load_shared_u16(address + place + own); }
    __device__ u32 word_at(int place, int own) const { return load_shared(address + place + own); }
    __device__ uint2 vec2_at(int place, int own) const { return load_shared_vec2(address + place + own); }
    __device__ Vec4 vec4_at(int place, int own) const { return load_shared_vec4(address + own + place); }
};

// The same for a lane that reads many places: what is its own joins the address first, once for all of them.
struct LaneBytes : SharedBytes {
    __device__ u32 word_at(int place, int own) const { return load_shared(address + own + place); }
};

struct GlobalBytes {
    const u8* address;

    __device__ u32 u16_at(int place, int own) const { return *reinterpret_cast<const u16*>(address + place + own); }
    __device__ u32 word_at(int place, int own) const { return *reinterpret_cast<const u32*>(address + place + own); }
    __device__ uint2 vec2_at(int place, int own) const { return *reinterpret_cast<const uint2*>(address + place + own); }
    __device__ Vec4 vec4_at(int place, int own) const { return *reinterpret_cast<const Vec4*>(address + own + place); }
};

// A parameter of this lane's rows g and g + 8, as it is stored.
template <class Type>
struct RowPair {
    u32 words[Type::bits == 32 ? 2 : 1];

    // Of row g + 8 i.
    __device__ float of(int i) const {
        if constexpr (Type::bits == 32) return Type::to_float(words[i]);
        constexpr u32 mask = (1u << Type::bits % 32) - 1u;
        return Type::to_float(i == 0 ? words[0] & mask : words[0] >> Type::bits % 32);
    }
};

// Where there is none: kernels multiply by 1, which costs nothing.
struct NoPair {
    __device__ float of(int) const { return 1.0f; }
};

// The parameters of one granule for 16 rows of a half slab.
template <class Bytes>
struct Parameters {
    Bytes half;
    int k_granule, rows, lane;  // rows is 0 or 1, the 16-row block

    template <class Field>
    __device__ auto read() const {
        using Type = typename Field::Type;
        const int place = Field::at(k_granule, rows), own = lane / 4 * (Type::bits / 4);
        if constexpr (Type::bits == 8) {
            return RowPair<Type>{{half.u16_at(place, own)}};
        } else if constexpr (Type::bits == 16) {
            return RowPair<Type>{{half.word_at(place, own)}};
        } else {
            const uint2 pair = half.vec2_at(place, own);
            return RowPair<Type>{{pair.x, pair.y}};
        }
    }

    // The scales; none where outputs have theirs, which multiply sums.
    __device__ auto scale() const {
        if constexpr (Slab::has_scale)
            return read<Slab::scale>();
        else
            return NoPair{};
    }
};

// What a lane holds of the codes of 16 rows, plane by plane. `step_atoms`: atoms along K that its warp takes of a slab.
template <int step_atoms>
struct LaneCodes {
    // Several words, each plane in the registers of its last load.
    Vec4 loaded[Slab::planes];

    // Loads what begins with the warp's atom `a`, which is number `atom` in the slab.
    template <class Bytes>
    __device__ void load(const Bytes& half, int rows, int a, int atom, int lane) {
        load_plane<Slab::plane0>(loaded[0], half, rows, a, atom, lane);
        if constexpr (Slab::planes > 1) load_plane<Slab::plane1>(loaded[1], half, rows, a, atom, lane);
    }

    // Word i of the unit in which a plane keeps its bits of the warp's atom `a`.
    template <class Plane>
    __device__ u32& word(int a, int i = 0) {
        return loaded[Slab::planes > 1 && Plane::number == 1].word[a % held<Plane>() * Plane::bits / 4 + i];
    }

    // See pin(): the words of an atom.
    __device__ void keep(int a) {
#pragma unroll
        for (int i = 0; i < (Slab::plane0::bits + 3) / 4; ++i) pin(word<Slab::plane0>(a, i));
        if constexpr (Slab::planes > 1) pin(word<Slab::plane1>(a));
    }

private:
    // Atoms of a load: a warp that takes half of a slab's K loads half of what lies there for a lane.
    template <class Plane>
    static __device__ constexpr int held() {
        return Plane::load_atoms < step_atoms ? Plane::load_atoms : step_atoms;
    }

    template <class Plane, class Bytes>
    static __device__ void load_plane(Vec4& to, const Bytes& half, int rows, int a, int atom, int lane) {
        constexpr int atoms = held<Plane>(), bytes = atoms * Plane::bits;
        if (a % atoms != 0) return;
        const int within = atoms == Plane::load_atoms ? 0 : atom % Plane::load_atoms * Plane::bits;
        const int place = Plane::at(atom / Plane::load_atoms, rows), own = Plane::load_bytes * lane + within;
        if constexpr (bytes == 16) {
            to = half.vec4_at(place, own);
        } else if constexpr (bytes == 8) {
            const uint2 v = half.vec2_at(place, own);
            to.word[0] = v.x, to.word[1] = v.y;
        } else {
            to.word[0] = half.word_at(place, own);
        }
    }
};

// The codes of one atom, as a decoder sees them.
template <int step_atoms>
struct Atom {
    LaneCodes<step_atoms>& codes;
    int number;  // of the warp's atoms, known when the kernel is compiled

    template <class Plane>
    __device__ u32 word(int i = 0) const {
        return codes.template word<Plane>(number, i);
    }
};
