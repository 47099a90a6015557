"""Every refusal: the type of the error, and a sentence that says what was given and what works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import FORMATS, gaussian, rows
from only_dlpack import OnlyDlpack

import marlin_cupy as mc
from marlin_cupy import device, formats, frameworks, packing
from marlin_cupy.device import Device
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.spec import Spec

K, N = 100, 63
WEIGHT = gaussian(K, N, seed=1)
W = mc.quantize(WEIGHT, "int4", 64)
UINT4 = mc.quantize(WEIGHT, "uint4", 64)
CODES, SCALES, _ = W.unpack()
POINTS = UINT4.unpack().zero_points
X = rows((3, K), seed=2, dtype="float16")
BIAS = rows((N,), seed=3, dtype="float16")
HALF_WEIGHT = WEIGHT.astype(np.float16)
#: A GPU that no machine has.
NO_GPU = "cuda:99"


def changed(array: np.ndarray, value: Any, place: tuple[int, ...] = (-1, -1)) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def in_jax(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


class OnAnotherDevice:
    """Memory that is neither the host's nor a CUDA GPU's (kDLMetal)."""

    shape = (3, K)

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("not reached")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0


Row = tuple[str, Callable[[], Any], type[Exception], list[str]]

QUANTIZE: list[Row] = [
    ("a list", lambda: mc.quantize([[1.0, 2.0]]), TypeError, ["weight", "list", "NumPy"]),
    ("nothing", lambda: mc.quantize(None), TypeError, ["weight", "NoneType"]),
    ("a scalar", lambda: mc.quantize(np.float32(1)), TypeError, ["weight", "float32"]),
    ("a quantized weight", lambda: mc.quantize(W), TypeError, ["weight", "QuantizedTensor"]),
    ("rank 0", lambda: mc.quantize(np.array(1, np.float32)), ValueError, ["()", "(K, N)"]),
    ("rank 1", lambda: mc.quantize(WEIGHT[0]), ValueError, ["(63,)", "(K, N)"]),
    ("rank 3", lambda: mc.quantize(WEIGHT[None]), ValueError, ["(1, 100, 63)", "(K, N)"]),
    ("no rows", lambda: mc.quantize(WEIGHT[:0]), ValueError, ["(0, 63)", "not empty"]),
    ("no columns", lambda: mc.quantize(WEIGHT[:, :0]), ValueError, ["(100, 0)", "not empty"]),
    ("float64", lambda: mc.quantize(WEIGHT.astype(np.float64)), ValueError, ["float64", "float16", "bfloat16"]),
    ("int8", lambda: mc.quantize(WEIGHT.astype(np.int8)), ValueError, ["int8", "float32"]),
    ("complex", lambda: mc.quantize(WEIGHT.astype(np.complex64)), ValueError, ["complex64", "float32"]),
    ("float8", lambda: mc.quantize(WEIGHT.astype(ml_dtypes.float8_e4m3fn)), ValueError, ["float8_e4m3fn"]),
    ("jax int32", lambda: mc.quantize(in_jax(WEIGHT.astype(np.int32))), ValueError, ["int32", "float32"]),
    ("NaN", lambda: mc.quantize(changed(WEIGHT, np.nan)), ValueError, ["NaN or infinity", "columns 0 to 62", "finite"]),
    ("infinity", lambda: mc.quantize(changed(HALF_WEIGHT, -np.inf)), ValueError, ["NaN or infinity", "finite"]),
    ("NaN in bf16", lambda: mc.quantize(changed(WEIGHT.astype(ml_dtypes.bfloat16), np.nan)), ValueError, ["NaN"]),
    ("format", lambda: mc.quantize(WEIGHT, "int5"), ValueError, ["int5", *FORMATS]),
    ("format in capitals", lambda: mc.quantize(WEIGHT, "INT4"), ValueError, ["INT4", *FORMATS]),
    ("format None", lambda: mc.quantize(WEIGHT, None), ValueError, ["None", *FORMATS]),
    ("group 0", lambda: mc.quantize(WEIGHT, "int4", 0), ValueError, ["group_size is 0", "-1", "multiple of 16"]),
    ("group 15", lambda: mc.quantize(WEIGHT, "int4", 15), ValueError, ["group_size is 15", "multiple of 16"]),
    ("group -2", lambda: mc.quantize(WEIGHT, "int4", -2), ValueError, ["group_size is -2", "multiple of 16"]),
    ("group -16", lambda: mc.quantize(WEIGHT, "int4", -16), ValueError, ["group_size is -16", "multiple of 16"]),
    ("group True", lambda: mc.quantize(WEIGHT, "int4", True), ValueError, ["group_size is True", "multiple of 16"]),
    ("group 2.0", lambda: mc.quantize(WEIGHT, "int4", 2.0), ValueError, ["group_size is 2.0", "multiple of 16"]),
    ("group 128.0", lambda: mc.quantize(WEIGHT, "int4", 128.0), ValueError, ["group_size is 128.0"]),
    ("group '128'", lambda: mc.quantize(WEIGHT, "int4", "128"), ValueError, ["group_size is '128'"]),
    ("search", lambda: mc.quantize(WEIGHT, search="best"), ValueError, ["'best'", "absmax", "mse"]),
    ("scale dtype", lambda: mc.quantize(WEIGHT, scale_dtype="float32"), ValueError, ["float32", "float16", "bfloat16"]),
    ("scale type", lambda: mc.quantize(WEIGHT, scale_dtype=np.float16), ValueError, ["scale_dtype", "bfloat16"]),
    ("device name", lambda: mc.quantize(WEIGHT, device="tpu"), ValueError, ["'tpu'", "cpu", "cuda"]),
    ("device index", lambda: mc.quantize(WEIGHT, device="cuda:x"), ValueError, ["'cuda:x'", "cuda:N"]),
    ("device cpu:1", lambda: mc.quantize(WEIGHT, device="cpu:1"), ValueError, ["'cpu:1'", "cpu"]),
    ("no such GPU", lambda: mc.quantize(WEIGHT, device=NO_GPU), mc.DeviceError, ["cuda:99", "GPU"]),
    (
        "scales beyond fp16",
        lambda: mc.quantize(changed(WEIGHT, 1e6)),
        ValueError,
        ["1e+06", "float16", 'scale_dtype="bfloat16"'],
    ),
    (
        "scales beyond bf16",
        lambda: mc.quantize(changed(WEIGHT, 3.402e38), "nf4", scale_dtype="bfloat16"),
        ValueError,
        ["3.4e+38", "bfloat16"],
    ),
    (
        "scales too small for fp16",
        lambda: mc.quantize(WEIGHT * np.float32(1e-5)),
        ValueError,
        ["float16", "coarsely", 'scale_dtype="bfloat16"'],
    ),
    ("another device", lambda: mc.quantize(OnAnotherDevice()), mc.DeviceError, ["OnAnotherDevice", "8", "CUDA"]),
]

PACK: list[Row] = [
    ("codes a list", lambda: mc.pack([[1]], SCALES, group_size=64), TypeError, ["codes", "list"]),
    ("scales a list", lambda: mc.pack(CODES, [[1]], group_size=64), TypeError, ["scale", "list"]),
    ("codes int32", lambda: mc.pack(CODES.astype(np.int32), SCALES, group_size=64), ValueError, ["int32", "uint8"]),
    ("codes rank 1", lambda: mc.pack(CODES[0], SCALES, group_size=64), ValueError, ["(63,)", "(K, N)"]),
    ("codes empty", lambda: mc.pack(CODES[:0], SCALES, group_size=64), ValueError, ["(0, 63)", "not empty"]),
    ("code 16", lambda: mc.pack(changed(CODES, 16), SCALES, group_size=64), ValueError, ["16", "int4", "4 bits"]),
    ("scales fp32", lambda: mc.pack(CODES, SCALES.astype(np.float32), group_size=64), ValueError, ["float32"]),
    ("groups", lambda: mc.pack(CODES, SCALES[:1], group_size=64), ValueError, ["(1, 63)", "64", "(2, 63)"]),
    ("group size", lambda: mc.pack(CODES, SCALES, group_size=-1), ValueError, ["(2, 63)", "-1", "(1, 63)"]),
    ("group 15", lambda: mc.pack(CODES, SCALES, group_size=15), ValueError, ["group_size is 15", "multiple of 16"]),
    ("group True", lambda: mc.pack(CODES, SCALES, group_size=True), ValueError, ["group_size is True"]),
    ("format", lambda: mc.pack(CODES, SCALES, format="int5", group_size=64), ValueError, ["int5", *FORMATS]),
    ("NaN scale", lambda: mc.pack(CODES, changed(SCALES, np.nan), group_size=64), ValueError, ["scales", "NaN"]),
    ("infinite scale", lambda: mc.pack(CODES, changed(SCALES, np.inf), group_size=64), ValueError, ["infinity"]),
    ("no zero points", lambda: mc.pack(CODES, SCALES, format="uint4", group_size=64), ValueError, ["needs zero_point"]),
    ("zero points", lambda: mc.pack(CODES, SCALES, POINTS, group_size=64), ValueError, ["has no zero_points"]),
    (
        "zero point shape",
        lambda: mc.pack(CODES, SCALES, POINTS[:1], format="uint4", group_size=64),
        ValueError,
        ["zero_point", "(1, 63)", "(2, 63)"],
    ),
    *[
        (
            f"zero point {value}",
            lambda value=value: mc.pack(
                CODES, SCALES, changed(POINTS.astype(np.float32), value), format="uint4", group_size=64
            ),
            ValueError,
            ["zero_points", "integers from 0 to 15"],
        )
        for value in (16, -1, 0.5, np.nan, np.inf)
    ],
]

MATMUL: list[Row] = [
    ("x a list", lambda: mc.matmul([[1.0] * K], W), TypeError, ["x is a", "list", "NumPy", "__dlpack__"]),
    ("x None", lambda: mc.matmul(None, W), TypeError, ["x is a", "NoneType"]),
    ("w an array", lambda: mc.matmul(X, WEIGHT), TypeError, ["ndarray", "QuantizedTensor", "quantize"]),
    ("exchanged", lambda: mc.matmul(W, X), TypeError, ["QuantizedTensor"]),
    ("x float32", lambda: mc.matmul(X.astype(np.float32), W), ValueError, ["float32", "float16 or bfloat16", "astype"]),
    ("x float64", lambda: X.astype(np.float64) @ W, ValueError, ["float64", "float16 or bfloat16"]),
    ("x int64", lambda: mc.matmul(X.astype(np.int64), W), ValueError, ["int64", "float16"]),
    ("x jax float32", lambda: in_jax(X.astype(np.float32)) @ W, ValueError, ["float32", "bfloat16"]),
    ("x rank 0", lambda: mc.matmul(np.array(1, np.float16), W), ValueError, ["()", "(..., 100)"]),
    ("K", lambda: mc.matmul(X[:, :-1], W), ValueError, ["(3, 99)", "K=100, N=63", "(..., 100)"]),
    ("K in 1-D", lambda: mc.matmul(X[0, :-1], W), ValueError, ["(99,)", "(..., 100)"]),
    ("transposed", lambda: mc.matmul(X.T, W), ValueError, ["(100, 3)", "(..., 100)"]),
    ("x elsewhere", lambda: mc.matmul(OnAnotherDevice(), W), mc.DeviceError, ["OnAnotherDevice", "8"]),
    (
        "bf16 through DLPack",
        lambda: mc.matmul(OnlyDlpack(in_jax(X.astype(ml_dtypes.bfloat16))), W),
        TypeError,
        ["OnlyDlpack", "DLPack"],
    ),
    ("bias a list", lambda: mc.matmul(X, W, [0.0] * N), TypeError, ["bias", "list"]),
    ("bias shape", lambda: mc.matmul(X, W, BIAS[:-1]), ValueError, ["bias", "(62,)", "(63,)"]),
    ("bias rank", lambda: mc.matmul(X, W, BIAS[None]), ValueError, ["bias", "(1, 63)", "(63,)"]),
    ("bias dtype", lambda: mc.matmul(X, W, BIAS.astype(np.float32)), ValueError, ["bias", "float32", "float16"]),
    ("bias library", lambda: mc.matmul(X, W, in_jax(BIAS)), TypeError, ["bias", "jax", "numpy"]),
    ("out a list", lambda: mc.matmul(X, W, out=[]), TypeError, ["out", "list"]),
    ("out shape", lambda: mc.matmul(X, W, out=np.empty((3, 64), X.dtype)), ValueError, ["out", "(3, 64)", "(3, 63)"]),
    ("out rank", lambda: mc.matmul(X[0], W, out=np.empty((1, N), X.dtype)), ValueError, ["out", "(1, 63)", "(63,)"]),
    ("out dtype", lambda: mc.matmul(X, W, out=np.empty((3, N), np.float32)), ValueError, ["out", "float32", "float16"]),
    (
        "out bf16 for fp16",
        lambda: mc.matmul(X, W, out=np.empty((3, N), ml_dtypes.bfloat16)),
        ValueError,
        ["out", "bfloat16", "float16"],
    ),
    ("out library", lambda: mc.matmul(X, W, out=in_jax(X)), TypeError, ["out", "jax", "numpy"]),
    ("out in jax", lambda: mc.matmul(in_jax(X), W, out=in_jax(X[:, :N])), TypeError, ["out", "jax", "immutable"]),
    (
        "out read-only",
        lambda: mc.matmul(X, W, out=read_only(np.empty((3, N), np.float16))),
        ValueError,
        ["out", "read-only"],
    ),
]

TENSOR: list[Row] = [
    ("dequantize dtype", lambda: W.dequantize("int8"), ValueError, ["int8", "float16, bfloat16, float32"]),
    ("dequantize type", lambda: W.dequantize(np.float64), ValueError, ["float64", "float16, bfloat16, float32"]),
    ("dequantize an array", lambda: mc.dequantize(WEIGHT), TypeError, ["ndarray", "QuantizedTensor"]),
    ("to nowhere", lambda: W.to("gpu"), ValueError, ["'gpu'", "numpy, cupy, torch, jax", "cuda:N"]),
    ("to a number", lambda: W.to(0), ValueError, ["where is 0", "cuda:N"]),
    ("to no GPU", lambda: W.to(NO_GPU), mc.DeviceError, ["cuda:99", "GPU"]),
    ("to no GPU by Device", lambda: W.to(Device("cuda", 99)), mc.DeviceError, ["cuda:99", "GPU"]),
    ("packed shape", lambda: mc.QuantizedTensor(W.spec, W.packed[:, :, 1:]), ValueError, ["packed", "int4", "(1, 1, "]),
    ("packed dtype", lambda: mc.QuantizedTensor(W.spec, W.packed.view(np.int8)), ValueError, ["int8(1, 1", "uint8"]),
    ("packed a list", lambda: mc.QuantizedTensor(W.spec, W.packed.tolist()), TypeError, ["packed", "list"]),
    (
        "packed strides",
        lambda: mc.QuantizedTensor(
            Spec("int4", (300, 64), 64, "float16"), mc.quantize(gaussian(300, 200, 4), "int4", 64).packed[::2][:1, ::-1]
        ),
        ValueError,
        ["packed", "strides", "C-contiguous"],
    ),
    ("update shape", lambda: W.update_(WEIGHT.T), ValueError, ["(63, 100)", "(100, 63)"]),
    ("update dtype", lambda: W.update_(WEIGHT.astype(np.float64)), ValueError, ["float64", "float32"]),
    ("update NaN", lambda: W.update_(changed(WEIGHT, np.nan)), ValueError, ["NaN", "finite"]),
    ("update beyond fp16", lambda: W.update_(changed(WEIGHT, 1e6)), ValueError, ["1e+06", "float16"]),
    ("update search", lambda: W.update_(WEIGHT, "best"), ValueError, ["'best'", "absmax, mse"]),
    ("update a list", lambda: W.update_(WEIGHT.tolist()), TypeError, ["weight", "list"]),
    (
        "update read-only",
        lambda: mc.QuantizedTensor(W.spec, read_only(W.packed.copy())).update_(WEIGHT),
        ValueError,
        ["packed", "read-only"],
    ),
    ("update in jax", lambda: W.to("jax").update_(WEIGHT), TypeError, ["update_", "jax", "immutable"]),
]

OTHERS: list[Row] = [
    ("explain K", lambda: mc.explain((3, 99), "float16", W), ValueError, ["(3, 99)", "K=100", "N=63"]),
    ("explain rank 0", lambda: mc.explain((), "float16", W), ValueError, ["()", "K=100"]),
    ("explain negative M", lambda: mc.explain((-1, K), "float16", W), ValueError, ["-1", "K=100"]),
    ("explain a number", lambda: mc.explain(3, "float16", W), TypeError, ["shape is 3", "(..., 100)"]),
    ("explain an array", lambda: mc.explain((3, K), "float16", WEIGHT), TypeError, ["ndarray", "QuantizedTensor"]),
    ("format name", lambda: formats.get("int3"), ValueError, ["int3", *FORMATS]),
    ("library name", lambda: frameworks.by_name("tensorflow"), ValueError, ["tensorflow", "numpy, cupy, torch, jax"]),
    ("device", lambda: Device.parse("cuda0"), ValueError, ["'cuda0'", "cuda:N"]),
    ("GPU", lambda: device.gpu(99), mc.DeviceError, ["cuda:99"]),
    ("architecture", lambda: jit_compile.compile("", "hopper"), ValueError, ["'hopper'", "sm_90a"]),
    ("architecture option", lambda: jit_compile.compile("", "sm_80 -G"), ValueError, ["'sm_80 -G'", "sm_80"]),
]

TABLE = [
    pytest.param(call, error, fragments, id=f"{function}: {case}")
    for function, table in {
        "quantize": QUANTIZE,
        "pack": PACK,
        "matmul": MATMUL,
        "tensor": TENSOR,
        "others": OTHERS,
    }.items()
    for case, call, error, fragments in table
]


def assert_one_sentence(message: str) -> None:
    assert message.endswith("."), message
    assert "\n" not in message, message


@pytest.mark.parametrize(("call", "error", "fragments"), TABLE)
def test_wrong_arguments_get_one_sentence(
    call: Callable[[], Any], error: type[Exception], fragments: list[str]
) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    if not isinstance(caught.value, mc.UnsupportedError):
        assert_one_sentence(message)


def test_refusals_changed_nothing() -> None:
    """The rows above share these; a refused update_ or matmul must not have written into them."""
    np.testing.assert_array_equal(W.packed, mc.quantize(gaussian(K, N, seed=1), "int4", 64).packed)
    np.testing.assert_array_equal(X, rows((3, K), seed=2, dtype="float16"))


@pytest.mark.parametrize(
    "call",
    [
        lambda path: mc.quantize(WEIGHT, device="cuda"),
        lambda path: W.to("cuda"),
        lambda path: W.to("cuda:0"),
        lambda path: W.to("cupy"),
        lambda path: mc.load(path, device="cuda"),
    ],
    ids=["quantize", "to cuda", "to cuda:0", "to cupy", "load"],
)
def test_a_machine_without_a_gpu_says_so(
    call: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    monkeypatch.setattr(packing, "gpu_count", lambda: 0)
    device.gpu.cache_clear()
    W.save(tmp_path / "w")
    with pytest.raises(mc.DeviceError, match=r"cuda:0 needs a CUDA GPU .* and there is none: ") as caught:
        call(tmp_path / "w")
    assert_one_sentence(str(caught.value))
    device.gpu.cache_clear()


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(device.importlib, "import_module", not_installed)
    assert device.gpu_count() == 0
    with pytest.raises(mc.MissingDependencyError, match=r"needs CuPy.*pip install 'marlin_cupy\[cuda13\]'") as caught:
        device.import_cupy("drawing")
    assert str(caught.value).startswith("drawing ")
    assert_one_sentence(str(caught.value))
    device.gpu.cache_clear()
    with pytest.raises(mc.MissingDependencyError, match=r"cuda:0 needs CuPy.*pip install") as caught:
        W.to("cuda")
    assert_one_sentence(str(caught.value))
    assert "needs CuPy" in device.no_gpu("drawing")  # and not only that there is no GPU
    assert_one_sentence(device.no_gpu("drawing"))
    with pytest.raises(mc.MissingDependencyError, match="torch") as caught:
        W.to("torch")
    assert_one_sentence(str(caught.value))


def test_errors_can_be_caught_as_what_they_are() -> None:
    assert issubclass(mc.DeviceError, ValueError)
    assert issubclass(mc.UnsupportedError, ValueError)
    assert issubclass(mc.FileFormatError, ValueError)
    assert issubclass(mc.CompileError, RuntimeError)
    assert issubclass(mc.MissingDependencyError, ImportError)
