"""WHERE a code sits: one packed layout for every kernel, architecture and batch size.

Weights are the row operand of the tensor core, so a fragment is 16 outputs (N) by 16 inputs (K)::

    packed buffer  uint8 (ceil(N / 64), ceil(K / 128), slab_bytes)

    slab           64 N x 128 K, contiguous:  [ half: N 0-31 ][ half: N 32-63 ]
    half           32 N x 128 K:              [ parameters ][ codes ]
    parameters     per name, per granule of K, per 16 N:  8 x (value of row g, value of row g + 8), 16 bits each
    codes          512-byte blocks [K block][16-row block]; a block gives each of 32 lanes 16 bytes:
                   16 N x 64 K of 4-bit codes, 16 N x 32 K of 8-bit codes
    lane           its A-fragment values of consecutive 16x16 atoms; lane = 4 * g + t owns rows g and g + 8,
                   columns 2t, 2t + 1, 2t + 8, 2t + 9 (mma.m16n8k16, and wgmma.m64k16 warp by warp)

Why: one 16-byte shared-memory load per lane and block, free of bank conflicts; a stage of a pipeline is one
contiguous copy with its scales aboard; a copy can take 32 or 64 rows; slicing the first axis splits output
columns, slicing the second splits K, and both leave complete slabs.

A *granule* is gcd(group_size, 128): the parameters of a group are repeated for each granule, so that any
multiple of 16 is a group size and a slab needs nothing outside itself. Padding has scale 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from marlin_cupy.device import contiguous, namespace
from marlin_cupy.formats import Format
from marlin_cupy.formats.scalars import from_bits, to_bits

Array = Any  # a NumPy or CuPy array, or a JAX array for unpack

SLAB_N = 64
SLAB_K = 128
HALF_N = 32
_LANE_BYTES = 16
_BLOCK_BYTES = 32 * _LANE_BYTES
_MAX_EXPONENT = 100  # of a range factor: it and its inverse stay normal numbers


@dataclass(frozen=True)
class Layout:
    """Sizes and places for one format, group size and logical shape (K, N)."""

    format: Format
    K: int
    N: int
    group_size: int  # -1: one group that is K long
    scale_dtype: str

    @property
    def granule(self) -> int:
        """K per stored row of parameters: 16, 32, 64 or 128."""
        return SLAB_K if self.group_size == -1 else math.gcd(self.group_size, SLAB_K)

    @property
    def groups(self) -> int:
        """Number of groups along K; the last may be short."""
        return 1 if self.group_size == -1 else -(-self.K // self.group_size)

    @property
    def param_bytes(self) -> int:
        """Bytes of parameters in a half slab."""
        return len(self.format.params) * (SLAB_K // self.granule) * HALF_N * 2

    @property
    def half_bytes(self) -> int:
        """Bytes of a half slab."""
        return self.param_bytes + HALF_N * SLAB_K * self.format.bits // 8

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """Shape of the packed uint8 buffer."""
        return -(-self.N // SLAB_N), -(-self.K // SLAB_K), 2 * self.half_bytes

    @property
    def _atoms_per_block(self) -> int:
        return 16 // self.format.bits

    @property
    def _code_axes(self) -> tuple[int, ...]:
        """Axes of one slab's codes as stored: half, K block, 16-row block, g, t, atom, value."""
        atoms = self._atoms_per_block
        return 2, SLAB_K // (16 * atoms), 2, 8, 4, atoms, 8

    def pack(self, codes: Array, params: dict[str, Array]) -> Array:
        """Packed uint8 slabs of a run of whole 64-column blocks.

        Args:
            codes: uint8 (K, n), the logical codes of n output columns; n is padded to 64 here.
            params: per name float32 (groups, n), exact in the scale dtype.
        """
        xp = namespace(codes)
        n, (_, slabs_k, _) = codes.shape[1], self.packed_shape
        slabs_n = -(-n // SLAB_N)
        padded = xp.full((slabs_k * SLAB_K, slabs_n * SLAB_N), self.format.zero_code, dtype=xp.uint8)
        padded[: self.K, :n] = codes

        _, blocks, rows, g, t, atoms, _ = self._code_axes
        # K = slab, block, atom, register bit 1, t, half of a register;  N = slab, half slab, rows, register bit 0, g
        split = padded.reshape(slabs_k, blocks, atoms, 2, t, 2, slabs_n, 2, rows, 2, g)
        stored = split.transpose(6, 0, 7, 1, 8, 10, 4, 2, 3, 9, 5)
        words = self._bytes_of(stored.reshape(slabs_n, slabs_k, 2, -1, 8))

        out = xp.empty((slabs_n, slabs_k, 2, self.half_bytes), dtype=xp.uint8)
        out[..., self.param_bytes :] = words.reshape(slabs_n, slabs_k, 2, -1)
        group_of = self._group_of_granule(xp)
        for index, name in enumerate(self.format.params):
            rows_of = xp.zeros((group_of.shape[0], slabs_n * SLAB_N), dtype=xp.float32)
            rows_of[:, :n] = params[name][group_of]
            rows_of[self._is_padding(xp)] = 0
            bits = to_bits(rows_of, self.scale_dtype)
            bits = bits.reshape(slabs_k, SLAB_K // self.granule, slabs_n, 2, rows, 2, g)
            pairs = contiguous(bits.transpose(2, 0, 3, 1, 4, 6, 5))
            size = self.param_bytes // len(self.format.params)
            out[..., index * size : (index + 1) * size] = pairs.view(xp.uint8).reshape(slabs_n, slabs_k, 2, size)
        return out.reshape(slabs_n, slabs_k, 2 * self.half_bytes)

    def unpack(self, packed: Array, n: int) -> tuple[Array, dict[str, Array]]:
        """Logical codes uint8 (K, n) and parameter bits uint16 (groups, n) of packed slabs: pack's exact inverse.

        Args:
            packed: uint8 (slabs_n, slabs_k, slab_bytes), whole 64-column blocks.
            n: logical number of columns in them.
        """
        xp = namespace(packed)
        slabs_n, slabs_k, _ = packed.shape
        halves = packed.reshape(slabs_n, slabs_k, 2, self.half_bytes)
        _, blocks, rows, g, t, atoms, _ = self._code_axes
        words = self._codes_of(contiguous(halves[..., self.param_bytes :]))
        stored = words.reshape(slabs_n, slabs_k, 2, blocks, rows, g, t, atoms, 2, 2, 2)
        split = stored.transpose(1, 3, 7, 8, 6, 10, 0, 2, 4, 9, 5)
        codes = split.reshape(slabs_k * SLAB_K, slabs_n * SLAB_N)[: self.K, :n]

        first_granule = xp.arange(self.groups) * (1 if self.group_size == -1 else self.group_size // self.granule)
        params: dict[str, Array] = {}
        size = self.param_bytes // len(self.format.params)
        for index, name in enumerate(self.format.params):
            raw = contiguous(halves[..., index * size : (index + 1) * size])
            bits = raw.view(xp.uint16).reshape(slabs_n, slabs_k, 2, SLAB_K // self.granule, rows, g, 2)
            rows_of = bits.transpose(1, 3, 0, 2, 4, 6, 5).reshape(-1, slabs_n * SLAB_N)
            params[name] = rows_of[first_granule, :n]
        return contiguous(codes), params

    def range_factors(self, packed: Array) -> Array:
        """float32 per output, padding included: the power of two that puts its largest scale into [2**14, 2**15).

        Kernels that multiply float16 weights by their scale use it to stay in the middle of float16's range.

        Args:
            packed: uint8 (slabs_n, slabs_k, slab_bytes).
        """
        xp = namespace(packed)
        slabs_n, slabs_k, _ = packed.shape
        size = self.param_bytes // len(self.format.params)  # the scales come first
        raw = contiguous(packed.reshape(slabs_n, slabs_k, 2, self.half_bytes)[..., :size])
        magnitudes = (raw.view(xp.uint16) & 0x7FFF).reshape(slabs_n, slabs_k, 2, SLAB_K // self.granule, 2, 8, 2)
        largest = magnitudes.max(axis=(1, 3)).transpose(0, 1, 2, 4, 3).reshape(-1)  # half, 16 rows, row g or g + 8, g
        _, exponent = xp.frexp(from_bits(contiguous(largest), self.scale_dtype))
        exponent = xp.where(largest == 0, 15, exponent)
        return xp.ldexp(xp.float32(1), xp.clip(15 - exponent, -_MAX_EXPONENT, _MAX_EXPONENT)).astype(xp.float32)

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

    def _bytes_of(self, values: Array) -> Array:
        """Codes (..., 8) in fragment order -> bytes of words (..., bits)."""
        xp = namespace(values)
        ordered = values[..., xp.asarray(self.format.order)]
        if self.format.bits == 8:
            return ordered
        return ordered[..., 0::2] | (ordered[..., 1::2] << 4)

    def _codes_of(self, data: Array) -> Array:
        """Bytes of words -> codes (..., 8) in fragment order: the inverse of :meth:`_bytes_of`."""
        xp = namespace(data)
        if self.format.bits == 4:
            data = xp.stack([data & 15, data >> 4], axis=-1)
        words = data.reshape(-1, 8)  # columns by number, since an array of them would be a constant in a JAX program
        return xp.stack([words[:, self.format.order.index(value)] for value in range(8)], axis=-1)
