"""Where codes sit: exact round trips, and the documented place of every byte, which saved files depend on."""

from __future__ import annotations

import hashlib
import math

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, FORMATS, GROUP_SIZES, HALF, SHAPES, gaussian
from hypothesis import given
from hypothesis import strategies as st

import marlin_cupy as mc
from marlin_cupy import formats
from marlin_cupy.formats import SCALE, ZERO_POINT, Format
from marlin_cupy.spec import Spec

every_format = pytest.mark.parametrize("name", FORMATS)


def groups_of(K: int, group_size: int) -> int:
    return 1 if group_size == -1 else math.ceil(K / group_size)


def arithmetic_weight(format: Format, K: int, N: int, group_size: int, scale_dtype: str) -> mc.Unpacked:
    """Codes and parameters from integer arithmetic alone: the same in every version of everything."""
    k, n = np.arange(K)[:, None], np.arange(N)[None, :]
    g = np.arange(groups_of(K, group_size))[:, None]
    codes = ((7 * k + 13 * n + k * n % 11) % (format.max_code + 1)).astype(np.uint8)
    scales = ((1 + (5 * g + 3 * n) % 97) / 128).astype(DTYPES[scale_dtype])
    points = ((3 * g + 7 * n) % (format.max_code + 1)).astype(DTYPES[scale_dtype])
    return mc.Unpacked(codes, scales, points if ZERO_POINT in format.params else None)


def random_weight(format: Format, K: int, N: int, group_size: int, scale_dtype: str, seed: int) -> mc.Unpacked:
    rng = np.random.default_rng(seed)
    shape = groups_of(K, group_size), N
    codes = rng.integers(0, format.max_code + 1, (K, N), dtype=np.uint8)
    scales = rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[scale_dtype])
    points = rng.integers(0, format.max_code + 1, shape).astype(DTYPES[scale_dtype])
    return mc.Unpacked(codes, scales, points if ZERO_POINT in format.params else None)


def pack(format: Format, weight: mc.Unpacked, group_size: int) -> mc.QuantizedTensor:
    return mc.pack(*weight, format=format.name, group_size=group_size)


def assert_same(found: mc.Unpacked, expected: mc.Unpacked) -> None:
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=name)  # bits, so that -0 counts


def slow_pack(format: Format, weight: mc.Unpacked, group_size: int) -> np.ndarray:
    """The packed buffer, byte by byte, as the docstring of marlin_cupy/layout.py draws it and as PTX defines fragments.

    mma.m16n8k16, matrix A, lane 4 g + t: registers 0 to 3 hold (row g, columns 2t, 2t + 1), (row g + 8, same columns),
    (row g, columns 2t + 8, 2t + 9), (row g + 8, columns 2t + 8, 2t + 9).
    """
    codes, scales, points = weight
    K, N = codes.shape
    bits = format.bits
    granule = 128 if group_size == -1 else math.gcd(group_size, 128)
    granules = 128 // granule
    parameters = [scales] if points is None else [scales, points]
    parameter_bytes = len(parameters) * granules * 32 * 2
    half_bytes = parameter_bytes + 32 * 128 * bits // 8
    slabs_n, slabs_k = math.ceil(N / 64), math.ceil(K / 128)
    packed = np.zeros((slabs_n, slabs_k, 2, half_bytes), dtype=np.uint8)

    for n in range(64 * slabs_n):
        slab_n, half, row_block, row = n // 64, n % 64 // 32, n % 32 // 16, n % 16
        g, lower = row % 8, row // 8
        for k in range(128 * slabs_k):
            slab_k, atom, column = k // 128, k % 128 // 16, k % 16
            right, t, odd = column // 8, column % 8 // 2, column % 2
            value = 2 * (lower + 2 * right) + odd  # 2 * register + half
            position = format.order.index(value)
            lane = 4 * g + t
            atoms_per_block = 64 // 16 if bits == 4 else 32 // 16
            word = 512 * (2 * (atom // atoms_per_block) + row_block) + 16 * lane + atom % atoms_per_block * bits
            code = int(codes[k, n]) if k < K and n < N else format.zero_code
            byte, shift = divmod(position * bits, 8)
            packed[slab_n, slab_k, half, parameter_bytes + word + byte] |= code << shift
        for index, values in enumerate(parameters):
            for granule_index in range(granules * slabs_k):
                k = granule_index * granule
                slab_k, in_slab = divmod(granule_index, granules)
                place = ((index * granules + in_slab) * 2 + row_block) * 32 + g * 4 + lower * 2
                if k < K and n < N:
                    stored = values[0 if group_size == -1 else k // group_size, n]
                    packed[slab_n, slab_k, half, place : place + 2] = np.frombuffer(stored.tobytes(), np.uint8)
    return packed.reshape(slabs_n, slabs_k, 2 * half_bytes)


@every_format
@pytest.mark.parametrize(
    ("K", "N", "group_size", "scale_dtype"),
    [
        (1, 1, -1, "float16"),
        (200, 70, 48, "bfloat16"),
        (130, 33, 128, "float16"),
        (128, 64, 16, "float16"),
        (300, 65, 64, "bfloat16"),
        (257, 20, 256, "float16"),
    ],
)
def test_every_byte_is_where_the_layout_says(name: str, K: int, N: int, group_size: int, scale_dtype: str) -> None:
    format = formats.get(name)
    weight = random_weight(format, K, N, group_size, scale_dtype, seed=K + N)
    found = pack(format, weight, group_size).packed
    np.testing.assert_array_equal(found, slow_pack(format, weight, group_size))


@every_format
def test_the_packed_bytes_never_change(name: str) -> None:
    digest = hashlib.sha256()
    format = formats.get(name)
    for K, N, group_size, scale_dtype in (
        (200, 70, 48, "float16"),
        (384, 64, 128, "bfloat16"),
        (100, 130, -1, "float16"),
    ):
        weight = arithmetic_weight(format, K, N, group_size, scale_dtype)
        digest.update(pack(format, weight, group_size).packed.tobytes())
    assert digest.hexdigest() == FORMATS[name].packed_sha256


@every_format
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts_pack(name: str, group_size: int, shape: tuple[int, int]) -> None:
    format = formats.get(name)
    scale_dtype = HALF[(shape[0] + group_size) % 2]
    weight = random_weight(format, *shape, group_size, scale_dtype, seed=shape[0])
    w = pack(format, weight, group_size)
    assert_same(w.unpack(), weight)
    assert w.packed.shape == w.layout.packed_shape
    assert w.packed.shape[:2] == (math.ceil(shape[1] / 64), math.ceil(shape[0] / 128))
    assert w.nbytes == w.packed.nbytes


@given(
    name=st.sampled_from(sorted(FORMATS)),
    K=st.integers(1, 520),
    N=st.integers(1, 200),
    group_size=st.sampled_from(GROUP_SIZES) | st.integers(1, 60).map(lambda n: 16 * n),
    scale_dtype=st.sampled_from(HALF),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_inverts_pack_for_any_shape(
    name: str, K: int, N: int, group_size: int, scale_dtype: str, seed: int
) -> None:
    format = formats.get(name)
    weight = random_weight(format, K, N, group_size, scale_dtype, seed)
    assert_same(pack(format, weight, group_size).unpack(), weight)


@every_format
def test_strided_codes_and_parameters_are_packed_alike(name: str) -> None:
    format = formats.get(name)
    weight = random_weight(format, 130, 70, 64, "float16", seed=1)
    strided = mc.Unpacked(*(None if part is None else np.asfortranarray(part) for part in weight))
    np.testing.assert_array_equal(pack(format, strided, 64).packed, pack(format, weight, 64).packed)
    reversed_twice = mc.Unpacked(*(None if part is None else part[::-1].copy()[::-1] for part in weight))
    np.testing.assert_array_equal(pack(format, reversed_twice, 64).packed, pack(format, weight, 64).packed)


@every_format
@pytest.mark.parametrize("group_size", [-1, 48, 128])
def test_a_slice_of_the_first_axis_holds_output_columns(name: str, group_size: int) -> None:
    """Tensor parallelism by columns is plain slicing: slabs a to b are columns 64 a to 64 b, complete."""
    K, N = 300, 300
    weight = gaussian(K, N, seed=2)
    whole = mc.quantize(weight, name, group_size)
    for first, last in [(0, 2), (2, 4), (3, 5)]:
        columns = slice(64 * first, min(64 * last, N))
        spec = Spec(name, (K, columns.stop - columns.start), group_size, whole.scale_dtype)
        shard = mc.QuantizedTensor(spec, whole.packed[first:last])
        np.testing.assert_array_equal(shard.dequantize("float32"), whole.dequantize("float32")[:, columns])
        x = gaussian(3, K, seed=3, dtype="float16")
        alone = mc.quantize(weight[:, columns], name, group_size)
        np.testing.assert_array_equal(mc.matmul(x, shard), mc.matmul(x, alone))


@every_format
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_a_slice_of_the_second_axis_holds_a_part_of_k(name: str, group_size: int) -> None:
    """Groups that divide a slab stay whole, so that slabs a to b are rows 128 a to 128 b of the matrix."""
    K, N = 500, 70
    whole = mc.quantize(gaussian(K, N, seed=4), name, group_size)
    for first, last in [(0, 1), (1, 3), (2, 4)]:
        part = slice(128 * first, min(128 * last, K))
        spec = Spec(name, (part.stop - part.start, N), group_size, whole.scale_dtype)
        shard = mc.QuantizedTensor(spec, np.ascontiguousarray(whole.packed[:, first:last]))
        np.testing.assert_array_equal(shard.dequantize("float32"), whole.dequantize("float32")[part])


@every_format
@pytest.mark.parametrize("group_size", [16, 128])
def test_padding_has_scale_zero_and_the_code_for_zero(name: str, group_size: int) -> None:
    format = formats.get(name)
    K, N = 160, 70
    w = pack(format, random_weight(format, K, N, group_size, "float16", seed=5), group_size)
    padded_shape = 128 * w.packed.shape[1], 64 * w.packed.shape[0]
    padded = mc.QuantizedTensor(Spec(name, padded_shape, group_size, "float16"), w.packed).unpack()
    padding_k = math.ceil(K / group_size)
    assert not padded.scales[padding_k:].view(np.uint16).any()
    assert not padded.scales[:, N:].view(np.uint16).any()
    assert padded.scales[:padding_k, :N].all()
    assert (padded.codes[K:] == format.zero_code).all()
    assert (padded.codes[:, N:] == format.zero_code).all()


@every_format
@pytest.mark.parametrize("scale_dtype", HALF)
@pytest.mark.parametrize("group_size", [16, 48, 128, -1])
def test_range_factors_put_the_largest_scale_of_each_output_below_2_to_the_15(
    name: str, scale_dtype: str, group_size: int
) -> None:
    """Powers of two; 1 for outputs without a scale. Negative and subnormal scales count by their magnitude."""
    format = formats.get(name)
    K, N = 400, 70
    given = random_weight(format, K, N, group_size, scale_dtype, seed=6)
    scales = given.scales.astype(np.float32) * np.float32(2.0) ** (np.arange(N) % 23 - 20)
    scales[:, 1::3] *= -1
    scales[:, 5] = 0
    scales = scales.astype(DTYPES[scale_dtype])
    w = pack(format, given._replace(scales=scales), group_size)
    factors = w.layout.range_factors(w.packed)
    assert factors.dtype == np.float32
    assert factors.shape == (128,)
    assert (np.frexp(factors)[0] == 0.5).all()
    largest = np.abs(scales.astype(np.float32)).max(axis=0)
    reached = largest * factors[:N]
    assert ((reached >= 2.0**14) & (reached < 2.0**15))[largest > 0].all()
    assert (factors[:N][largest == 0] == 1).all()
    assert (factors[N:] == 1).all()


@every_format
def test_the_storage_overhead_is_the_scales(name: str) -> None:
    """A weight of whole slabs takes bits / 8 bytes per value and 2 per parameter, nothing else."""
    format = formats.get(name)
    w = mc.quantize(np.zeros((1024, 512), ml_dtypes.bfloat16), name, 128)
    assert w.nbytes == 1024 * 512 * format.bits // 8 + len(format.params) * 8 * 512 * 2


def test_an_order_has_to_be_a_permutation() -> None:
    good = formats.get("int4")
    assert good.params == (SCALE,)
    for changes in ({"order": (0,) * 8}, {"order": (0, 1, 2)}, {"bits": 3}):
        fields = {"bits": 4, "order": good.order} | changes
        bad = type(good)(name="bad", default_group_size=128, source="none", **fields)
        with pytest.raises(ValueError, match=r"'bad' needs 4 or 8 bits and an order that is a permutation"):
            formats.register(bad)
    assert "bad" not in formats.names()
