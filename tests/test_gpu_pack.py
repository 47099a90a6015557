"""Quantize, pack, save and update on a GPU: the same bits as on the CPU, quickly and within twice the memory."""

from __future__ import annotations

from pathlib import Path

import cupy
import numpy as np
import pytest
from cases import DTYPES, FORMATS, GROUP_SIZES, HALF, gaussian, quantized
from gpu_arrays import activations, assert_same_bits, to_gpu, to_host

import marlin_cupy as mc
from marlin_cupy import formats, packing
from marlin_cupy.device import Device
from marlin_cupy.formats import ZERO_POINT

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("name", FORMATS)


def assert_same_weight(on_gpu: mc.QuantizedTensor, on_cpu: mc.QuantizedTensor) -> None:
    assert on_gpu.spec == on_cpu.spec
    assert on_gpu.device == Device("cuda", 0)
    np.testing.assert_array_equal(on_gpu.packed.get(), on_cpu.packed)


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_gives_the_bits_of_the_cpu(name: str, dtype: str) -> None:
    """Every step is one correctly rounded float32 operation on both."""
    for K, N in ((1, 1), (127, 61), (333, 65), (384, 192)):
        weight = gaussian(K, N, seed=K, dtype=dtype)
        for group_size in GROUP_SIZES:
            for scale_dtype in HALF:
                on_cpu = quantized(weight, name, group_size, scale_dtype)
                assert_same_weight(quantized(to_gpu(weight), name, group_size, scale_dtype), on_cpu)
        transposed = to_gpu(np.ascontiguousarray(weight.T)).T
        assert_same_weight(quantized(transposed, name, 64), quantized(weight, name, 64))
        assert_same_weight(quantized(weight, name, 64, device="cuda"), quantized(weight, name, 64))


@every_format
def test_the_search_is_as_good_as_on_the_cpu(name: str) -> None:
    """Squared errors are summed in another order, so that near ties may fall the other way."""
    weight = gaussian(512, 192, seed=1)
    errors = [
        float(np.linalg.norm(np.asarray(found) - weight))
        for found in (
            quantized(weight, name, 64, search="mse").dequantize("float32"),
            quantized(to_gpu(weight), name, 64, search="mse").dequantize("float32").get(),
        )
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)


@every_format
@pytest.mark.parametrize("scale_dtype", HALF)
@pytest.mark.parametrize("group_size", [-1, 48, 128])
def test_pack_unpack_and_dequantize_give_the_bits_of_the_cpu(name: str, scale_dtype: str, group_size: int) -> None:
    on_cpu = quantized(gaussian(333, 65, seed=2), name, group_size, scale_dtype)
    on_gpu = on_cpu.to("cuda")
    assert_same_weight(on_gpu, on_cpu)
    assert_same_weight(mc.pack(*on_gpu.unpack(), format=name, group_size=on_cpu.group_size), on_cpu)
    for found, expected in zip(on_gpu.unpack(), on_cpu.unpack(), strict=True):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_array_equal(to_host(found).view(np.uint8), expected.view(np.uint8))
    assert (on_gpu.unpack().zero_points is not None) == (ZERO_POINT in formats.get(name).params)
    for dtype in DTYPES:
        found, expected = to_host(on_gpu.dequantize(dtype)), on_cpu.dequantize(dtype)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@every_format
def test_files_do_not_depend_on_the_device(name: str, tmp_path: Path) -> None:
    on_cpu = quantized(gaussian(333, 65, seed=3), name, 48)
    on_cpu.save(tmp_path / "cpu")
    on_cpu.to("cuda").save(tmp_path / "gpu")
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "gpu").read_bytes()
    for device in ("cuda", "cuda:0", Device("cuda", 0)):
        assert_same_weight(mc.load(tmp_path / "cpu", device=device), on_cpu)
    back = mc.load(tmp_path / "gpu")
    np.testing.assert_array_equal(back.packed, on_cpu.packed)


def test_moving_to_where_it_is_shares_memory() -> None:
    on_gpu = mc.quantize(gaussian(333, 65, seed=4), device="cuda")
    assert isinstance(on_gpu.packed, cupy.ndarray)
    assert on_gpu.placed.pointer == on_gpu.packed.data.ptr
    assert on_gpu.to("cuda").placed.pointer == on_gpu.to("cupy").placed.pointer == on_gpu.placed.pointer
    on_cpu = on_gpu.to("cpu")
    assert isinstance(on_cpu.packed, np.ndarray)
    assert isinstance(on_gpu.to("numpy").packed, np.ndarray)
    assert_same_weight(on_gpu, on_cpu)
    assert_same_weight(on_cpu.to("cupy"), on_cpu)
    assert "cuda:0" in repr(on_gpu)


@every_format
def test_update_keeps_the_pointer_and_changes_the_product(name: str) -> None:
    w = quantized(to_gpu(gaussian(4160, 513, seed=5)), name, 64)
    pointer = w.placed.pointer
    x = activations(7, 4160, "float16")
    mc.matmul(x, w)
    other = gaussian(4160, 513, seed=6)
    assert w.update_(to_gpu(other)) is w
    assert w.placed.pointer == w.packed.data.ptr == pointer
    assert_same_weight(w, quantized(other, name, 64))
    assert_same_bits(mc.matmul(x, w), mc.matmul(x, quantized(to_gpu(other), name, 64)))


def test_a_refused_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = mc.quantize(to_gpu(gaussian(200, 700, seed=7)))
    before = w.packed.copy()
    monkeypatch.setitem(packing._BLOCK_WEIGHTS, "cuda", 64 * 200)
    for value in (np.nan, np.inf, 1e38):
        bad = gaussian(200, 700, seed=8)
        bad[199, 699] = value
        with pytest.raises(ValueError, match=r"NaN or infinity|beyond float16"):
            w.update_(to_gpu(bad))
    with pytest.raises(mc.DeviceError, match=r"cpu.*cuda:0"):
        w.update_(gaussian(200, 700, seed=8))
    assert bool((w.packed == before).all())


def test_pack_refuses_arrays_on_two_devices() -> None:
    codes, scales, _ = mc.quantize(gaussian(100, 64, seed=9)).unpack()
    with pytest.raises(mc.DeviceError, match=r"codes: cuda:0.*scale: cpu"):
        mc.pack(to_gpu(codes), scales, group_size=128)


@every_format
def test_a_large_weight_packs_within_twice_its_memory(name: str) -> None:
    K, N = 8192, 57344
    pool = cupy.get_default_memory_pool()
    mc.quantize(activations(512, 640, "float16"), name)  # CuPy compiles its kernels
    weight = cupy.empty((K, N), cupy.float16)
    strip = to_gpu(gaussian(512, N, seed=10, dtype="float16"))
    for start in range(0, K, 512):
        weight[start : start + 512] = cupy.roll(strip, start, axis=1)
    cupy.cuda.Device().synchronize()
    del strip
    pool.free_all_blocks()
    used_before = pool.total_bytes()
    others = used_before - weight.nbytes  # what earlier tests still hold
    w = mc.quantize(weight, name)
    cupy.cuda.Device().synchronize()
    peak = pool.total_bytes() - others  # the pool keeps what it has had
    assert peak <= 2 * weight.nbytes, f"{peak / weight.nbytes:.2f} times the weight"

    columns = slice(N - 100, N)
    alone = mc.quantize(cupy.ascontiguousarray(weight[:, columns]), name)
    assert_same_bits(w.dequantize("float16")[:, columns], alone.dequantize("float16"))
    del weight, w
    pool.free_all_blocks()
