"""QuantizedTensor on the CPU: made from any array library, unpacked, updated, saved and loaded."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from cases import DTYPES, FORMATS, HALF, gaussian, rows, ways
from only_dlpack import OnlyDlpack

import marlin_cupy as mc
from marlin_cupy import formats, packing
from marlin_cupy.device import CPU

every_format = pytest.mark.parametrize("name", FORMATS)


def every_group(*group_sizes: int) -> pytest.MarkDecorator:
    """(name, group_size): every format with those of the sizes that it has."""
    return pytest.mark.parametrize(("name", "group_size"), dict.fromkeys(way[:2] for way in ways(*group_sizes)))


def jax_on_cpu(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def assert_same_weight(found: mc.QuantizedTensor, expected: mc.QuantizedTensor) -> None:
    assert found.spec == expected.spec
    np.testing.assert_array_equal(np.asarray(found.packed), np.asarray(expected.packed))
    if formats.get(expected.format).has_output_scales(expected.group_size):
        np.testing.assert_array_equal(np.asarray(found.unpack().scales), np.asarray(expected.unpack().scales))


# ---- quantize and dequantize


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_takes_every_dtype_and_library(name: str, dtype: str) -> None:
    weight = gaussian(200, 70, seed=1, dtype=dtype)
    w = mc.quantize(weight, name)
    assert w.shape == (200, 70)
    assert w.format == name
    assert w.group_size == formats.get(name).default_group_size
    assert w.scale_dtype == FORMATS[name].scale(w.group_size, dtype)
    assert w.device == CPU
    assert isinstance(w.packed, np.ndarray)
    assert_same_weight(mc.quantize(jax_on_cpu(weight), name), w)
    if dtype != "bfloat16":  # NumPy's DLPack has no bfloat16
        assert_same_weight(mc.quantize(OnlyDlpack(weight), name), w)


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_takes_any_strides(name: str, dtype: str) -> None:
    weight = gaussian(200, 70, seed=2, dtype=dtype)
    group_size = FORMATS[name].group(64)
    expected = mc.quantize(weight, name, group_size)
    transposed = np.ascontiguousarray(weight.T)  # as PyTorch's Linear holds it
    wide = np.zeros((400, 210), weight.dtype)
    wide[::2, ::3] = weight
    for strided in (transposed.T, np.asfortranarray(weight), wide[::2, ::3], weight[::-1].copy()[::-1]):
        assert_same_weight(mc.quantize(strided, name, group_size), expected)


def test_quantize_leaves_the_weight_alone() -> None:
    weight = gaussian(100, 65, seed=3)
    kept = weight.copy()
    weight.setflags(write=False)
    mc.quantize(weight, "uint4", search="mse")
    np.testing.assert_array_equal(weight, kept)


def test_a_subclass_of_an_array_type_is_an_array() -> None:
    class Named(np.ndarray):
        pass

    weight = gaussian(100, 65, seed=4)
    w = mc.quantize(weight.view(Named))
    assert_same_weight(w, mc.quantize(weight))
    x = rows((3, 100), 5, "float16")
    np.testing.assert_array_equal(np.asarray(mc.matmul(x.view(Named), w)), mc.matmul(x, w))


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(64, -1))
def test_the_scale_dtype_can_be_chosen(name: str, group_size: int, scale_dtype: str) -> None:
    weight = gaussian(128, 64, seed=6, dtype="float16")
    w = mc.quantize(weight, name, group_size, scale_dtype=scale_dtype)
    assert w.scale_dtype == scale_dtype
    assert w.unpack().scales.dtype == DTYPES.get(scale_dtype, np.uint8)  # 8-bit scales are bits


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if not row.only_groups])
def test_groups_longer_than_the_weight_are_one_group(name: str) -> None:
    weight = gaussian(100, 65, seed=7)
    one_group = mc.quantize(weight, name, -1)
    for group_size in (112, 128, 4096, 16 << 40):
        w = mc.quantize(weight, name, group_size, scale_dtype=one_group.scale_dtype)
        assert w.unpack().scales.shape == (1, 65)
        np.testing.assert_array_equal(w.dequantize("float32"), one_group.dequantize("float32"))


@every_format
def test_dequantize_rounds_once_to_any_dtype(name: str) -> None:
    w = mc.quantize(gaussian(200, 70, seed=8, dtype="bfloat16"), name, FORMATS[name].group(48))
    exact = w.dequantize("float32")
    assert exact.dtype == np.float32
    assert exact.shape == (200, 70)
    for dtype in HALF:
        rounded = w.dequantize(dtype)
        assert rounded.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(rounded, exact.astype(DTYPES[dtype]))
        np.testing.assert_array_equal(mc.dequantize(w, dtype), rounded)
    assert w.dequantize().dtype == DTYPES["bfloat16"]  # that of the scales


@every_format
def test_the_search_brings_the_weight_closer(name: str) -> None:
    weight = gaussian(512, 64, seed=9)
    error = {
        search: np.linalg.norm(
            mc.quantize(weight, name, FORMATS[name].group(128), search=search).dequantize("float32") - weight
        )
        for search in ("absmax", "mse")
    }
    assert error["mse"] <= error["absmax"]


# ---- unpack and pack


@pytest.mark.parametrize(("name", "group_size", "scale_dtype"), ways(-1, 48, 128))
def test_pack_inverts_unpack(name: str, group_size: int, scale_dtype: str) -> None:
    w = mc.quantize(gaussian(200, 70, seed=10), name, group_size, scale_dtype=scale_dtype)
    codes, scales, zero_points = w.unpack()
    assert codes.dtype == np.uint8
    assert codes.shape == (200, 70)
    assert scales.shape == (1 if group_size == -1 else -(-200 // group_size), 70)
    again = mc.pack(codes, scales, zero_points, format=name, group_size=group_size)
    assert_same_weight(again, w)
    np.testing.assert_array_equal(again.dequantize("float32"), w.dequantize("float32"))


@pytest.mark.parametrize("convert", [np.asarray, jax_on_cpu], ids=["numpy", "jax"])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_codes_and_scales_come_as_floats_of_8_bits_too(group_size: int, convert: Any) -> None:
    """As checkpoints hold them."""
    w = mc.quantize(gaussian(200, 70, seed=10), "fp8_e4m3", group_size)
    codes, scales, _ = w.unpack()
    floats = convert(codes.view(ml_dtypes.float8_e4m3fn))
    again = mc.pack(floats, convert(scales), format="fp8_e4m3", group_size=group_size)
    assert_same_weight(again, w)
    np.testing.assert_array_equal(again.dequantize("float32"), w.dequantize("float32"))

    w = mc.quantize(gaussian(200, 70, seed=10), "mxfp4")
    codes, scales, _ = w.unpack()
    exponents = convert(scales.view(ml_dtypes.float8_e8m0fnu))
    assert_same_weight(mc.pack(convert(codes), exponents, format="mxfp4", group_size=32), w)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32, np.float16])
def test_zero_points_come_in_any_numeric_dtype(dtype: type) -> None:
    w = mc.quantize(gaussian(200, 70, seed=11), "uint4", 64)
    codes, scales, zero_points = w.unpack()
    assert zero_points is not None
    again = mc.pack(codes, scales, zero_points.astype(dtype), format="uint4", group_size=64)
    assert_same_weight(again, w)


def test_codes_mean_what_the_docstrings_say() -> None:
    """Integers: code less the middle or the zero point, times scale; nf4: QLoRA's table; floats: e2m1 and e4m3."""
    codes = np.arange(16, dtype=np.uint8)[:, None]
    scales = np.full((1, 1), 0.5, np.float16)
    k = np.arange(16, dtype=np.float32)[:, None]

    def values(format: str, zero_points: Any = None) -> np.ndarray:
        return mc.pack(codes, scales, zero_points, format=format, group_size=16).dequantize("float32")

    np.testing.assert_array_equal(values("int4"), (k - 8) / 2)
    np.testing.assert_array_equal(values("int8"), (k - 128) / 2)
    np.testing.assert_array_equal(values("uint4", np.full((1, 1), 3)), (k - 3) / 2)
    np.testing.assert_array_equal(values("nf4")[[0, 7, 15], 0], [-0.5, 0, 0.5])
    few = np.arange(8, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(
        mc.pack(few, scales, format="int3", group_size=16).dequantize("float32"), (np.arange(8)[:, None] - 4) / 2
    )
    np.testing.assert_array_equal(
        mc.pack(few[:4], scales, format="int2", group_size=16).dequantize("float32"), (np.arange(4)[:, None] - 2) / 2
    )
    half = np.full((1, 1), 126, np.uint8)  # 2**-1
    floats = mc.pack(codes, half, format="mxfp4", group_size=32).dequantize("float32")[:, 0]
    magnitudes = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 2
    np.testing.assert_array_equal(floats, [*magnitudes, *-magnitudes])
    bytes_of = np.asarray([[0x00, 0x01, 0x38, 0x7E, 0xB8]], np.uint8).T
    floats = mc.pack(bytes_of, scales, format="fp8_e4m3", group_size=16).dequantize("float32")[:, 0]
    np.testing.assert_array_equal(floats, [0, 2.0**-10, 0.5, 224, -0.5])


# ---- the description


@every_format
def test_nbytes_and_repr(name: str) -> None:
    group_size = FORMATS[name].group(64)
    w = mc.quantize(gaussian(200, 70, seed=12), name, group_size)
    assert w.nbytes == w.packed.nbytes
    for part in (name, "K=200", "N=70", f"group_size={group_size}", w.scale_dtype, "cpu", str(w.nbytes)):
        assert part in repr(w)


def test_a_tensor_can_be_made_of_a_spec_and_a_buffer() -> None:
    w = mc.quantize(gaussian(200, 70, seed=13))
    again = mc.QuantizedTensor(w.spec, w.packed)
    assert again.packed is w.packed
    assert_same_weight(again, w)


# ---- to


def test_moving_to_numpy_shares_memory_and_to_jax_keeps_the_contents() -> None:
    w = mc.quantize(gaussian(200, 70, seed=14))
    assert w.to("numpy").packed is w.packed
    assert np.shares_memory(w.to("cpu").packed, w.packed)
    in_jax = w.to("jax")
    assert isinstance(in_jax.packed, jax.Array)
    assert_same_weight(in_jax, w)
    assert_same_weight(in_jax.to("numpy"), w)
    assert isinstance(in_jax.dequantize(), jax.Array)
    x = rows((3, 200), 15, "float16")
    np.testing.assert_array_equal(mc.matmul(x, in_jax), mc.matmul(x, w))


def test_what_is_handed_over_once_is_handed_over_again_after_a_write() -> None:
    w = mc.quantize(gaussian(200, 70, seed=14))
    handed = w.in_hands_of("jax")
    assert isinstance(handed.packed, jax.Array)
    assert w.in_hands_of("jax") is handed
    w.update_(gaussian(200, 70, seed=15))
    assert_same_weight(w.in_hands_of("jax"), w)
    handed = w.in_hands_of("jax")
    w.mark_written()
    assert w.in_hands_of("jax") is not handed


def test_a_weight_is_a_tree_of_named_arrays() -> None:
    w = mc.quantize(gaussian(200, 70, seed=14))
    assert list(w.parts) == list(w.spec.parts) == ["packed", "output_scales"]
    again = mc.QuantizedTensor.of_tree(w.whole, w.tree.values())
    assert again.packed is w.packed
    assert_same_weight(again, w)
    with pytest.raises(TypeError, match="of int4 weights there are packed, output_scales"):
        mc.QuantizedTensor(w.spec, w.packed, permutation=w.packed)
    with pytest.raises(ValueError, match=r"output_scales is float32\(3,\); .* needs float32\(128,\)"):
        mc.QuantizedTensor(w.spec, w.packed, output_scales=np.ones(3, np.float32))


@every_format
def test_copies_and_pickles_are_the_same_weight(name: str) -> None:
    w = mc.quantize(gaussian(200, 70, seed=14), name)
    for same in (w.to("numpy"), w.to("cpu"), w.to("jax").to("numpy"), copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert_same_weight(same, w)
        np.testing.assert_array_equal(same.dequantize("float32"), w.dequantize("float32"))


# ---- update_


@every_group(-1, 64)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_update_writes_into_the_same_memory(name: str, group_size: int, search: str) -> None:
    size = group_size
    w = mc.quantize(gaussian(200, 70, seed=16), name, size)
    address = w.packed.ctypes.data
    other = gaussian(200, 70, seed=17)
    assert w.update_(other, search) is w
    assert w.packed.ctypes.data == address
    assert_same_weight(w, mc.quantize(other, name, size, search=search))
    half = other.astype(np.float16)
    w.update_(jax_on_cpu(half))
    assert_same_weight(w, mc.quantize(half, name, size, scale_dtype=w.scale_dtype))


def test_update_accepts_what_load_returns(tmp_path: Path) -> None:
    mc.quantize(gaussian(200, 70, seed=18)).save(tmp_path / "w")
    other = gaussian(200, 70, seed=19)
    assert_same_weight(mc.load(tmp_path / "w").update_(other), mc.quantize(other))


def bad_updates() -> dict[str, np.ndarray]:
    weight = gaussian(200, 700, seed=20)
    late_nan, infinite, too_large = weight.copy(), weight.copy(), weight.copy()
    late_nan[199, 699] = np.nan
    infinite[0, 690] = np.inf
    too_large[5, 699] = 1e38
    return {
        "NaN in the last column": late_nan,
        "infinity": infinite,
        "beyond the scale dtype": too_large,
        "shape": weight[:-1],
        "rank": weight[None],
        "dtype": weight.astype(np.float64),
    }


@pytest.mark.parametrize("reason", bad_updates())
def test_a_refused_update_changes_nothing(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = mc.quantize(gaussian(200, 700, seed=21))
    before = w.packed.copy()
    monkeypatch.setitem(packing._BLOCK_WEIGHTS, "cpu", 64 * 200)  # many blocks: the bad value is in the last
    with pytest.raises(ValueError):
        w.update_(bad_updates()[reason])
    with pytest.raises(ValueError, match="search"):
        w.update_(gaussian(200, 700, seed=22), "best")
    np.testing.assert_array_equal(w.packed, before)


# ---- memory


@every_format
def test_blocks_cover_the_columns_within_the_memory_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    K, N = 200, 330
    group_size = FORMATS[name].group(48)
    whole = mc.quantize(gaussian(K, N, seed=23), name, group_size)
    expected = whole.dequantize("float32")
    bound = 2 * 64 * K
    monkeypatch.setitem(packing._BLOCK_WEIGHTS, "cpu", bound)
    blocks = list(whole.blocks())
    assert [columns for columns, _ in blocks] == [slice(0, 128), slice(128, 256), slice(256, 330)]
    for columns, values in blocks:
        assert values.size <= bound
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[:, columns])
    np.testing.assert_array_equal(whole.dequantize("float32"), expected)
    assert_same_weight(mc.quantize(gaussian(K, N, seed=23), name, group_size), whole)  # quantized block by block
    x = rows((7, K), 24, "float16")
    in_blocks = mc.matmul(x, whole)
    monkeypatch.undo()
    np.testing.assert_allclose(in_blocks.astype(np.float32), mc.matmul(x, whole).astype(np.float32), rtol=2e-3)


def test_no_whole_float32_copy_of_the_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    K, N = 1024, 4096
    monkeypatch.setitem(packing._BLOCK_WEIGHTS, "cpu", K * 64)
    weight = np.ones((K, N), np.float16)
    x = np.ones((2, K), np.float16)

    def peak(work: Any) -> int:
        tracemalloc.start()
        kept = work()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept is not None
        return size

    whole_copy = 4 * K * N
    assert peak(lambda: mc.quantize(weight)) < whole_copy / 3  # the packed weight itself is an eighth
    w = mc.quantize(weight)
    assert peak(lambda: mc.matmul(x, w)) < whole_copy / 4
    assert peak(lambda: w.dequantize("float16")) < whole_copy * 3 / 4  # the result itself is a half


# ---- save and load


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weight.safetensors"
    mc.quantize(gaussian(40, 20, seed=25), "uint4", 16).save(path)
    return path


@every_group(-1, 48, 128)
def test_a_saved_weight_loads_bit_for_bit(name: str, group_size: int, tmp_path: Path) -> None:
    w = mc.quantize(gaussian(200, 70, seed=26, dtype="bfloat16"), name, group_size)
    path = tmp_path / "weight with spaces"
    w.save(path)
    assert_same_weight(mc.load(path), w)
    assert_same_weight(mc.load(str(path), device="cpu"), w)
    assert os.listdir(tmp_path) == [path.name]


@every_group(-1, 64, 256)
def test_a_part_of_a_file(name: str, group_size: int, tmp_path: Path) -> None:
    w = mc.quantize(gaussian(600, 200, seed=26), name, group_size)
    w.save(tmp_path / "w")
    for run in (slice(None), slice(256), slice(256, 512), slice(512, None)):
        for columns in (slice(None), slice(0, 64), slice(64, 192), slice(128, 200, 1)):
            k, n = range(600)[run], range(200)[columns]
            found = mc.load(tmp_path / "w", rows=run, columns=columns)
            assert_same_weight(found, w.rows(k[0], k[-1] + 1).columns(n[0], n[-1] + 1))


def test_of_a_part_nothing_else_is_read(saved: Path) -> None:
    mc.quantize(gaussian(256, 128, seed=27), "uint4", 64).save(saved)
    first, data = mc.load(saved, columns=slice(64)), bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(mc.FileFormatError, match="checksum"):
        mc.load(saved, rows=slice(256), columns=slice(0, 128))
    assert_same_weight(mc.load(saved, columns=slice(64)), first)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"rows": slice(8)}, r"rows 0 to 8 of 40 were asked for; .* multiples of 128, and 40 for the end"),
        ({"columns": slice(0, 64)}, r"columns 0 to 64 of 20 were asked for"),
        ({"columns": slice(5, None)}, r"columns 5 to 20 of 20 were asked for"),
        ({"rows": slice(-1, None)}, r"rows -1 to 40 of 40 were asked for"),
        ({"rows": slice(None, None, 2)}, r"rows 0 to 40 by 2 of 40 were asked for"),
    ],
)
def test_parts_that_cannot_be_cut(saved: Path, part: dict[str, slice], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mc.load(saved, **part)


def test_saving_replaces_a_file(saved: Path) -> None:
    other = mc.quantize(gaussian(100, 65, seed=27))
    other.save(saved)
    assert_same_weight(mc.load(saved), other)
    other.to("jax").save(saved)
    assert_same_weight(mc.load(saved), other)


def test_any_tool_can_read_the_file(saved: Path) -> None:
    tensors = safetensors.numpy.load_file(saved)
    assert list(tensors) == ["packed"]
    assert tensors["packed"].dtype == np.uint8


def test_truncated_files_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for size in sorted({0, 1, 7, 8, 9, len(data) - 1, *range(0, len(data), 41)}):
        saved.write_bytes(data[:size])
        with pytest.raises(mc.FileFormatError, match=saved.name):
            mc.load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(mc.FileFormatError, match=saved.name):
        mc.load(saved)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_flipped_bits_are_noticed(saved: Path, flip: int) -> None:
    data = saved.read_bytes()
    start_of_data = 8 + struct.unpack("<Q", data[:8])[0]
    for place in [*range(start_of_data), *range(start_of_data, len(data), 37), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= flip
        saved.write_bytes(damaged)
        with pytest.raises(mc.FileFormatError, match=saved.name):
            mc.load(saved)


def rewritten(path: Path, changes: dict[str, Any]) -> None:
    """Change the description in a file, as an editor would: the checksum stays."""
    with safetensors.safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["marlin_cupy"])
        packed = file.get_tensor("packed")
    description |= changes
    description = {key: value for key, value in description.items() if value is not None}
    safetensors.numpy.save_file({"packed": packed}, path, metadata={"marlin_cupy": json.dumps(description)})


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({}, None),
        ({"shape": [40, 21]}, ["checksum"]),
        ({"shape": [20, 40]}, ["checksum"]),
        ({"shape": [400, 20]}, ["shape"]),
        ({"shape": [40]}, []),
        ({"shape": [40, 20, 1]}, []),
        ({"shape": [0, 20]}, ["shape"]),
        ({"shape": [-40, 20]}, ["shape"]),
        ({"shape": [10**30, 20]}, ["shape"]),
        ({"shape": [float("inf"), 20]}, []),
        ({"shape": "40"}, []),
        ({"shape": None}, ["shape"]),
        ({"format": "int5"}, ["int5", "int4"]),
        ({"format": "int4"}, ["shape"]),
        ({"format": None}, ["format"]),
        ({"group_size": 15}, ["15"]),
        ({"group_size": 32}, ["shape|checksum"]),
        ({"scale_dtype": "bfloat16"}, ["checksum"]),
        ({"scale_dtype": "float32"}, ["float32"]),
        ({"version": 2}, ["version 2", "upgrade"]),
        ({"version": 10**20}, ["version", "upgrade"]),
        ({"version": 0}, ["checksum"]),
        ({"version": float("inf")}, []),
        ({"version": "new"}, ["metadata"]),
        ({"version": None}, ["metadata", "version"]),
        ({"sha256": "0" * 64}, ["checksum"]),
        ({"sha256": None}, ["checksum"]),
        ({"extra": 1}, ["checksum"]),
    ],
    ids=str,
)
def test_an_edited_description_is_refused(saved: Path, changes: dict[str, Any], fragments: list[str] | None) -> None:
    rewritten(saved, changes)
    if fragments is None:  # the edit that changes nothing shows that the others are refused for their change
        mc.load(saved)
        return
    with pytest.raises(mc.FileFormatError) as caught:
        mc.load(saved)
    for fragment in [saved.name, *fragments]:
        assert any(part in str(caught.value) for part in fragment.split("|"))


@pytest.mark.parametrize("contents", ["", "[1, 2]", "{", "null", '"x"', "{}"])
def test_a_description_that_is_none_is_refused(saved: Path, contents: str) -> None:
    safetensors.numpy.save_file({"packed": np.zeros(4, np.uint8)}, saved, metadata={"marlin_cupy": contents})
    with pytest.raises(mc.FileFormatError, match=r"metadata.*\.$"):
        mc.load(saved)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    safetensors.numpy.save_file({"weight": np.zeros((4, 4), np.float32)}, path)
    with pytest.raises(mc.FileFormatError, match="no marlin_cupy weight"):
        mc.load(path)
    safetensors.numpy.save_file({"packed": np.zeros((1, 1, 4224), np.uint8)}, path)
    with pytest.raises(mc.FileFormatError, match="no marlin_cupy weight"):
        mc.load(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "I64", "BOOL"])
def test_a_packed_tensor_of_another_dtype_is_refused(saved: Path, dtype: str) -> None:
    data = saved.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    size = {"BF16": 2, "I64": 8}.get(dtype, 1)
    header["packed"]["dtype"] = dtype
    header["packed"]["shape"][-1] //= size
    text = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(mc.FileFormatError, match=saved.name):
        mc.load(saved)


def test_files_that_are_not_there_or_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mc.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        mc.load(tmp_path)  # a folder
    for contents in (b"", b"hello", bytes(100), b"\xff" * 100, b"PK\x03\x04" + bytes(50)):
        (tmp_path / "other").write_bytes(contents)
        with pytest.raises(mc.FileFormatError, match="other"):
            mc.load(tmp_path / "other")


def test_saving_into_a_missing_folder_leaves_nothing(tmp_path: Path) -> None:
    w = mc.quantize(gaussian(40, 20, seed=28))
    with pytest.raises(FileNotFoundError, match=r"missing does not exist\.$"):
        w.save(tmp_path / "missing" / "weight")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = saved.read_bytes()

    def disk_full(tensors: Any, path: Any, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        mc.quantize(gaussian(40, 20, seed=29)).save(saved)
    assert saved.read_bytes() == kept
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_over_a_folder_fails_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        mc.quantize(gaussian(40, 20, seed=30)).save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == []


# ---- shards


@every_group(-1, 16, 96, 128, 384)
def test_cut_weights_are_the_cut_matrix(name: str, group_size: int) -> None:
    w = mc.quantize(gaussian(900, 200, seed=1), name, group_size)
    dense = w.dequantize("float32")
    for start, stop in ((0, 64), (64, 200), (128, 192), (0, 200)):
        part = w.columns(start, stop)
        np.testing.assert_array_equal(part.dequantize("float32"), dense[:, start:stop])
        np.testing.assert_array_equal(part.packed, w.packed[start // 64 : -(-stop // 64)])
        assert not np.shares_memory(part.packed, w.packed)
    for start, stop in ((0, 384), (384, 768), (384, 900), (768, 900)):
        part = w.rows(start, stop)
        assert part.shape == (stop - start, 200)
        np.testing.assert_array_equal(part.dequantize("float32"), dense[start:stop])
        assert not np.shares_memory(part.packed, w.packed)


def test_shards_make_up_the_weight() -> None:
    w = mc.quantize(gaussian(768, 384, seed=1), "int4", 192)
    dense = w.dequantize("float32")
    for count in (1, 2, 3, 6):
        parts = [w.shard(1, index, count) for index in range(count)]
        np.testing.assert_array_equal(np.hstack([part.dequantize("float32") for part in parts]), dense)
    for count in (1, 2):
        parts = [w.shard(0, index, count) for index in range(count)]
        np.testing.assert_array_equal(np.vstack([part.dequantize("float32") for part in parts]), dense)


@pytest.mark.parametrize(
    ("cut", "fragments"),
    [
        (lambda w: w.shard(1, 0, 4), ["N=384", "4 equal parts", "multiples of 64", "into 1, 2, 3, 6 it can"]),
        (lambda w: w.shard(0, 0, 3), ["K=768", "3 equal parts", "multiples of 384", "into 1, 2 it can"]),
        (lambda w: w.shard(2, 0, 1), ["axis is 2", "0 cuts K"]),
        (lambda w: w.shard(0, 2, 2), ["index is 2", "count - 1"]),
        (lambda w: w.shard(0, 0, 0), ["index is 0 of 0 parts"]),
        (lambda w: w.rows(128, 768), ["rows 128 to 768 of 768", "multiples of 384"]),
        (lambda w: w.rows(384, 384), ["rows 384 to 384"]),
        (lambda w: w.columns(0, 65), ["columns 0 to 65 of 384", "blocks of 64", "384 for the end"]),
        (lambda w: w.columns(-64, 64), ["columns -64 to 64"]),
        (lambda w: w.columns(320, 448), ["columns 320 to 448"]),
    ],
)
def test_cuts_through_a_slab_or_a_group_are_refused(cut: Any, fragments: list[str]) -> None:
    w = mc.quantize(gaussian(768, 384, seed=1), "int4", 192)
    with pytest.raises(ValueError) as caught:
        cut(w)
    for fragment in fragments:
        assert fragment in str(caught.value)
