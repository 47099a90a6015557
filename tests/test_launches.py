"""What kernels are launched with, on the CPU: every field of their arguments; the GPU and the arrays are replaced."""

from __future__ import annotations

import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from cases import GPUS, fresh_gemm, product_of

import marlin_cupy as mc
from marlin_cupy import kernels, ready, writes
from marlin_cupy.device import Device
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit import launch, tensor_map
from marlin_cupy.kernels import Grouped, Operand, Problem, Scales, Stacked, sm80_gemm, sm90_stream, sm90_wgmma, tuned
from marlin_cupy.kernels.arguments import Struct
from marlin_cupy.kernels.cuda import CudaConfiguration, ProductKernel
from marlin_cupy.kernels.operands import Rows
from marlin_cupy.layout import SLAB_K
from marlin_cupy.spec import Spec

H200 = GPUS["sm_90a"]
K = 4096
STREAM, WEIGHT, FACTORS, COUNTERS, ALLOCATED = 77, 512, 256, 8000, 4096
#: Where the number of a weight in a stack is, and how many there are.
STACK = {"stack.layer": 1 << 42, "stack.layers": 7}


def map_of(pointer: int, shape: tuple[int, int], box: tuple[int, int]) -> bytes:
    return struct.pack("=5q", pointer, *shape, *box).ljust(128, b"\0")


def told(arguments: type[Struct], raw: bytes) -> dict[str, Any]:
    """The values that a kernel finds, by name: those of which it has been asserted that C++ has them there."""
    assert len(raw) == arguments.size
    return {
        name: struct.unpack_from(f"={place.code}", raw, place.offset)[0] for name, place in arguments.places.items()
    }


class Memory(StreamFramework):
    """Arrays are (pointer, stride, shape); all that is allocated starts at ALLOCATED."""

    name = "memory"

    def device(self, array: Any) -> Device:
        return Device("cuda", 0)

    def dtype(self, array: Any) -> str:
        return "float16"

    def to_native(self, array: Any) -> Any:
        return array

    def from_native(self, native: Any) -> Any:
        return native

    def pointer(self, array: Any) -> int:
        return int(array.pointer)

    def index(self, array: Any) -> int:
        return 0

    def is_contiguous(self, array: Any) -> bool:
        return bool(array.stride == array.shape[-1])

    def strides(self, array: Any) -> tuple[int, ...]:
        return array.stride, 1

    def empty_like(self, array: Any, shape: tuple[int, ...]) -> Any:
        return self.empty(shape, "float16", Device("cuda", 0))

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        return SimpleNamespace(pointer=ALLOCATED, stride=shape[-1], shape=shape)

    def stream(self, device: Device) -> int:
        return STREAM

    def rows(self, array: Any) -> Any:
        return array


class Launches:
    """A plan over a function that notes (kind, stream, blocks, threads, arguments, shared bytes asked for)."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        kernel: ProductKernel,
        M: int,
        N: int = 4096,
        number: int = 0,
        aligned: bool = True,
    ) -> None:
        self.problem = Problem(
            M,
            Operand("float16", aligned=aligned),
            Spec("int4", (K, N), 128, "float16"),
            "float16",
            H200,
            select=Stacked(STACK["stack.layers"]),
        )
        self.log: list[tuple[str, int, int, int, bytes, int]] = []
        self.loaded: list[tuple[Any, ...]] = []
        monkeypatch.setattr(tensor_map, "of_matrix", self.of_matrix)
        monkeypatch.setattr(launch, "load", self.load)
        monkeypatch.setattr(launch, "counters", self.counters)
        configuration = kernel.candidates(self.problem)[number].configuration
        assert isinstance(configuration, CudaConfiguration)
        self.plan = kernel.plan(self.problem, configuration)
        self.configuration: Any = configuration
        spec = self.problem.w
        self.w: Any = SimpleNamespace(
            shape=spec.shape,
            device=Device("cuda", 0),
            layout=spec.layout,
            pointer=WEIGHT,
            factors_pointer=FACTORS,
            writes=writes.Writes(),
            layer_pointer=STACK["stack.layer"],
        )

    def of_matrix(self, pointer: int, dtype: str, shape: tuple[int, int], stride: int, box: tuple[int, int]) -> bytes:
        assert dtype == "float16"
        assert pointer % 16 == 0
        assert shape[0] == 1 or (stride % 8 == 0 and stride >= shape[1])
        return map_of(pointer, shape, box)

    def load(self, name: str, source: str, arch: str, device: int, entry: str, *shared_bytes: int) -> Any:
        self.loaded.append((name, source, arch, device, entry, *shared_bytes))
        return self

    def counters(self, device: int) -> Any:
        def address(stream: int, count: int) -> int:
            assert (device, stream) == (0, STREAM)
            return COUNTERS + count

        return SimpleNamespace(address=address)

    def launch(self, blocks: int, threads: int, stream: int, arguments: launch.ArgumentBlock) -> None:
        self.log.append(("plain", stream, blocks, threads, arguments.data.raw, 0))

    def launch_dependent(
        self, record: Any, blocks: int, threads: int, stream: int, arguments: launch.ArgumentBlock, shared: int = 0
    ) -> None:
        assert record is self.w.writes
        self.log.append(("dependent", stream, blocks, threads, arguments.data.raw, shared))

    def multiply(self, pointer: int, stride: int, dependent: bool = True, bias: Any = None, out: Any = None) -> Any:
        x = SimpleNamespace(pointer=pointer, stride=stride, shape=(self.problem.M, K))
        return self.plan.multiply(Memory(), x, self.w, bias, out, dependent)

    def multiply_twice(self) -> Any:
        """Into memory of its own, dependent where it can be; then plain, with a bias, where rows start anywhere."""
        y = self.multiply(1024, K)
        out = SimpleNamespace(pointer=4098, stride=self.problem.w.shape[1] + 1)
        bias = SimpleNamespace(pointer=6)
        assert self.multiply(1024, K + 8, dependent=False, bias=bias, out=out) is out
        return y


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("M", "N"), [(5, 4096), (40, 700), (300, 3000)])
def test_sm80_gemm_is_told_where_everything_is(monkeypatch: pytest.MonkeyPatch, M: int, N: int, number: int) -> None:
    given = Launches(monkeypatch, sm80_gemm.KERNEL, M, N, number)
    config, grid = given.configuration.config, given.configuration.grid
    assert given.multiply_twice().shape == (M, N)
    for second, (kind, stream, blocks, threads, raw, _) in enumerate(given.log):
        assert (kind, stream, blocks, threads) == ("plain", STREAM, grid.blocks, config.threads)
        assert told(sm80_gemm.Args, raw) == {
            **{"weight": WEIGHT, "factors": FACTORS, "x": 1024, "bias": 6 if second else 0},
            **{"y": 4098 if second else ALLOCATED},
            "partials": ALLOCATED if grid.is_cut else 0,
            "counters": COUNTERS + grid.tiles if grid.is_cut else 0,
            **{"x_stride": K + 8 if second else K, "y_stride": N + 1 if second else N},
            **{"M": M, "N": N, "K": K, "slabs_n": -(-N // 64), "slabs_k": K // SLAB_K},
            **{"tiles_m": grid.tiles_m, "tiles": grid.tiles},
            **{"x_vector": True, "y_vector": not second and N % 4 == 0},
            **STACK,
        }


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("M", "N"), [(1, 4096), (8, 700), (13, 57344)])
def test_sm90_stream_is_told_where_everything_is(monkeypatch: pytest.MonkeyPatch, M: int, N: int, number: int) -> None:
    given = Launches(monkeypatch, sm90_stream.KERNEL, M, N, number)
    config, clusters = given.configuration.config, given.configuration.clusters
    tiles = -(-N // 64) * 2 // config.halves
    assert given.multiply_twice().shape == (M, N)
    asked = sm90_stream.dependent_shared_bytes(config, given.problem.w.layout, H200)
    for second, (kind, stream, blocks, threads, raw, shared) in enumerate(given.log):
        assert (kind, shared) == (("plain", 0) if second else ("dependent", asked))
        assert (stream, blocks, threads) == (STREAM, clusters * config.cluster, config.threads)
        assert told(sm90_stream.Args, raw) == {
            "x": map_of(1024, (M, K), (M, 64)),
            **{"weight": WEIGHT, "bias": 6 if second else 0, "y": 4098 if second else ALLOCATED},
            **{"y_stride": N + 1 if second else N, "M": M, "N": N},
            **{"tiles_n": tiles, "slabs_k": K // SLAB_K, "rounds": -(-tiles // clusters), "output_scales": FACTORS},
            **{"y_vector": not second and (N % 4 == 0 or M == 1), "dependent": not second},
            **STACK,
        }


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(("M", "N"), [(64, 4096), (1000, 3000), (100, 520)])
def test_sm90_wgmma_is_told_where_everything_is(monkeypatch: pytest.MonkeyPatch, M: int, N: int, number: int) -> None:
    given = Launches(monkeypatch, sm90_wgmma.KERNEL, M, N, number)
    config, grid = given.configuration.config, given.configuration.grid
    shared = grid.shared_tiles
    assert given.multiply_twice().shape == (M, N)
    assert len(given.loaded) == 1
    for second, (kind, stream, blocks, threads, raw, _) in enumerate(given.log):
        assert kind == ("plain" if second else "dependent")
        assert (stream, blocks, threads) == (STREAM, grid.blocks * config.cluster, config.threads)
        stretch, longer = divmod(shared * K // SLAB_K, grid.blocks)
        assert told(sm90_wgmma.Args, raw) == {
            "x": map_of(1024, (M, K), (config.tokens, 64)),
            **{"weight": WEIGHT, "factors": FACTORS, "bias": 6 if second else 0},
            **{"y": 4098 if second else ALLOCATED},
            **{"partials": ALLOCATED if shared else 0, "counters": COUNTERS + shared if shared else 0},
            **{"y_stride": N + 1 if second else N, "M": M, "N": N, "slabs_n": -(-N // 64)},
            **{"tiles_m": grid.tiles_m, "tiles_n": grid.tiles // grid.tiles_m, "y_vector": not second},
            **{"schedule.tiles": grid.tiles, "schedule.steps": K // SLAB_K},
            **{"schedule.blocks": grid.blocks, "schedule.whole": grid.whole},
            **{"schedule.stretch": stretch, "schedule.longer": longer},
            **STACK,
        }


@pytest.mark.parametrize(
    "kernel", [sm80_gemm.KERNEL, sm90_stream.KERNEL, sm90_wgmma.KERNEL], ids=lambda each: each.name
)
def test_what_is_loaded_is_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, kernel: ProductKernel) -> None:
    for number in range(3):
        given = Launches(monkeypatch, kernel, 16, number=number)
        ((*build, arch, device, entry, shared, most),) = given.loaded
        assert tuple(build) == kernel.source(given.problem, given.configuration)
        assert (arch, device, entry) == (H200.arch, H200.index, "gemm")
        assert shared == given.configuration.config.shared_bytes(given.problem.w.layout)
        assert most <= H200.shared_per_block
        assert str(given.plan) == str(given.configuration)


#: (address, stride) of x that the copy engine cannot step through.
UNALIGNED = ((1026, K), (1032, K), (1024, K + 1), (1024, K + 4), (1024, K - 8), (1024, 0), (1024, -K))


def test_rows_know_whether_the_copy_engine_can_step_through_them() -> None:
    for pointer, stride in UNALIGNED:
        assert not Rows(pointer, stride, 16).is_aligned(K)
        assert Rows(pointer, stride, 16).is_aligned(K + 1)  # no x of so many columns is: it is not asked for
    for stride in (K, K + 8, 2 * K):
        assert Rows(1024, stride, 16).is_aligned(K)
    for stride in (0, 1, -K):  # of one row the stride is of no account
        assert Rows(1024, stride, 1).is_aligned(K)
    assert not Rows(1026, K, 1).is_aligned(K)


@pytest.mark.parametrize(("kernel", "M"), [(sm90_stream.KERNEL, 16), (sm90_wgmma.KERNEL, 64), (sm90_wgmma.KERNEL, 1)])
def test_x_that_the_copy_engine_cannot_read_goes_to_the_portable_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: ProductKernel, M: int
) -> None:
    spec = Spec("int4", (K, 4096), 128, "float16")
    aligned = product_of(M, "float16", spec, H200)
    asked = dataclasses.replace(aligned, x=Operand("float16", aligned=False))
    assert kernel.refuses(aligned) is None
    assert "rows of x that start at multiples of 16 bytes and do not overlap" in str(kernel.refuses(asked))
    assert {each.kernel for each in kernels.GEMM.candidates(asked)} == {"sm80_gemm"}
    given = Launches(monkeypatch, sm80_gemm.KERNEL, M, aligned=False)
    for pointer, stride in UNALIGNED:
        assert given.multiply(pointer, stride).shape == (M, 4096)
        kind, *_, raw, _ = given.log.pop()
        assert kind == "plain"
        found = told(sm80_gemm.Args, raw)
        assert (found["x"], found["x_stride"], found["y_stride"], found["M"]) == (pointer, stride, 4096, M)
        assert found["x_vector"] == Rows(pointer, stride, M).start_at(16)
    strict = dataclasses.replace(asked, batch_invariant=True)
    with pytest.raises(ValueError, match=r"sm90_wgmma needs rows of x that start at multiples of 16 .*contiguous copy"):
        kernels.GEMM.choose(strict)
    assert kernels.GEMM.choose(dataclasses.replace(strict, x=Operand("float16"))).kernel == "sm90_wgmma"


def test_x_that_is_not_aligned_gets_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is asked for when such an x comes, and kept."""
    asked: list[Problem] = []
    rows: list[tuple[bool, Rows]] = []

    def made(problem: Problem) -> Any:
        asked.append(problem)
        return SimpleNamespace(enqueue=lambda launcher, x, *rest: rows.append((problem.x.aligned, x)))

    monkeypatch.setattr(kernels.GEMM, "ready", made)
    spec, device = Spec("int4", (K, 4096), 128, "float16"), Device("cuda", 0)
    problem = product_of(8, "float16", spec, H200)
    product = ready.OnGpu(spec, device, Memory(), (8, K), "float16", problem)
    assert asked == [problem]
    x = SimpleNamespace(shape=(8, K), stride=K, dtype="float16")
    for pointer, stride in ((1024, K), *UNALIGNED, (1024, K + 8)):
        x.pointer, x.stride = pointer, stride
        y = product.multiply(None, x, None, None, True)
        assert (y.pointer, y.shape) == (ALLOCATED, (8, 4096))
        assert rows.pop() == ((pointer, stride) not in UNALIGNED, (pointer, stride, 8))
    assert asked == [problem, dataclasses.replace(problem, x=Operand("float16", aligned=False))]


@pytest.mark.parametrize(
    "kernel", [sm80_gemm.KERNEL, sm90_stream.KERNEL, sm90_wgmma.KERNEL], ids=lambda each: each.name
)
def test_no_rows_are_no_launch(monkeypatch: pytest.MonkeyPatch, kernel: ProductKernel) -> None:
    given = Launches(monkeypatch, kernel, 0)
    assert given.multiply(1025, 3).shape == (0, 4096)
    out = SimpleNamespace(pointer=0, stride=0)
    assert given.multiply(1025, 3, out=out) is out
    assert given.log == []


def test_rows_know_where_they_start() -> None:
    assert Rows(32, 8, 5).start_at(16)
    assert not Rows(40, 8, 5).start_at(16)
    assert Rows(40, 4, 5).start_at(8)
    assert not Rows(32, 4, 5).start_at(16)
    assert Rows(32, 3, 1).start_at(16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": Operand("float32"), "y": "float32"}, "takes float16 or bfloat16 activations, not float32"),
        ({"x": Operand("float16", Scales.ROWS)}, "not with a scale and a sum per row"),
        ({"y": "float32"}, "gives y the dtype of x, float16, not float32"),
        ({"select": Grouped(8)}, "not 8 groups of rows by weights of their own"),
    ],
    ids=["float32", "scales of rows", "another y", "groups"],
)
def test_what_the_seams_have_room_for_is_refused_with_a_reason(change: dict[str, Any], reason: str) -> None:
    spec = Spec("int4", (K, 4096), 128, "float16")
    asked = dataclasses.replace(product_of(8, "float16", spec, H200), **change)
    found = kernels.GEMM.refusals(asked)
    assert all(reason in str(found[name]) for name in ("sm80_gemm", "sm90_stream", "sm90_wgmma"))
    on_host = dataclasses.replace(asked, gpu=None)
    assert reason in str(kernels.GEMM.refusals(on_host)["reference"])
    with pytest.raises(mc.UnsupportedError, match="no kernel serves this multiplication"):
        kernels.GEMM.choose(on_host)


def test_plans_are_made_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, made = fresh_gemm(), []
    monkeypatch.setattr(operation, "plan", lambda problem, candidate: made.append(candidate) or len(made))
    asked = [product_of(M, "float16", Spec("int4", (K, 4096), 128, "float16"), H200) for M in (1, 1, 64, 1)]
    assert [operation.ready(each) for each in asked] == [1, 1, 2, 1]
    last = operation.candidates(asked[0])[-1]
    assert operation.ready(asked[0], last) == operation.ready(asked[0], last) == 3
    assert [each.key for each in made] == [operation.choose(asked[0]).key, operation.choose(asked[2]).key, last.key]
    tuned.forget()
    assert operation.ready(asked[0]) == 4
