"""JAX arrays on a GPU, eagerly: multiplied on XLA's stream, handed over without a copy."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import cupy
import numpy as np
import pytest
from cases import FORMATS, HALF, quantized
from gpu_arrays import activations, bits, to_jax, weights

import marlin_cupy as mc

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)


@every_format
@every_dtype
def test_jax_arrays_give_what_cupy_gives(jax: ModuleType, name: str, dtype: str) -> None:
    w = quantized(weights(1000, 300), name, 64)
    bias = activations(1, 300, dtype)[0]
    for M in (0, 1, 7, 33, 129):
        x = activations(M, 1000, dtype)
        y = mc.matmul(to_jax(jax, x), w, to_jax(jax, bias))
        assert isinstance(y, jax.Array)
        assert {device.platform for device in y.devices()} == {"gpu"}
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(bits(y), bits(mc.matmul(x, w, bias)), err_msg=f"M={M}")


@every_dtype
def test_the_operator_and_leading_axes(jax: ModuleType, dtype: str) -> None:
    w = mc.quantize(weights(333, 65), "int4", 64)
    x = activations(24, 333, dtype)
    y = to_jax(jax, x).reshape(2, 3, 4, 333) @ w
    assert y.shape == (2, 3, 4, 65)
    np.testing.assert_array_equal(bits(y).reshape(24, 65), bits(mc.matmul(x, w)))


def test_results_outlive_what_they_were_made_of(jax: ModuleType) -> None:
    """Each is computed from a JAX array that is gone, whose memory XLA may use again."""
    w = mc.quantize(weights(1000, 300), "int4", 64)
    x = to_jax(jax, activations(16, 1000, "float16"))
    expected = [bits(mc.matmul(x * scale, w)) for scale in (1, 2, 3)]
    results = [(index % 3, mc.matmul(x * (index % 3 + 1), w)) for index in range(60)]
    sums = [(index, y + 0) for index, y in results]
    del results
    for index, y in sums:
        np.testing.assert_array_equal(bits(y), expected[index])


def test_weights_in_jax_are_quantized_where_they_are(jax: ModuleType) -> None:
    w = mc.quantize(to_jax(jax, weights(333, 65)), "int4", 64)
    assert w.device.kind == "cuda"
    np.testing.assert_array_equal(w.packed.get(), mc.quantize(weights(333, 65), "int4", 64).packed.get())


def test_moving_to_jax_shares_memory(jax: ModuleType) -> None:
    w = mc.quantize(weights(333, 65))
    in_jax = w.to("jax")
    assert isinstance(in_jax.packed, jax.Array)
    assert in_jax.packed.unsafe_buffer_pointer() == in_jax.placed.pointer == w.placed.pointer
    x = activations(7, 333, "bfloat16")
    np.testing.assert_array_equal(bits(mc.matmul(x, in_jax)), bits(mc.matmul(x, w)))
    assert in_jax.to("cupy").placed.pointer == w.placed.pointer
    assert isinstance(in_jax.dequantize(), jax.Array)


REFUSALS: dict[str, tuple[Callable[[ModuleType, Any, Any], Any], type[Exception], list[str]]] = {
    "CPU x, GPU weight": (
        lambda j, x, w: mc.matmul(j.device_put(x, j.local_devices(backend="cpu")[0]), w),
        mc.DeviceError,
        ["cpu", "cuda:0", "w.to("],
    ),
    "GPU x, CPU weight": (lambda j, x, w: mc.matmul(x, w.to("cpu")), mc.DeviceError, ["cuda:0", "cpu", "w.to("]),
    "out": (lambda j, x, w: mc.matmul(x, w, out=x[:, :65]), TypeError, ["out", "jax", "immutable"]),
    "float32": (lambda j, x, w: mc.matmul(x.astype("float32"), w), ValueError, ["float32", "float16 or bfloat16"]),
    "K": (lambda j, x, w: mc.matmul(x[:, 1:], w), ValueError, ["(7, 332)", "K=333"]),
    "bias in cupy": (lambda j, x, w: mc.matmul(x, w, cupy.zeros(65, cupy.float16)), TypeError, ["cupy", "jax"]),
    "update": (lambda j, x, w: w.to("jax").update_(weights(333, 65)), TypeError, ["update_", "jax", "immutable"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arrays_never_reach_the_gpu(jax: ModuleType, case: str) -> None:
    call, error, fragments = REFUSALS[case]
    w = mc.quantize(weights(333, 65))
    x = to_jax(jax, activations(7, 333, "float16"))
    with pytest.raises(error) as caught:
        call(jax, x, w)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert message.endswith(".")
    assert np.isfinite(np.asarray(mc.matmul(x, w))).all()  # and the GPU still works
