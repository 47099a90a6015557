"""What JAX programs hold: the handler that XLA calls, the call and its text in a program for GPUs, without a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, GPUS, HALF, product_of
from jax_arrays import K, N, activations, check, weight

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.compilers.jax import ffi, launching
from marlin_cupy.device import gpu_of_arch
from marlin_cupy.integrations.jax import export_checks, stack
from marlin_cupy.kernels import ONE, Problem, Stacked
from marlin_cupy.kernels.cuda import CudaConfiguration

LAYERS = 3

# ---- the handler, on the CPU

_SIZE = 8
_SEEN: list[ffi.Call] = []


def floats(address: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * _SIZE).from_address(address))


def scale_and_add(call: ffi.Call) -> None:
    """results: (a * number in the text + b, b - a)."""
    _SEEN.append(call)
    found = json.loads(call.text)
    if "refused" in found:
        raise ValueError(found["refused"])
    a, b = map(floats, call.operands)
    scaled, difference = map(floats, call.results)
    scaled[:], difference[:] = a * found["factor"] + b, b - a


@pytest.fixture(scope="module")
def call() -> Callable[..., Any]:
    """The handler by the name that it is registered under."""
    ffi.register("marlin_cupy_scale_and_add", scale_and_add, platform="cpu")
    result = jax.ShapeDtypeStruct((_SIZE,), jnp.float32)

    def scale_and_add_(a: Any, b: Any, **text: Any) -> Any:
        return jax.ffi.ffi_call("marlin_cupy_scale_and_add", [result, result])(a, b, text=json.dumps(text))

    return scale_and_add_


def eight(start: float) -> jax.Array:
    return jax.device_put(np.arange(start, start + _SIZE, dtype=np.float32), jax.devices("cpu")[0])


def test_a_handler_reads_operands_and_writes_results(call: Callable[..., Any]) -> None:
    _SEEN.clear()
    scaled, difference = jax.jit(lambda a, b: call(a, b, factor=2))(eight(0), eight(5))
    np.testing.assert_array_equal(scaled, 2 * np.arange(8.0) + np.arange(5.0, 13))
    np.testing.assert_array_equal(difference, np.full(8, 5))
    assert [(seen.text, len(seen.operands), len(seen.results)) for seen in _SEEN] == [(b'{"factor": 2}', 2, 2)]
    assert (_SEEN[0].stream, _SEEN[0].device) == (0, 0)


def test_calls_of_one_program_have_their_own_text(call: Callable[..., Any]) -> None:
    def program(a: Any, b: Any) -> Any:
        first, second = call(a, b, factor=3)
        return call(first, second, factor=-1, note='a "quoted" text, and a much longer one, with ü in it' * 20)

    a, b = np.arange(8.0), np.arange(5.0, 13)
    jitted = jax.jit(program)
    for _ in range(3):
        scaled, difference = jitted(eight(0), eight(5))
        np.testing.assert_array_equal(scaled, -(3 * a + b) + (b - a))
        np.testing.assert_array_equal(difference, (b - a) - (3 * a + b))
    in_a_loop = jax.jit(lambda a, b: jax.lax.fori_loop(0, 5, lambda _, ab: tuple(call(*ab, factor=1)), (a, b)))
    for _ in range(5):
        a, b = a + b, b - a
    np.testing.assert_array_equal(in_a_loop(eight(0), eight(5))[0], a)


def test_what_a_handler_raises_is_the_error_of_the_program(call: Callable[..., Any]) -> None:
    refused = jax.jit(lambda a, b: call(a, b, refused="this GPU computes no such product."))
    with pytest.raises(Exception, match=r"INTERNAL: this GPU computes no such product\.(\n|$)") as caught:
        jax.block_until_ready(refused(eight(0), eight(5)))
    assert type(caught.value).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    with pytest.raises(Exception, match="factor"):
        jax.block_until_ready(jax.jit(lambda a, b: call(a, b))(eight(0), eight(5)))
    np.testing.assert_array_equal(jax.jit(lambda a, b: call(a, b, factor=1))(eight(0), eight(5))[1], np.full(8, 5))


# ---- programs for GPUs


@dataclasses.dataclass(frozen=True)
class Called:
    """A call of the kernel in the text of a program."""

    text: dict[str, Any]
    operands: list[str]
    results: list[str]


def lowered(function: Callable[..., Any], *arguments: Any, platforms: Sequence[str] = ("cuda",)) -> str:
    found: str = jax.jit(function).trace(*arguments).lower(lowering_platforms=tuple(platforms)).as_text()
    return found


def calls(program: str) -> list[Called]:
    found = []
    for line in program.splitlines():
        if "@marlin_cupy_matmul" in line:
            text = re.search(r'\{text = "(.*?)"\}', line)
            assert text is not None
            operands, results = line.rpartition(" : ")[2].split(" -> ")
            kinds = [re.findall(r"tensor<(.*?)>", each) for each in (operands, results)]
            found.append(Called(json.loads(text[1].replace("\\22", '"')), *kinds))
    return found


@pytest.fixture(autouse=True, scope="module")
def usual_gpu() -> Iterator[None]:
    """Programs for the usual GPU, whatever this machine has; JAX remembers what it has traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_target", lambda: gpu_of_arch(launching._USUAL_ARCH))
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_product_is_a_call_that_says_what_to_launch(name: str, dtype: str) -> None:
    w, x, bias = weight(name), activations((5, K), dtype), activations((N,), dtype)
    (plain,), (biased,) = (calls(lowered(mc.matmul, *given)) for given in ((x, w), (x, w, bias)))
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    packed = "x".join(map(str, w.packed.shape)) + "xui8"
    assert plain.operands == [f"5x{K}x{short}", packed, "128xf32"]
    assert biased.operands == [*plain.operands, f"{N}x{short}"]
    assert plain.results[0] == biased.results[0] == f"5x{N}x{short}"
    assert plain.text["spec"] == w.spec.fields
    assert (plain.text["M"], plain.text["dtype"], plain.text["layers"]) == (5, dtype, None)
    assert (plain.text["bias"], biased.text["bias"]) == (False, True)
    gpu = gpu_of_arch("sm_90a")
    assert plain.text["gpu"] == ["sm_90a", gpu.sm_count]
    chosen = kernels.GEMM.choose(product_of(5, dtype, w.spec, gpu))
    assert plain.text["candidate"] == chosen.key


def test_rows_of_all_axes_are_one_call() -> None:
    w = weight()
    for function, shape in ((lambda x: x @ w, (2, 3, K)), (jax.vmap(lambda x: x @ w), (2, 3, K))):
        (call,) = calls(lowered(function, activations(shape)))
        assert call.text["M"] == 6
    assert calls(lowered(lambda x: x @ w, activations((0, K)))) == []
    assert len(calls(lowered(lambda x: (x @ w) + (x[:3] @ w).sum(), activations((5, K))))) == 2


@pytest.mark.parametrize(("K", "N", "M"), [(8192, 256, 96), (8192, 256, 1), (256, 8192, 16)])
def test_memory_for_exchange_is_a_result_where_blocks_share_tiles(K: int, N: int, M: int) -> None:
    w, x = weight(shape=(K, N)), activations((M, K))
    (call,) = calls(lowered(mc.matmul, x, w))
    problem = product_of(M, "float16", w.spec, gpu_of_arch("sm_90a"))
    (chosen,) = [each for each in kernels.GEMM.candidates(problem) if each.key == call.text["candidate"]]
    assert isinstance(chosen.configuration, CudaConfiguration)
    floats = chosen.configuration.exchange_floats
    assert call.results == [f"{M}x{N}xf16"] + [f"{floats}xf32"] * (floats > 0)
    if M == 96:
        assert floats > 0


def test_batch_invariance_is_part_of_the_call() -> None:
    w = weight(shape=(256, 256))
    (call,) = calls(lowered(lambda x: mc.matmul(x, w, batch_invariant=True), activations((5, 256))))
    assert call.text["batch_invariant"] is True
    assert call.text["candidate"].startswith("sm90_wgmma:")


def made_slices(program: str) -> list[str]:
    """Slices of packed weights."""
    return [line for line in program.splitlines() if "dynamic_slice" in line and "ui8" in line]


def test_a_layer_of_a_stack_is_multiplied_in_place() -> None:
    stacked = stack([weight(shape=(K, K), seed=seed) for seed in range(LAYERS)])
    x = activations((5, K))

    def in_place(x: jax.Array, stack: mc.QuantizedTensor) -> jax.Array:
        return jax.lax.scan(lambda x, layer: (x @ stack[layer], None), x, jnp.arange(LAYERS))[0]

    def sliced(x: jax.Array, stack: mc.QuantizedTensor) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    packed = "x".join(map(str, stacked.packed.shape)) + "xui8"
    program = lowered(in_place, x, stacked)
    (call,) = calls(program)
    assert call.operands == [f"5x{K}xf16", packed, f"{LAYERS}x256xf32", "i32"]
    assert call.text["layers"] == LAYERS
    assert made_slices(program) == []
    program = lowered(sliced, x, stacked)
    (call,) = calls(program)
    assert call.text["layers"] is None
    assert packed not in call.operands
    assert len(made_slices(program)) == 1
    (call,) = calls(lowered(lambda x, stack: x @ stack[1], x, stacked))
    assert call.operands[1] == packed


def test_gradients_are_of_the_weight_in_place() -> None:
    """The forward pass of a gradient is the same call, and what is kept for the gradient is the packed weight."""
    w, x = weight(), activations((5, K))
    program = lowered(lambda x, dy: jax.vjp(lambda x: x @ w, x)[1](dy), x, activations((5, N)))
    assert calls(program) == []  # of a linear function nobody needs the value
    program = lowered(lambda x, w: jax.value_and_grad(lambda x: (x @ w).astype(jnp.float32).sum())(x), x, w)
    assert len(calls(program)) == 1


@pytest.mark.parametrize(("name", "group_size"), [("int4", 64), ("fp8_e4m3", 64), ("fp8_e4m3", -1)])
def test_a_gradient_takes_the_parts_that_hold_values(name: str, group_size: int) -> None:
    w, x = weight(name, group_size), activations((5, K))
    program = lowered(lambda x, dy: jax.vjp(lambda x: x @ w, x)[1](dy), x, activations((5, N)))
    (call,) = [line for line in program.splitlines() if "@marlin_cupy_dense" in line]
    operands = re.findall(r"tensor<(.*?)>", call.rpartition(" : ")[2].split(" -> ")[0])
    assert operands[0].endswith("xui8")
    assert operands[1:] == (["128xf32"] if group_size == -1 else [])


@pytest.mark.parametrize("scales", [[], [30]])
def test_addresses_of_a_gradient_go_where_they_belong(scales: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[Any, ...]] = []
    plan = SimpleNamespace(enqueue=lambda *arguments: launches.append(arguments))
    monkeypatch.setattr(launching, "_run_of", lambda text, device: (plan, range(2, 3)))
    launching._handle_dense(ffi.Call(b"", [20, *scales], [60], 80, 1))
    assert launches == [(80, 20, *(scales or [0]), 60, range(2, 3))]


def test_one_program_for_both_platforms() -> None:
    program = lowered(mc.matmul, activations((5, K)), weight(), platforms=("cpu", "cuda"))
    assert len(calls(program)) == 1
    assert "dot_general" in program


def test_nothing_of_the_call_is_in_a_program_for_the_cpu() -> None:
    x, w = activations((5, K)), weight()
    assert "marlin_cupy_matmul" not in lowered(mc.matmul, x, w, platforms=("cpu",))
    assert "dot_general" not in lowered(mc.matmul, x, w)


_IN_A_PROCESS = """
import jax, jax.numpy as jnp, numpy as np
import marlin_cupy as mc
from marlin_cupy.compilers.jax import launching
from marlin_cupy.device import gpu_of_arch
launching._target = lambda: gpu_of_arch("sm_90a")
w = mc.quantize(np.ones((8192, 256), np.float16), "nf4").to("jax")
x = jax.ShapeDtypeStruct((96, 8192), jnp.float16)
print(jax.jit(mc.matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text())
"""


def test_the_text_is_the_same_in_every_process() -> None:
    """Or JAX's cache of compiled programs would find none of them again."""
    texts = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1]), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _IN_A_PROCESS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    (call,) = calls(texts[0])
    assert call.text["spec"]["format"] == "nf4"


# ---- exported programs


def exported(function: Callable[..., Any], *arguments: Any, platforms: Sequence[str]) -> Any:
    """From the bytes that a file of it would have."""
    export = jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=export_checks)
    return jax.export.deserialize(export(*arguments).serialize())


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_an_exported_program_takes_the_weight_as_an_argument(platforms: Sequence[str]) -> None:
    x, w, bias = activations((5, K)), weight(), activations((N,))
    program = exported(mc.matmul, x, w, bias, platforms=platforms)
    np.testing.assert_array_equal(program.call(x, w, bias), jax.jit(mc.matmul)(x, w, bias))
    other = weight(seed=2)
    np.testing.assert_array_equal(program.call(x, other, bias), jax.jit(mc.matmul)(x, other, bias))
    with pytest.raises(ValueError, match="nf4"):
        program.call(x, weight("nf4"), bias)


def test_an_exported_program_for_gpus_holds_the_call() -> None:
    x, w = activations((5, K)), weight()
    program = exported(lambda x: x @ w, x, platforms=("cuda",))
    assert calls(str(program.mlir_module())) == calls(lowered(lambda x: x @ w, x))
    with pytest.raises(ValueError, match=r"exported for platforms.*cuda.*used on.*cpu"):
        program.call(x)
    with pytest.raises(ValueError, match="custom calls whose targets have no compatibility guarantees"):
        jax.export.export(jax.jit(mc.matmul), platforms=("cuda",))(x, w)


def test_an_exported_program_of_any_number_of_rows_is_for_the_cpu() -> None:
    w = weight()
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"batch, rows, {K}"), jnp.float16)
    program = exported(lambda x: x @ w, x, platforms=("cpu", "cuda"))
    for shape in ((1, 1, K), (2, 3, K)):
        check(program.call(activations(shape)), activations(shape), w)
    (call,) = calls(str(program.mlir_module()))
    assert call.text == {"refused": call.text["refused"]}
    assert "for a number of them. For GPUs export a program for each." in call.text["refused"]


_LOADED = """
import sys
import jax, numpy as np
import marlin_cupy.integrations.jax
program = jax.export.deserialize(bytearray(open("program", "rb").read()))
w = marlin_cupy.load("weight.safetensors").to("jax")
np.save("y.npy", program.call(np.load("x.npy"), w))
"""


def test_an_exported_program_runs_in_another_process(tmp_path: Path) -> None:
    x, w = activations((5, K)), weight()
    export = jax.export.export(jax.jit(mc.matmul), platforms=("cpu", "cuda"), disabled_checks=export_checks)
    (tmp_path / "program").write_bytes(export(x, w).serialize())
    w.save(tmp_path / "weight.safetensors")
    np.save(tmp_path / "x.npy", x)
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _LOADED]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), jax.jit(mc.matmul)(x, w))


# ---- the call, when it comes


def text_of(function: Callable[..., Any], *arguments: Any) -> bytes:
    (call,) = calls(lowered(function, *arguments))
    return json.dumps(call.text, sort_keys=True).encode()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[bytes], Any]]:
    """What a call's text means on a GPU of an architecture, where plans are what they are made from."""

    def on(arch: str) -> Callable[[bytes], Any]:
        monkeypatch.setattr(launching, "gpu", lambda index: GPUS[arch])
        return lambda text: launching._plan_of.__wrapped__(text, 0)

    return on


def test_a_program_for_another_gpu_says_so(plans: Any) -> None:
    text = text_of(mc.matmul, activations((5, K)), weight())
    for arch in ("sm_80", "sm_89"):
        with pytest.raises(mc.UnsupportedError) as caught:
            plans(arch)(text)
        message = str(caught.value)
        for fragment in ("compiled for sm_90a with 132 SMs", arch, str(GPUS[arch].sm_count), "where it is to run."):
            assert fragment in message
        assert "\n" not in message


def test_a_program_of_a_gpu_with_other_multiprocessors_says_so(plans: Any) -> None:
    found = json.loads(text_of(mc.matmul, activations((5, K)), weight()))
    found["gpu"][1] = 78
    with pytest.raises(mc.UnsupportedError, match=r"sm_90a with 78 SMs.* any sm_90a is sm_90a with 132"):
        plans("sm_90a")(json.dumps(found).encode())


def test_a_program_of_another_version_says_so(plans: Any) -> None:
    found = json.loads(text_of(mc.matmul, activations((5, K)), weight()))
    found["candidate"] = "sm90_stream:of another version"
    with pytest.raises(mc.UnsupportedError, match="to launch sm90_stream:of another version"):
        plans("sm_90a")(json.dumps(found).encode())


def test_what_no_kernel_serves_is_said_when_the_program_runs(plans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_target", lambda: GPUS["sm_80"])
    w, x = weight(shape=(384, 256)), activations((5, 384))  # of no other test: JAX remembers what it has traced
    multiply = jax.jit(lambda x: mc.matmul(x, w, batch_invariant=True))
    check(multiply(x), x, w)  # on the CPU it is what it was asked to be
    text = text_of(lambda x: mc.matmul(x, w, batch_invariant=True), x)
    with pytest.raises(mc.UnsupportedError, match=r"no kernel serves this multiplication.*sm90_wgmma"):
        plans("sm_80")(text)


@pytest.mark.parametrize("layers", [None, LAYERS])
def test_the_chosen_candidate_is_found_again(plans: Any, monkeypatch: pytest.MonkeyPatch, layers: int | None) -> None:
    made = []
    w, x, bias = weight(), activations((5, K)), activations((N,))

    def plan(problem: Problem, candidate: Any) -> Any:
        made.append((problem, candidate))
        raise mc.UnsupportedError("no GPU is needed to get here.")

    monkeypatch.setattr(launching.kernels.GEMM, "plan", plan)
    if layers is None:
        text = text_of(mc.matmul, x, w, bias)
    else:
        text = text_of(lambda x, stack, layer: x @ stack[layer], x, stack([w] * layers), 1)
    with pytest.raises(mc.UnsupportedError, match="no GPU is needed"):
        plans("sm_90a")(text)
    ((problem, candidate),) = made
    assert candidate.key == json.loads(text)["candidate"]
    assert problem == product_of(
        5, "float16", w.spec, GPUS["sm_90a"], select=ONE if layers is None else Stacked(layers)
    )


def test_addresses_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are x, packed, range factors, bias, layer; results y and the memory for exchange."""
    launches: list[tuple[Any, ...]] = []

    class Plan:
        def __init__(self, layers: int | None) -> None:
            select = ONE if layers is None else Stacked(layers)
            self.problem = product_of(5, "float16", weight().spec, GPUS["sm_90a"], select=select)

        def enqueue(self, launcher: Any, x: Any, w: Any, bias: int, y: Any, dependent: bool) -> None:
            lent = launcher.stream(w.device), launcher.pointer(launcher.empty((7,), "float32", w.device))
            launches.append((x, w[:2], w.device.index, w.layer_pointer, bias, y, dependent, lent))

    monkeypatch.setattr(launching.ready.writes, "of_gpu", lambda index: None)
    for has_bias, layers in ((True, 4), (True, None), (False, 4), (False, None)):
        monkeypatch.setattr(launching, "_plan_of", lambda text, device: (Plan(layers), has_bias))  # noqa: B023
        operands = [10, 20, 30] + [40] * has_bias + [50] * (layers is not None)
        launching._handle(ffi.Call(b"", operands, [60, 70], 80, 1))
        layer = 50 if layers else 0
        expected = (10, K, 5), (20, 30), 1, layer, 40 * has_bias, (60, N, 5), False, (80, 70)
        assert launches.pop() == expected
