"""Where codes sit: exact round trips, and the documented place of every byte, which saved files depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, FORMATS, GROUP_SIZES, SHAPES, gaussian, ways
from hypothesis import given
from hypothesis import strategies as st

import marlin_cupy as mc
from marlin_cupy import formats, scalars
from marlin_cupy.formats import ZERO_POINT, Format, Plane
from marlin_cupy.spec import Spec

every_format = pytest.mark.parametrize("name", FORMATS)


def groups_of(K: int, group_size: int) -> int:
    return 1 if group_size == -1 else math.ceil(K / group_size)


def arithmetic_weight(format: Format, K: int, N: int, group_size: int, scale_dtype: str) -> mc.Unpacked:
    """Codes and parameters from integer arithmetic alone: the same in every version of everything."""
    k, n = np.arange(K)[:, None], np.arange(N)[None, :]
    g = np.arange(groups_of(K, group_size))[:, None]
    codes = ((7 * k + 13 * n + k * n % 11) % (format.max_code + 1)).astype(np.uint8)
    codes -= np.isin(codes, FORMATS[format.name].no_codes)
    scales = 1 + (5 * g + 3 * n) % 97
    scales = scales.astype(np.uint8) if scale_dtype == "float8_e8m0fnu" else (scales / 128).astype(DTYPES[scale_dtype])
    if ZERO_POINT not in format.params:
        return mc.Unpacked(codes, scales, None)
    return mc.Unpacked(codes, scales, ((3 * g + 7 * n) % (format.max_code + 1)).astype(DTYPES[scale_dtype]))


def random_weight(format: Format, K: int, N: int, group_size: int, scale_dtype: str, seed: int) -> mc.Unpacked:
    rng = np.random.default_rng(seed)
    shape = groups_of(K, group_size), N
    codes = rng.integers(0, format.max_code + 1, (K, N), dtype=np.uint8)
    codes -= np.isin(codes, FORMATS[format.name].no_codes)
    if scale_dtype == "float8_e8m0fnu":
        return mc.Unpacked(codes, rng.integers(1, 255, shape, dtype=np.uint8), None)
    scales = rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[scale_dtype])
    if ZERO_POINT not in format.params:
        return mc.Unpacked(codes, scales, None)
    return mc.Unpacked(codes, scales, rng.integers(0, format.max_code + 1, shape).astype(DTYPES[scale_dtype]))


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
    granule = 128 if group_size == -1 else math.gcd(group_size, 128)
    granules = 128 // granule
    parameters = [each for each in (scales, points) if each is not None]
    if format.has_output_scales(group_size):
        parameters = []
    parameter_bytes = [granules * 32 * each.itemsize for each in parameters]
    plane_starts, start = [], sum(parameter_bytes)
    for plane in format.planes:
        plane_starts.append(start)
        start += 32 * 128 * bits_per_code(plane) // 8
    assert start == sum(parameter_bytes) + 32 * 128 * format.bits // 8
    slabs_n, slabs_k = math.ceil(N / 64), math.ceil(K / 128)
    packed = np.zeros((slabs_n, slabs_k, 2, start), dtype=np.uint8)

    for n in range(64 * slabs_n):
        slab_n, half, row_block, row = n // 64, n % 64 // 32, n % 32 // 16, n % 16
        g, lower = row % 8, row // 8
        for k in range(128 * slabs_k):
            slab_k, atom, column = k // 128, k % 128 // 16, k % 16
            right, t, odd = column // 8, column % 8 // 2, column % 2
            value = 2 * (lower + 2 * right) + odd  # 2 * register + half
            lane = 4 * g + t
            code = int(codes[k, n]) if k < K and n < N else format.zero_code
            into = packed[slab_n, slab_k, half]
            for first_byte, plane in zip(plane_starts, format.planes, strict=True):
                bits = bits_per_code(plane)
                lane_bytes = 16 if 128 * bits // 16 >= 16 else 8  # 8 codes of each of 8 atoms, or of fewer
                atoms_of_block = lane_bytes // bits
                atoms_of_unit = len({run.value for run in plane}) // 8
                block, atom_in_block = divmod(atom, atoms_of_block)
                unit, atom_in_unit = divmod(atom_in_block, atoms_of_unit)
                byte = first_byte + (2 * block + row_block) * 32 * lane_bytes + lane * lane_bytes
                byte += unit * atoms_of_unit * bits
                position = 0  # in the unit: bytes of a word begin with its lowest bits
                for run in plane:
                    for bit in range(run.first, run.first + run.width):
                        if run.value == 8 * atom_in_unit + value:
                            into[byte + position // 8] |= (code >> bit & 1) << position % 8
                        position += 1
        for index, values in enumerate(parameters):
            size = values.itemsize
            for granule_index in range(granules * slabs_k):
                k = granule_index * granule
                slab_k, in_slab = divmod(granule_index, granules)
                place = sum(parameter_bytes[:index]) + ((in_slab * 2 + row_block) * 16 + 2 * g + lower) * size
                if k < K and n < N:
                    stored = values[0 if group_size == -1 else k // group_size, n]
                    packed[slab_n, slab_k, half, place : place + size] = np.frombuffer(stored.tobytes(), np.uint8)
    return packed.reshape(slabs_n, slabs_k, -1)


def bits_per_code(plane: Plane) -> int:
    """How many bits of a code are in it."""
    return sum(run.width for run in plane) // len({run.value for run in plane})


@pytest.mark.parametrize(
    ("name", "K", "N", "group_size", "scale_dtype"),
    dict.fromkeys(
        (name, K, N, row.group(group_size), row.scale(row.group(group_size), scale_dtype))
        for name, row in FORMATS.items()
        for K, N, group_size, scale_dtype in (
            (1, 1, -1, "float16"),
            (200, 70, 48, "bfloat16"),
            (130, 33, 128, "float16"),
            (128, 64, 16, "float16"),
            (300, 65, 64, "bfloat16"),
            (257, 20, 256, "float16"),
            (140, 40, 32, "float32"),
        )
    ),
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
    shapes = (200, 70), (384, 64), (100, 130)
    for (K, N), (group_size, scale_dtype) in zip(shapes, FORMATS[name].packed_as, strict=True):
        weight = arithmetic_weight(format, K, N, group_size, scale_dtype)
        digest.update(pack(format, weight, group_size).packed.tobytes())
    assert digest.hexdigest() == FORMATS[name].packed_sha256


@pytest.mark.parametrize(("name", "group_size"), dict.fromkeys(way[:2] for way in ways(*GROUP_SIZES)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts_pack(name: str, group_size: int, shape: tuple[int, int]) -> None:
    format = formats.get(name)
    scale_dtypes = FORMATS[name].scales(group_size)
    scale_dtype = scale_dtypes[(shape[0] + group_size) % len(scale_dtypes)]
    weight = random_weight(format, *shape, group_size, scale_dtype, seed=shape[0])
    w = pack(format, weight, group_size)
    assert_same(w.unpack(), weight)
    assert w.packed.shape == w.layout.packed_shape
    assert w.packed.shape[:2] == (math.ceil(shape[1] / 64), math.ceil(shape[0] / 128))
    assert w.nbytes == sum(w.placed.native[name].nbytes for name, part in w.spec.parts.items() if not part.derived)


@given(data=st.data(), K=st.integers(1, 520), N=st.integers(1, 200), seed=st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack_for_any_shape(data: st.DataObject, K: int, N: int, seed: int) -> None:
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    row = FORMATS[name]
    group_size = row.group(data.draw(st.sampled_from(GROUP_SIZES) | st.integers(1, 60).map(lambda n: 16 * n)))
    scale_dtype = data.draw(st.sampled_from(row.scales(group_size)))
    weight = random_weight(formats.get(name), K, N, group_size, scale_dtype, seed)
    assert_same(pack(formats.get(name), weight, group_size).unpack(), weight)


@every_format
def test_strided_codes_and_parameters_are_packed_alike(name: str) -> None:
    format, row = formats.get(name), FORMATS[name]
    group_size = row.group(64)
    weight = random_weight(format, 130, 70, group_size, row.scale(group_size, "float16"), seed=1)
    packed = pack(format, weight, group_size).packed
    strided = mc.Unpacked(*(None if part is None else np.asfortranarray(part) for part in weight))
    np.testing.assert_array_equal(pack(format, strided, group_size).packed, packed)
    reversed_twice = mc.Unpacked(*(None if part is None else part[::-1].copy()[::-1] for part in weight))
    np.testing.assert_array_equal(pack(format, reversed_twice, group_size).packed, packed)


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(16, 48, 128, -1))
def test_jax_unpacks_to_the_same_bits(name: str, group_size: int, scale_dtype: str) -> None:
    """Programs of JAX do."""
    w = pack(formats.get(name), random_weight(formats.get(name), 200, 70, group_size, scale_dtype, 7), group_size)
    codes, params = w.layout.unpack(w.packed, 70)
    in_jax, params_in_jax = w.layout.unpack(jnp.asarray(w.packed), 70)
    np.testing.assert_array_equal(np.asarray(in_jax), codes)
    assert list(params_in_jax) == list(params)
    for key, bits in params.items():
        np.testing.assert_array_equal(np.asarray(params_in_jax[key]), bits)


@pytest.mark.parametrize(("name", "group_size"), dict.fromkeys(way[:2] for way in ways(-1, 48, 128)))
def test_a_slice_of_the_first_axis_holds_output_columns(name: str, group_size: int) -> None:
    """Tensor parallelism by columns is plain slicing: slabs a to b are columns 64 a to 64 b, complete."""
    K, N = 300, 300
    weight = gaussian(K, N, seed=2)
    whole = mc.quantize(weight, name, group_size)
    for first, last in [(0, 2), (2, 4), (3, 5)]:
        columns = slice(64 * first, min(64 * last, N))
        alone = mc.quantize(weight[:, columns], name, group_size)
        spec = dataclasses.replace(whole.spec, shape=(K, columns.stop - columns.start))
        assert spec == alone.spec
        np.testing.assert_array_equal(whole.packed[first:last], alone.packed)


@pytest.mark.parametrize(("name", "group_size"), dict.fromkeys(way[:2] for way in ways(16, 32, 64, 128)))
def test_a_slice_of_the_second_axis_holds_a_part_of_k(name: str, group_size: int) -> None:
    """Groups that divide a slab stay whole, so that slabs a to b are rows 128 a to 128 b of the matrix."""
    K, N = 500, 70
    whole = mc.quantize(gaussian(K, N, seed=4), name, group_size)
    for first, last in [(0, 1), (1, 3), (2, 4)]:
        part = slice(128 * first, min(128 * last, K))
        spec = Spec(name, (part.stop - part.start, N), group_size, whole.scale_dtype)
        shard = mc.QuantizedTensor(spec, np.ascontiguousarray(whole.packed[:, first:last]))
        np.testing.assert_array_equal(shard.dequantize("float32"), whole.dequantize("float32")[part])


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(16, 128))
def test_padding_has_scale_zero_and_the_code_for_zero(name: str, group_size: int, scale_dtype: str) -> None:
    format = formats.get(name)
    K, N = 160, 70
    w = pack(format, random_weight(format, K, N, group_size, scale_dtype, seed=5), group_size)
    padded_shape = 128 * w.packed.shape[1], 64 * w.packed.shape[0]
    padded = mc.QuantizedTensor(Spec(name, padded_shape, group_size, scale_dtype), w.packed).unpack()
    bits = padded.scales.view(scalars.by_name(scale_dtype).stored_as)
    padding_k = math.ceil(K / group_size)
    assert not bits[padding_k:].any()
    assert not bits[:, N:].any()
    assert bits[:padding_k, :N].all()
    assert (padded.codes[K:] == format.zero_code).all()
    assert (padded.codes[:, N:] == format.zero_code).all()


@pytest.mark.parametrize(
    ("name", "group_size", "scale_dtype"),
    [way for way in ways(16, 48, 128, -1) if way[1] not in FORMATS[way[0]].output_scales],
)
def test_range_factors_put_the_largest_scale_of_each_output_below_2_to_the_15(
    name: str, group_size: int, scale_dtype: str
) -> None:
    """Powers of two; 1 for outputs without a scale. Negative and subnormal scales count by their magnitude."""
    format, scalar = formats.get(name), scalars.by_name(scale_dtype)
    K, N = 400, 70
    given = random_weight(format, K, N, group_size, scale_dtype, seed=6)
    if scalar == scalars.E8M0:
        scales = np.random.default_rng(6).integers(40, 200, given.scales.shape).astype(np.uint8)  # within 2**100
        scales[:, 5] = 0
    else:
        values = given.scales.astype(np.float32) * np.float32(2.0) ** (np.arange(N) % 23 - 20)
        values[:, 1::3] *= -1
        values[:, 5] = 0
        scales = values.astype(DTYPES[scale_dtype])
    w = pack(format, given._replace(scales=scales), group_size)
    factors = w.layout.range_factors(w.packed)
    np.testing.assert_array_equal(np.asarray(w.layout.range_factors(jnp.asarray(w.packed))), factors)
    assert factors.dtype == np.float32
    assert factors.shape == (128,)
    assert (np.frexp(factors)[0] == 0.5).all()
    largest = np.abs(scalar.from_bits(scales.view(scalar.stored_as))).max(axis=0)
    reached = largest * factors[:N]
    assert ((reached >= 2.0**14) & (reached < 2.0**15))[largest > scalar.least].all()
    assert (factors[:N][largest == scalar.least] == 1).all()
    assert factors[5] == 1
    assert (factors[N:] == 1).all()


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(128, 32, -1))
def test_the_storage_overhead_is_the_scales(name: str, group_size: int, scale_dtype: str) -> None:
    """A weight of whole slabs takes bits / 8 bytes per value, and what its parameters take, nothing else."""
    format, row = formats.get(name), FORMATS[name]
    w = mc.quantize(np.zeros((1024, 512), ml_dtypes.bfloat16), name, group_size, scale_dtype=scale_dtype)
    stored = 0 if group_size in row.output_scales else len(format.params)
    per_column = 1024 // (128 if group_size == -1 else group_size) * scalars.by_name(scale_dtype).bits // 8
    assert w.packed.nbytes == 1024 * 512 * format.bits // 8 + stored * per_column * 512
    assert w.layout.packed_shape == w.packed.shape


# ---- what C++ is told


@every_format
def test_cpp_prints_the_places_that_packing_uses(name: str) -> None:
    format, row = formats.get(name), FORMATS[name]
    for group_size in row.groups(-1, 32, 48, 128):
        layout = Spec(name, (256, 128), group_size, row.scales(group_size)[0]).layout
        printed = layout.cpp()
        assert f"granule = {layout.granule};" in printed
        assert f"half_bytes = {layout.half_bytes}, slab_bytes = {layout.packed_shape[2]};" in printed
        assert printed.count("struct plane") == len(format.planes)
        assert f"planes = {len(format.planes)};" in printed
        assert f"ZERO_CODE = {format.zero_code}, LARGEST_VALUE = {format.largest_value};" in printed
        assert ("FORMAT_TABLE" in printed) == (format.table is not None)
        for param in format.params:
            assert (f"struct {param} {{" in printed) == (group_size not in row.output_scales)
        assert printed.count("{") == printed.count("}")
