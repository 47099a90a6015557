"""WHERE a code sits: one packed layout for every kernel, architecture and batch size.

Weights are the row operand of the tensor core, so a fragment is 16 outputs (N) by 16 inputs (K)::

    packed buffer  uint8 (ceil(N / 64), ceil(K / 128), slab_bytes)

    slab           64 N x 128 K, contiguous:  [ half: N 0-31 ][ half: N 32-63 ]
    half           32 N x 128 K:              [ parameters ][ codes ]
    parameters     per name, per granule of K, per 16 N:  8 x (value of row g, value of row g + 8), 8 to 32 bits each
    codes          planes, one after the other: a code of 3 bits is a plane of 2 bits and a plane of 1 bit
    plane          blocks [K block][16-row block]; a block gives each of 32 lanes 16 bytes, or 8 where that is all of K:
                   16 N x 32 K of 8 bits, 64 K of 4 bits, 128 K of 2 bits or 1 bit
    lane           its A-fragment values of consecutive 16x16 atoms; lane = 4 * g + t owns rows g and g + 8,
                   columns 2t, 2t + 1, 2t + 8, 2t + 9 (mma.m16n8k16, and wgmma.m64k16 warp by warp)
    unit           words of 32 bits (for 8-bit codes two of them) that hold the same bits of 8 codes or more, in the
                   order in which the format's decoder wants them

C++ knows these places from :meth:`Layout.cpp`, which prints them as ``struct Slab``.

Why: one 16-byte shared-memory load per lane and block, free of bank conflicts; a stage of a pipeline is one
contiguous copy with its scales aboard; a copy can take 32 or 64 rows; slicing the first axis splits output
columns, slicing the second splits K, and both leave complete slabs.

A *granule* is gcd(group_size, 128): the parameters of a group are repeated for each granule, so that any
multiple of 16 is a group size and a slab needs nothing outside itself. Padding has scale 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from marlin_cupy import scalars
from marlin_cupy.device import contiguous, namespace
from marlin_cupy.formats import SCALE, Bits, Field, Format, Plane
from marlin_cupy.scalars import Scalar

Array = Any  # a NumPy or CuPy array, or a JAX array for unpack

SLAB_N = 64
SLAB_K = 128
HALF_N = 32
_ATOMS = SLAB_K // 16  # 16 x 16 atoms along K
_LANES = 32
_WORD = 32  # bits
_MAX_EXPONENT = 100  # of a range factor: it and its inverse stay normal numbers


@dataclass(frozen=True)
class PlaneLayout:
    """Where one plane of the codes lies in a half slab.

    Attributes:
        start: byte offset of its first block.
        bits: of a code that are in it.
    """

    start: int
    plane: Plane

    @property
    def codes(self) -> int:
        """Codes of a unit."""
        return len({run.value for run in self.plane})

    @property
    def words(self) -> int:
        """32-bit words of a unit."""
        return sum(run.width for run in self.plane) // _WORD

    @property
    def bits(self) -> int:
        """Bits per code."""
        return _WORD * self.words // self.codes

    @property
    def load_bytes(self) -> int:
        """What a lane loads at once: 8 codes of an atom are as many bytes as a code has bits."""
        return min(16, _ATOMS * self.bits)

    @property
    def load_atoms(self) -> int:
        """Atoms that come with one load."""
        return self.load_bytes // self.bits

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of one slab's plane as stored: half, K block, 16-row block, g, t, unit, word."""
        return 2, _ATOMS // self.load_atoms, 2, 8, 4, self.load_bytes // (4 * self.words), self.words

    @property
    def nbytes(self) -> int:
        """Of a half slab."""
        return HALF_N * SLAB_K * self.bits // 8


@dataclass(frozen=True)
class ParameterLayout:
    """Where one parameter lies in a half slab: per granule of K and 16 rows, 8 pairs of rows g and g + 8."""

    start: int
    field: Field
    granule: int

    @property
    def rows_bytes(self) -> int:
        """Of 16 rows."""
        return 16 * self.field.scalar.bits // 8

    @property
    def nbytes(self) -> int:
        """Of a half slab."""
        return SLAB_K // self.granule * 2 * self.rows_bytes


@dataclass(frozen=True)
class Layout:
    """Sizes and places for one format, group size and logical shape (K, N)."""

    format: Format
    K: int
    N: int
    group_size: int  # -1: one group that is K long
    scale_dtype: str

    @property
    def scale(self) -> Scalar:
        """The type of parameters."""
        return scalars.by_name(self.scale_dtype)

    @property
    def granule(self) -> int:
        """K per stored row of parameters: 16, 32, 64 or 128."""
        return SLAB_K if self.group_size == -1 else math.gcd(self.group_size, SLAB_K)

    @property
    def groups(self) -> int:
        """Number of groups along K; the last may be short."""
        return 1 if self.group_size == -1 else -(-self.K // self.group_size)

    @functools.cached_property
    def parameters(self) -> tuple[ParameterLayout, ...]:
        """In the order in which they are stored."""
        found: list[ParameterLayout] = []
        for field in self.format.fields(self.group_size, self.scale)[:-1]:
            start = found[-1].start + found[-1].nbytes if found else 0
            found.append(ParameterLayout(start, field, self.granule))
        return tuple(found)

    @functools.cached_property
    def planes(self) -> tuple[PlaneLayout, ...]:
        """Those of the codes, behind the parameters."""
        found: list[PlaneLayout] = []
        start = sum(each.nbytes for each in self.parameters)
        for plane in self.format.planes:
            found.append(PlaneLayout(start, plane))
            start += found[-1].nbytes
        return tuple(found)

    @property
    def half_bytes(self) -> int:
        """Bytes of a half slab."""
        return sum(each.nbytes for each in self.parameters) + sum(each.nbytes for each in self.planes)

    @functools.cached_property
    def packed_shape(self) -> tuple[int, int, int]:
        """Shape of the packed uint8 buffer."""
        return -(-self.N // SLAB_N), -(-self.K // SLAB_K), 2 * self.half_bytes

    def pack(self, codes: Array, params: dict[str, Array]) -> Array:
        """Packed uint8 slabs of a run of whole 64-column blocks.

        Args:
            codes: uint8 (K, n), the logical codes of n output columns; n is padded to 64 here.
            params: per name float32 (groups, n), exact in the scale dtype. Those that no slab holds are ignored.
        """
        xp = namespace(codes)
        n, (_, slabs_k, _) = codes.shape[1], self.packed_shape
        slabs_n = -(-n // SLAB_N)
        padded = xp.full((slabs_k * SLAB_K, slabs_n * SLAB_N), self.format.zero_code, dtype=xp.uint8)
        padded[: self.K, :n] = codes
        out = xp.empty((slabs_n, slabs_k, 2, self.half_bytes), dtype=xp.uint8)

        for plane in self.planes:
            halves, blocks, rows, g, t, units, words = plane.axes
            # K = slab, block, unit, atom of it, register bit 1, t, half of a register
            # N = slab, half slab, rows, register bit 0, g
            split = padded.reshape(slabs_k, blocks, units, -1, 2, t, 2, slabs_n, halves, rows, 2, g)
            of_code = split.transpose(3, 4, 10, 6, 0, 1, 2, 5, 7, 8, 9, 11)
            packed = xp.zeros((words, *of_code.shape[4:]), dtype=xp.uint32)
            for position, run in _positions(plane.plane):
                bits = (of_code[_axes_of(run.value)] >> run.first) & ((1 << run.width) - 1)
                packed[position // _WORD] |= bits.astype(xp.uint32) << (position % _WORD)
            stored = contiguous(packed.transpose(5, 1, 6, 2, 7, 8, 4, 3, 0))
            data = stored.view(xp.uint8).reshape(slabs_n, slabs_k, halves, -1)
            out[..., plane.start : plane.start + plane.nbytes] = data

        group_of = self._group_of_granule(xp)
        for place in self.parameters:
            rows_of = xp.zeros((group_of.shape[0], slabs_n * SLAB_N), dtype=xp.float32)
            rows_of[:, :n] = params[place.field.name][group_of]
            rows_of[self._is_padding(xp)] = 0
            bits = self.scale.to_bits(rows_of).reshape(slabs_k, SLAB_K // place.granule, slabs_n, 2, 2, 2, 8)
            pairs = contiguous(bits.transpose(2, 0, 3, 1, 4, 6, 5))
            data = pairs.view(xp.uint8).reshape(slabs_n, slabs_k, 2, place.nbytes)
            out[..., place.start : place.start + place.nbytes] = data
        return out.reshape(slabs_n, slabs_k, 2 * self.half_bytes)

    def unpack(self, packed: Array, n: int) -> tuple[Array, dict[str, Array]]:
        """Logical codes uint8 (K, n) and parameter bits (groups, n) of packed slabs: pack's exact inverse.

        Args:
            packed: uint8 (slabs_n, slabs_k, slab_bytes), whole 64-column blocks.
            n: logical number of columns in them.
        """
        xp = namespace(packed)
        slabs_n, slabs_k, _ = packed.shape
        halves = packed.reshape(slabs_n, slabs_k, 2, self.half_bytes)
        codes: Array = None
        for plane in self.planes:
            data = contiguous(halves[..., plane.start : plane.start + plane.nbytes])
            stored = data.view(xp.uint32).reshape(slabs_n, slabs_k, *plane.axes)
            words = contiguous(stored.transpose(8, 1, 3, 7, 6, 0, 2, 4, 5))  # the axes of of_code in pack
            runs: dict[int, Array] = {}
            for position, run in _positions(plane.plane):
                shifted = (words[position // _WORD] >> (position % _WORD)).astype(xp.uint8)
                bits = (shifted & ((1 << run.width) - 1)) << run.first
                runs[run.value] = bits | runs[run.value] if run.value in runs else bits
            # Code by code, by number: an array of numbers would be a constant in a JAX program.
            of_code = xp.stack([runs[value] for value in range(plane.codes)])
            of_code = of_code.reshape(-1, 2, 2, 2, *of_code.shape[1:])
            split = of_code.transpose(4, 5, 6, 0, 1, 7, 3, 8, 9, 10, 2, 11)
            part = split.reshape(slabs_k * SLAB_K, slabs_n * SLAB_N)[: self.K, :n]
            codes = part if codes is None else codes | part

        first_granule = xp.arange(self.groups) * (1 if self.group_size == -1 else self.group_size // self.granule)
        params: dict[str, Array] = {}
        for place in self.parameters:
            bits = self._stored(halves, place).reshape(slabs_n, slabs_k, 2, SLAB_K // place.granule, 2, 8, 2)
            rows_of = bits.transpose(1, 3, 0, 2, 4, 6, 5).reshape(-1, slabs_n * SLAB_N)
            params[place.field.name] = rows_of[first_granule, :n]
        return contiguous(codes), params

    def range_factors(self, packed: Array) -> Array:
        """float32 per output, padding included: the power of two that puts its largest scale into [2**14, 2**15).

        Kernels that multiply float16 weights by their scale use it to stay in the middle of float16's range.

        Args:
            packed: uint8 (slabs_n, slabs_k, slab_bytes).
        """
        xp = namespace(packed)
        slabs_n, slabs_k, _ = packed.shape
        place = next(each for each in self.parameters if each.field.name == SCALE)
        halves = packed.reshape(slabs_n, slabs_k, 2, self.half_bytes)
        scales = xp.abs(self.scale.from_bits(self._stored(halves, place)))
        largest = scales.reshape(slabs_n, slabs_k, 2, SLAB_K // place.granule, 2, 8, 2).max(axis=(1, 3))
        largest = largest.transpose(0, 1, 2, 4, 3).reshape(-1)  # half, 16 rows, row g or g + 8, g
        _, exponent = xp.frexp(largest)
        exponent = xp.where(largest <= xp.float32(self.scale.least), 15, exponent)  # it has none: 1
        return xp.ldexp(xp.float32(1), xp.clip(15 - exponent, -_MAX_EXPONENT, _MAX_EXPONENT)).astype(xp.float32)

    def cpp(self) -> str:
        """What C++ knows of a weight: ``struct Slab``, the types of its parameters, and constants of the format."""
        lines = [
            "struct Slab {",
            f"    static constexpr int granule = {self.granule};  // K per row of parameters",
            f"    static constexpr int half_bytes = {self.half_bytes}, slab_bytes = {2 * self.half_bytes};",
            "    // Byte offsets in a half slab; `rows` is 0 or 1, the 16-row block.",
        ]
        names = [place.field.name for place in self.parameters]
        if SCALE not in names:
            lines.append("    struct scale;  // there is none: it is one per output")
        for place in self.parameters:
            lines += [
                f"    struct {place.field.name} {{",
                f"        using Type = {place.field.scalar.cpp};",
                "        static __device__ constexpr int at(int k_granule, int rows) {",
                f"            return (({place.start // (2 * place.rows_bytes)} + k_granule) * 2 + rows) "
                f"* {place.rows_bytes};",
                "        }",
                "    };",
            ]
        for number, plane in enumerate(self.planes):
            lines += [
                f"    struct plane{number} {{",
                f"        static constexpr int number = {number}, bits = {plane.bits}, "
                f"load_bytes = {plane.load_bytes};",
                f"        static constexpr int load_atoms = {plane.load_atoms};  // of 16 K in a lane's load",
                "        static __device__ constexpr int at(int k_block, int rows) {",
                f"            return {plane.start} + (2 * k_block + rows) * {_LANES * plane.load_bytes};",
                "        }",
                "    };",
            ]
        lines += [
            f"    static constexpr int planes = {len(self.planes)};",
            f"    static constexpr bool has_scale = {str(SCALE in names).lower()};",
            "};",
            f"constexpr int ZERO_CODE = {self.format.zero_code}, LARGEST_VALUE = {self.format.largest_value};",
        ]
        if len(self.planes) == 1:
            lines.insert(-2, "    using plane1 = plane0;  // there is none")
        if self.format.table is not None:
            values = ", ".join(f"{value!r}f" for value in self.format.table)
            lines.append(f"__constant__ float FORMAT_TABLE[] = {{{values}}};")
        return "\n".join(lines)

    def _stored(self, halves: Array, place: ParameterLayout) -> Array:
        """The bits of a parameter as they lie in half slabs."""
        raw = contiguous(halves[..., place.start : place.start + place.nbytes])
        return raw.view(place.field.scalar.stored_as)

    def _group_of_granule(self, xp: Any) -> Array:
        """Group index of each granule of the padded K; granules beyond K repeat the last group."""
        granules = xp.arange(self.packed_shape[1] * (SLAB_K // self.granule))
        if self.group_size == -1:
            return granules * 0
        return xp.minimum(granules * self.granule // self.group_size, self.groups - 1)

    def _is_padding(self, xp: Any) -> Array:
        """Which granules lie wholly beyond K."""
        granules = xp.arange(self.packed_shape[1] * (SLAB_K // self.granule))
        return granules * self.granule >= self.K


def _positions(plane: Plane) -> Iterator[tuple[int, Bits]]:
    """Each run of bits of a unit with the position of its lowest bit."""
    position = 0
    for run in plane:
        yield position, run
        position += run.width


def _axes_of(value: int) -> tuple[int, int, int, int]:
    """Of a code of a unit: atom, register bit 1, register bit 0, half of a register."""
    return value // 8, value // 4 % 2, value // 2 % 2, value % 2
