"""What kernels are launched with, on the CPU: every field of their arguments; the GPU and the arrays are replaced."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest
from cases import GPUS

from marlin_cupy import writes
from marlin_cupy.device import Device
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit import launch, tensor_map
from marlin_cupy.kernels import Problem, sm80_gemm, sm90_stream, sm90_wgmma
from marlin_cupy.kernels.cuda import CudaConfiguration, CudaKernel
from marlin_cupy.kernels.operands import Rows
from marlin_cupy.layout import SLAB_K
from marlin_cupy.spec import Spec

H200 = GPUS["sm_90a"]
K = 4096
STREAM, WEIGHT, FACTORS, COUNTERS, ALLOCATED = 77, 512, 256, 8000, 4096
#: Where the number of a weight in a stack is, and how many there are.
STACK = (1 << 42, 7)


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
        kernel: CudaKernel,
        M: int,
        N: int = 4096,
        number: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        self.problem = Problem(M, "float16", Spec("int4", (K, N), 128, "float16"), H200, batch_invariant)
        self.log: list[tuple[str, int, int, int, bytes, int]] = []
        self.loaded: list[tuple[Any, ...]] = []
        monkeypatch.setattr(tensor_map, "of_matrix", self.of_matrix)
        monkeypatch.setattr(launch, "load", self.load)
        monkeypatch.setattr(launch, "counters", self.counters)
        configuration = kernel.candidates(self.problem)[number].configuration
        assert isinstance(configuration, CudaConfiguration)
        self.plan = kernel.plan(self.problem, configuration)
        self.configuration: Any = configuration
        spec = self.problem.spec
        self.w: Any = SimpleNamespace(
            shape=spec.shape,
            device=Device("cuda", 0),
            layout=spec.layout,
            pointer=WEIGHT,
            factors_pointer=FACTORS,
            writes=writes.Writes(),
            stack=STACK,
        )

    def of_matrix(self, pointer: int, dtype: str, shape: tuple[int, int], stride: int, box: tuple[int, int]) -> bytes:
        assert dtype == "float16"
        assert pointer % 16 == 0
        assert shape[0] == 1 or (stride % 8 == 0 and stride >= shape[1])
        return struct.pack("=5q", pointer, *shape, *box).ljust(128, b"\0")

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
        out = SimpleNamespace(pointer=4098, stride=self.problem.spec.shape[1] + 1)
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
        assert struct.unpack("=7Q2q9i4xQi4x", raw) == (
            *(WEIGHT, FACTORS, 1024, 6 if second else 0, 4098 if second else ALLOCATED),
            *((ALLOCATED, COUNTERS + grid.tiles) if grid.is_cut else (0, 0)),
            *(K + 8 if second else K, N + 1 if second else N),
            *(M, N, K, -(-N // 64), K // SLAB_K, grid.tiles_m, grid.tiles),
            *(True, not second and N % 4 == 0, *STACK),
        )


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("M", "N"), [(1, 4096), (8, 700), (13, 57344)])
def test_sm90_stream_is_told_where_everything_is(monkeypatch: pytest.MonkeyPatch, M: int, N: int, number: int) -> None:
    given = Launches(monkeypatch, sm90_stream.KERNEL, M, N, number)
    config, clusters = given.configuration.config, given.configuration.clusters
    tiles = -(-N // 64) * 2 // config.halves
    assert given.multiply_twice().shape == (M, N)
    asked = sm90_stream.dependent_shared_bytes(config, given.w.layout, H200)
    for second, (kind, stream, blocks, threads, raw, shared) in enumerate(given.log):
        assert (kind, shared) == (("plain", 0) if second else ("dependent", asked))
        assert (stream, blocks, threads) == (STREAM, clusters * config.cluster, config.threads)
        assert struct.unpack_from("=5q", raw) == (1024, M, K, M, 64)
        assert struct.unpack_from("=3Qq7i4xQi", raw, 128) == (
            *(WEIGHT, 6 if second else 0, 4098 if second else ALLOCATED),
            *(N + 1 if second else N, M, N, tiles, K // SLAB_K, -(-tiles // clusters)),
            *(not second and (N % 4 == 0 or M == 1), not second, *STACK),
        )


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
        assert struct.unpack_from("=5q", raw) == (1024, M, K, config.tokens, 64)
        assert struct.unpack_from("=6Qq12iQi", raw, 128) == (
            *(WEIGHT, FACTORS, 6 if second else 0, 4098 if second else ALLOCATED),
            *((ALLOCATED, COUNTERS + shared) if shared else (0, 0)),
            *(N + 1 if second else N, M, N, -(-N // 64)),
            *(grid.tiles_m, grid.tiles // grid.tiles_m, not second, grid.tiles),
            *(K // SLAB_K, grid.blocks, grid.whole, *divmod(shared * K // SLAB_K, grid.blocks), *STACK),
        )


@pytest.mark.parametrize(
    "kernel", [sm80_gemm.KERNEL, sm90_stream.KERNEL, sm90_wgmma.KERNEL], ids=lambda each: each.name
)
def test_what_is_loaded_is_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, kernel: CudaKernel) -> None:
    for number in range(3):
        given = Launches(monkeypatch, kernel, 16, number=number)
        ((*build, arch, device, entry, shared, most),) = given.loaded
        assert tuple(build) == kernel.source(given.problem, given.configuration)
        assert (arch, device, entry) == (H200.arch, H200.index, "gemm")
        assert shared == given.configuration.config.shared_bytes(given.w.layout)
        assert most <= H200.shared_per_block
        assert str(given.plan) == str(given.configuration)


@pytest.mark.parametrize(("kernel", "M"), [(sm90_stream.KERNEL, 16), (sm90_wgmma.KERNEL, 64)])
def test_x_that_the_copy_engine_cannot_read_goes_to_the_portable_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: CudaKernel, M: int
) -> None:
    given = Launches(monkeypatch, kernel, M)
    places = ((1026, K), (1032, K), (1024, K + 1), (1024, K + 4), (1024, K - 8), (1024, 0), (1024, -K))
    for pointer, stride in places:
        assert given.multiply(pointer, stride).shape == (M, 4096)
        kind, *_, raw, _ = given.log.pop()
        assert kind == "plain"
        assert struct.unpack_from("=7Q2q9i", raw)[2] == pointer
        assert struct.unpack_from("=7Q2q9i", raw)[7:10] == (stride, 4096, M)
    first, *others = given.loaded
    assert first[0].startswith(kernel.name)
    assert [other[0] for other in others] == ["sm80_gemm-int4-g128-float16"]  # when it was needed, and once
    strict = Launches(monkeypatch, sm90_wgmma.KERNEL, 64, batch_invariant=True)
    for pointer, stride in places:
        with pytest.raises(ValueError, match="batch_invariant needs rows that start at multiples of 16 bytes"):
            strict.multiply(pointer, stride)
    assert strict.log == []
    assert len(strict.loaded) == 1
    strict.multiply(1024, K)
    assert len(strict.log) == 1
    one = Launches(monkeypatch, sm90_wgmma.KERNEL, 1)
    for stride in (0, 1, -K):  # of one row the stride is of no account
        one.multiply(1024, stride)
    assert [entry[0] for entry in one.log] == ["dependent"] * 3
    assert len(one.loaded) == 1


@pytest.mark.parametrize(
    "kernel", [sm80_gemm.KERNEL, sm90_stream.KERNEL, sm90_wgmma.KERNEL], ids=lambda each: each.name
)
def test_no_rows_are_no_launch(monkeypatch: pytest.MonkeyPatch, kernel: CudaKernel) -> None:
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
