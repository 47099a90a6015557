"""Products on a GPU inside a compiled JAX program: chosen when it is traced, launched when XLA says so.

What is launched stands in the program as text, so that a program can be kept on disk, or sent to another process, and
a process that runs it finds the same configuration again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from marlin_cupy import kernels, ready
from marlin_cupy.compilers.jax import ffi
from marlin_cupy.compilers.jax.partitioning import manual_axes
from marlin_cupy.device import Device, Gpu, gpu, gpu_count, gpu_of_arch
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.kernels import ONE, Dense, DensePlan, Operand, Problem, Stacked, dequantize
from marlin_cupy.kernels.cuda import CudaConfiguration, CudaPlan
from marlin_cupy.kernels.operands import Rows
from marlin_cupy.layout import SLAB_K
from marlin_cupy.spec import Spec

#: The calls: x @ W + bias, and a run of K of the dense W^T.
MATMUL, DENSE = TARGETS = "marlin_cupy_matmul", "marlin_cupy_dense"
#: What programs are compiled for where there is no GPU.
_USUAL_ARCH = "sm_90a"


def gemm(spec: Spec, batch_invariant: bool, x: Any, parts: Sequence[Any], layer: Any | None, bias: Any | None) -> Any:
    """``x @ W + bias`` as a call of :func:`_handle`.

    Args:
        spec: of the weight.
        x: [M, K], M > 0.
        parts: the arrays of the weight, all of Spec.parts in their order, or stacks of them.
        layer: which one of a stack, or None.
        bias: [N] or None.
    """
    M, dtype = x.shape[0], x.dtype.name
    problem = _problem(M, dtype, spec, _target(), batch_invariant, None if layer is None else parts[0].shape[0])
    results = [_result((M, spec.shape[1]), x.dtype, x)]
    try:
        if not isinstance(M, int):
            raise UnsupportedError(
                f"x has {M} rows; kernels are chosen for a number of them. For GPUs export a program for each."
            )
        chosen = kernels.GEMM.choose(problem)
        if gpu_count():
            kernels.GEMM.ready(problem)  # before XLA records launches of it
    except UnsupportedError as error:
        if jax.default_backend() == "gpu":
            raise
        text: dict[str, Any] = {"refused": str(error)}  # to be said when the program runs on a GPU, if ever it does
    else:
        assert problem.gpu is not None
        assert isinstance(chosen.configuration, CudaConfiguration)
        text = {
            "spec": spec.fields,
            "M": M,
            "dtype": dtype,
            "batch_invariant": batch_invariant,
            "bias": bias is not None,
            "layers": None if layer is None else parts[0].shape[0],
            "gpu": [problem.gpu.arch, problem.gpu.sm_count],
            "candidate": chosen.key,
        }
        if chosen.configuration.exchange_floats:
            results.append(_result((chosen.configuration.exchange_floats,), jnp.float32, x))
    operands = [x, *parts, *(each for each in (bias, layer) if each is not None)]
    call: Any = jax.ffi.ffi_call(MATMUL, results)
    return call(*operands, text=json.dumps(text, sort_keys=True))[0]


def transposed(spec: Spec, dy: Any, parts: Sequence[Any]) -> Any:
    """``dy @ W.T``: dense pieces of the weight, each of bounded size, and their products by XLA.

    Args:
        spec: of the weight.
        dy: [M, N], M > 0.
        parts: the arrays of the weight.
    """
    packed, *scales = [part for part, each in zip(parts, spec.parts.values(), strict=True) if not each.derived]
    dtype = dy.dtype.name
    pieces: list[Any] = []
    one_at_a_time: Any = jax.lax.optimization_barrier
    if gpu_count():
        kernels.DEQUANTIZE.ready(Dense(spec, dtype, _target()))  # before XLA records launches of it
    for run in dequantize.runs(spec):
        call: Any = jax.ffi.ffi_call(DENSE, _result((spec.shape[1], SLAB_K * len(run)), dy.dtype, dy))
        text = {"spec": spec.fields, "dtype": dtype, "run": [run.start, run.stop]}
        packed, dy, pieces = one_at_a_time((packed, dy, pieces))  # and not before dy is there
        weight = call(packed, *scales, text=json.dumps(text, sort_keys=True))
        pieces.append(jnp.matmul(dy, weight, preferred_element_type=jnp.float32).astype(dy.dtype))
    return jnp.concatenate(pieces, 1)[:, : spec.shape[0]]


def _result(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """A result that varies over the devices of jax.shard_map as ``like`` does."""
    kind: Any = jax.typeof(like)
    make: Any = jax.ShapeDtypeStruct
    if not manual_axes():
        return make(shape, dtype)
    if hasattr(kind, "manual_axis_type"):  # of newer versions of JAX, which want a sharding with it
        everywhere: Any = jax.sharding.PartitionSpec
        here = jax.sharding.NamedSharding(kind.sharding.mesh, everywhere())
        return make(shape, dtype, sharding=here, manual_axis_type=kind.manual_axis_type)
    return make(shape, dtype, vma=kind.vma)


@functools.cache
def _target() -> Gpu:
    """The GPU that kernels are chosen for: the first one, or a usual one where there is none."""
    return gpu(0) if gpu_count() else gpu_of_arch(_USUAL_ARCH)


def _problem(M: int, dtype: str, spec: Spec, on: Gpu, batch_invariant: bool, layers: int | None) -> Problem:
    """For an x of XLA's, which is contiguous."""
    return Problem(M, Operand(dtype), spec, dtype, on, batch_invariant, ONE if layers is None else Stacked(layers))


# ---- when XLA runs, or records


class _Lender:
    """What a launch asks for, from what XLA gave the call."""

    exclusive = True  # XLA lends it to nothing that can run meanwhile

    def __init__(self, call: ffi.Call) -> None:
        self._call = call

    def stream(self, device: Device) -> int:
        """XLA's."""
        return self._call.stream

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> int:
        """The second result."""
        return self._call.results[1]

    def pointer(self, array: int) -> int:
        """An address is what there is."""
        return array


def _handle(call: ffi.Call) -> None:
    """Launch, plainly: XLA may have written the weight just before, a copy of a slice for instance."""
    plan, has_bias = _plan_of(call.text, call.device)
    spec = plan.problem.w
    x, *others = call.operands
    parts, others = others[: len(spec.parts)], others[len(spec.parts) :]
    K, N = spec.shape
    M = plan.problem.M
    layer = others[-1] if isinstance(plan.problem.select, Stacked) else 0
    weight = ready.weight_at(parts, call.device, layer)
    bias = others[0] if has_bias else 0
    plan.enqueue(_Lender(call), Rows(x, K, M), weight, bias, Rows(call.results[0], N, M), False)


@functools.lru_cache(maxsize=4096)
def _plan_of(text: bytes, device: int) -> tuple[CudaPlan[Any], bool]:
    """What the text of a call means on a GPU: a plan, and whether there is a bias."""
    found = json.loads(text)
    if "refused" in found:
        raise UnsupportedError(found["refused"])
    here = gpu(device)
    problem = _problem(found["M"], found["dtype"], _spec(found), here, found["batch_invariant"], found["layers"])
    candidate = next((each for each in kernels.GEMM.candidates(problem) if each.key == found["candidate"]), None)
    if candidate is None or found["gpu"] != [here.arch, here.sm_count]:
        arch, sms = found["gpu"]
        raise UnsupportedError(
            f"this JAX program was compiled for {arch} with {sms} SMs, to launch {found['candidate']}; {here.name} is "
            f"{here.arch} with {here.sm_count}. Compile it where it is to run."
        )
    plan = kernels.GEMM.ready(problem, candidate)
    assert isinstance(plan, CudaPlan)
    return plan, found["bias"]


def _handle_dense(call: ffi.Call) -> None:
    plan, run = _run_of(call.text, call.device)
    packed, *scales = call.operands
    plan.enqueue(call.stream, packed, scales[0] if scales else 0, call.results[0], run)


@functools.lru_cache(maxsize=4096)
def _run_of(text: bytes, device: int) -> tuple[DensePlan, range]:
    found = json.loads(text)
    return kernels.DEQUANTIZE.ready(Dense(_spec(found), found["dtype"], gpu(device))), range(*found["run"])


def _spec(found: dict[str, Any]) -> Spec:
    return Spec.of_fields(found["spec"], "this JAX program")


ffi.register(MATMUL, _handle)
ffi.register(DENSE, _handle_dense)
