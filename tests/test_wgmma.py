"""The kernel with wgmma, on the CPU: what is built, what is offered, what is refused, what a launch is told."""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from types import SimpleNamespace
from typing import Any

import pytest
from cases import FORMATS, GPUS, HALF

import marlin_cupy as mc
from marlin_cupy import kernels, writes
from marlin_cupy.bench.shapes import LLAMA
from marlin_cupy.device import Device
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.jit import launch, tensor_map
from marlin_cupy.kernels import Plan, Problem, sm80_gemm, sm90_wgmma
from marlin_cupy.kernels.operands import Rows
from marlin_cupy.kernels.sm90_wgmma import KERNEL, Config, Tiling
from marlin_cupy.layout import SLAB_K, Layout
from marlin_cupy.tensor import Spec

H200 = dataclasses.replace(GPUS["sm_90a"], name="NVIDIA H200", memory_gbs=4916.0)
EVERY_M = (1, 8, 9, 16, 17, 32, 33, 48, 64, 65, 96, 100, 128, 129, 192, 250, 256, 300, 512, 1000, 1024, 4096, 100_000)
SHAPES = ((8, 1), (128, 64), (1000, 300), (4096, 4096), (28672, 8192), (8192, 57344), (65536, 64))
#: Bytes (stores and loads) that the compiler may spill: a few addresses, where there are clusters.
SPILLS_IN_CLUSTERS = 8


def layout(K: int = 4096, N: int = 4096, name: str = "int4", group_size: int = 128) -> Layout:
    return Spec(name, (K, N), group_size, "float16").layout


def problem(M: int, K: int = 4096, N: int = 4096, **changes: Any) -> Problem:
    spec = Spec(changes.pop("format", "int4"), (K, N), 128, changes.pop("scale_dtype", "float16"))
    return dataclasses.replace(Problem(M, "float16", spec, H200), **changes)


# ---- what is built

_CASES = list(itertools.product(FORMATS, HALF, (128, 32)))


@pytest.mark.parametrize(("index", "name", "dtype", "group_size"), [(i, *case) for i, case in enumerate(_CASES)])
def test_configurations_compile_without_spills_and_get_the_registers_that_they_trade(
    index: int, name: str, dtype: str, group_size: int
) -> None:
    """All of them once, and every fourth for each format, dtype and granule, others each time.

    The compiler must give a launch the registers that ``consumer_registers`` divides: with fewer, a warpgroup that asks
    for its share waits for ever. Serialised wgmma and the like fail the build.
    """
    spec = Spec(name, (4096, 4096), group_size, dtype)
    found = [rated.config for rated in sm90_wgmma.configs(spec.layout, H200)]
    assert found
    for config in found if index == 0 else found[index % 4 :: 4]:
        text = sm90_wgmma.kernel_source(spec, dtype, config)
        text += f'static_assert(sizeof(Args) == {sm90_wgmma._ARGS.size}, "the host twin packs as much");\n'
        built = jit_compile.compile(text, "sm_90a")
        assert built.registers == config.launch_registers, config
        allowed = SPILLS_IN_CLUSTERS if config.cluster > 1 else 0
        assert built.spill_bytes <= allowed, config


@pytest.mark.parametrize("rated", sm90_wgmma.CONFIGS, ids=lambda rated: "-".join(map(str, vars(rated.config).values())))
def test_warpgroups_get_the_registers_that_they_ask_for(rated: sm90_wgmma.RatedConfig) -> None:
    config = rated.config
    of_block = config.launch_registers * config.threads
    asked = 128 * (config.consumers * config.consumer_registers + sm90_wgmma._PRODUCER_REGISTERS)
    assert asked <= of_block <= 65536
    assert config.consumer_registers % 8 == config.launch_registers % 8 == 0
    assert sm90_wgmma._PRODUCER_REGISTERS < config.launch_registers < config.consumer_registers <= 240
    assert config.tokens % 16 == 0
    assert config.stages % config.wgs_k == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_stages_are_as_many_as_fit(name: str, group_size: int) -> None:
    found = sm90_wgmma.configs(layout(name=name, group_size=group_size), H200)
    assert {rated.config.tokens for rated in found} == {16, 32, 48, 64, 96, 128, 192, 256}
    for rated in found:
        config, reserved = rated.config, rated.config.shared_bytes(layout(name=name, group_size=group_size))
        assert reserved <= H200.shared_per_block
        assert reserved + 1024 <= H200.shared_per_sm
        assert config.stages % config.wgs_k == 0
        assert config.stages >= 2 * config.wgs_k
    small = dataclasses.replace(H200, shared_per_block=16384)
    assert sm90_wgmma.configs(layout(), small) == []


# ---- what is offered


def every_sharing_block_is_waited_for(grid: sm90_wgmma.Grid, steps: int) -> bool:
    """Whether the blocks with a part of a shared tile are those that Segments (schedule/segments.cuh) counts for it."""
    stretch, longer = divmod(grid.shared_tiles * steps, grid.blocks)

    def begin(block: int) -> int:
        return block * stretch + min(block, longer)

    def block_of(step: int) -> int:
        first = longer * (stretch + 1)
        return step // (stretch + 1) if step < first else longer + (step - first) // stretch

    lengths = [begin(block + 1) - begin(block) for block in range(grid.blocks)]
    for tile in range(grid.shared_tiles):
        first, last = block_of(tile * steps), block_of((tile + 1) * steps - 1)
        assert begin(first) <= tile * steps < begin(first + 1)
        assert begin(last) < (tile + 1) * steps <= begin(last + 1)
        if 0 in lengths[first : last + 1]:
            return False
    return True


def test_stripes_are_added_up_by_the_last_of_their_blocks() -> None:
    """Also where a few tiles more than a wave are left to all blocks."""
    config = Config(2, 1, 1, 128, 4, 1)
    for tiles in (1, 2, 131, 132, 133, 134, 136, 137, 263, 264, 265, 397, 529):
        for K in (128, 256, 4096, 28672):
            found = sm90_wgmma.grid_of(config, 128 * tiles, layout(K, 128), H200, stripes=True)
            assert found.tiles == tiles
            assert found.whole >= 0
            assert (found.shared_tiles == 0) == (tiles % found.blocks == 0)
            assert found.shared_tiles == 0 or every_sharing_block_is_waited_for(found, -(-K // SLAB_K))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_is_computed_and_every_block_has_work(shape: tuple[int, int], invariant: bool) -> None:
    K, N = shape
    for M in EVERY_M:
        asked = problem(M, K, N, batch_invariant=invariant)
        for candidate in KERNEL.candidates(asked):
            tiling = candidate.configuration
            assert isinstance(tiling, Tiling)
            config, grid = tiling.config, tiling.grid
            assert grid.tiles_m * config.tokens >= M > (grid.tiles_m - 1) * config.tokens
            assert grid.tiles // grid.tiles_m * config.rows >= N
            assert grid.tiles % grid.tiles_m == 0
            assert 1 <= grid.blocks <= grid.tiles * asked.spec.layout.packed_shape[1]
            assert grid.whole * grid.blocks + grid.shared_tiles >= grid.tiles
            assert grid.shared_tiles < 2 * grid.blocks
            assert grid.shared_tiles <= launch.MAX_COUNTERS
            assert not grid.shared_tiles or every_sharing_block_is_waited_for(grid, asked.spec.layout.packed_shape[1])
            assert not grid.shared_tiles or config.cluster == 1
            assert not grid.shared_tiles or grid.blocks <= sm90_wgmma.slots(config, H200)  # they wait for no other
            assert tiling.dependent
            assert ("partial tiles" in str(tiling)) != ("no tile is cut" in str(tiling))


def test_predictions_make_sense() -> None:
    for shape in LLAMA:
        before = 0.0
        for M in EVERY_M:
            asked = problem(M, shape.K, shape.N)
            floor, best = kernels.floor_us(asked), min(each.predicted_us for each in KERNEL.candidates(asked))
            assert floor is not None
            assert floor < best < math.inf
            assert best > 2 * M * shape.K * shape.N / 989e6  # what the tensor cores can do at all
            assert best >= 0.97 * before, M  # more rows take longer
            before = best
    for name, factor in (("nf4", 1.3), ("int8", 1.6)):
        us = [KERNEL.candidates(problem(16, 8192, 57344, format=each))[0].predicted_us for each in ("int4", name)]
        assert us[0] < us[1] < factor * us[0]


def test_the_right_kernel_is_chosen_on_an_h200() -> None:
    for shape in LLAMA:
        for M in (1, 4, 8):
            assert kernels.choose(problem(M, shape.K, shape.N)).kernel == "sm90_stream"
        for M in (24, 32, 48, 64, 100, 128, 256, 777, 1024, 4096):
            assert kernels.choose(problem(M, shape.K, shape.N)).kernel == "sm90_wgmma"


# ---- what is refused


def test_the_kernel_says_what_it_does_not_serve() -> None:
    def refusal(M: int = 64, **changes: Any) -> str:
        return str(KERNEL.refuses(problem(M, **changes)))

    assert refusal() == refusal(M=0) == refusal(M=100_000) == refusal(batch_invariant=True) == "None"
    assert refusal(dtype="bfloat16", scale_dtype="bfloat16") == "None"
    assert "host memory" in refusal(gpu=None)
    assert "sm_80" in refusal(gpu=GPUS["sm_80"])
    assert "sm_100a" in refusal(gpu=GPUS["sm_100a"])
    assert "float32" in refusal(dtype="float32")
    assert refusal(dtype="float16", scale_dtype="bfloat16") == "None"
    assert "bfloat16 would round float16 scales too much" in refusal(dtype="bfloat16", scale_dtype="float16")
    for K in (1, 4, 4095, 4100):
        assert f"K={K}" in refusal(K=K)
    assert "16384 bytes" in refusal(gpu=dataclasses.replace(H200, shared_per_block=16384))
    assert list(KERNEL.variants(problem(1).spec, "bfloat16", H200)) == []
    assert list(KERNEL.variants(problem(1).spec, "float16", GPUS["sm_80"])) == []
    for K in (1, 4096):  # of a spec the format, granule and scales count, not the shape
        assert len(list(KERNEL.variants(problem(1, K).spec, "float16", H200))) == len(sm90_wgmma.CONFIGS)


# ---- batch_invariant


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_split_of_k_does_not_depend_on_m(name: str, shape: tuple[int, int]) -> None:
    K, N = shape
    splits = set()
    for M in (0, *EVERY_M):
        asked = problem(M, K, N, format=name, batch_invariant=True)
        assert kernels.choose(asked).kernel == "sm90_wgmma"
        for candidate in kernels.candidates(asked):
            tiling = candidate.configuration
            assert isinstance(tiling, Tiling)
            splits.add((tiling.config.wgs_k, tiling.config.cluster))
            assert tiling.grid.shared_tiles == 0
            assert tiling.config.wgs_k == 1 or (tiling.grid.blocks, tiling.grid.whole) == (tiling.grid.tiles, 1)
    assert len(splits) == 1


def test_where_no_kernel_can_be_batch_invariant_all_say_why() -> None:
    for changes in ({"K": 4100}, {"gpu": GPUS["sm_80"]}, {"dtype": "bfloat16"}):
        with pytest.raises(mc.UnsupportedError) as caught:
            kernels.choose(problem(64, batch_invariant=True, **changes))
        for name in ("sm90_wgmma", "sm80_gemm", "sm90_stream", "reference"):
            assert name in str(caught.value)
        assert "batch_invariant was asked for" in str(caught.value)


# ---- launches, with everything below replaced


class Memory(StreamFramework):
    """Arrays are (pointer, stride, shape); what is allocated starts at 4096."""

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

    def strides(self, array: Any) -> tuple[int, ...]:
        return array.stride, 1

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        return SimpleNamespace(pointer=4096, stride=shape[-1], shape=shape)

    def stream(self, device: Device) -> int:
        return 77

    def rows(self, array: Any) -> Any:
        return array


class Launches:
    """A plan over a function that notes what it is launched with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, M: int, **changes: Any) -> None:
        self.problem = problem(M, **changes)
        self.log: list[tuple[str, int, int, bytes]] = []
        self.portable: list[bool] = []
        self.made = 0
        monkeypatch.setattr(tensor_map, "of_matrix", self.of_matrix)
        monkeypatch.setattr(launch, "load", lambda *_: self)
        monkeypatch.setattr(launch, "counters", lambda _: SimpleNamespace(address=lambda stream, count: 8000 + count))
        monkeypatch.setattr(sm80_gemm.KERNEL, "plan", self.plan_portable, raising=False)
        self.plan = KERNEL.plan(self.problem, KERNEL.candidates(self.problem)[0])
        spec = self.problem.spec
        self.w = SimpleNamespace(
            shape=spec.shape,
            device=Device("cuda", 0),
            layout=spec.layout,
            pointer=512,
            factors_pointer=256,
            writes=writes.Writes(),
        )

    def of_matrix(self, pointer: int, dtype: str, shape: tuple[int, int], stride: int, box: tuple[int, int]) -> bytes:
        assert pointer % 16 == 0
        assert shape[0] == 1 or (stride % 8 == 0 and stride >= shape[1])
        return struct.pack("=5q", pointer, *shape, *box).ljust(128, b"\0")

    def plan_portable(self, asked: Problem, candidate: kernels.Candidate) -> Plan:
        assert asked == self.problem
        assert candidate.kernel == "sm80_gemm"
        self.made += 1
        found: Any = SimpleNamespace(multiply=lambda framework, x, w, bias, out, dependent: out)
        return found

    def launch(self, blocks: int, threads: int, stream: int, arguments: launch.ArgumentBlock) -> None:
        self.log.append(("plain", blocks, threads, arguments.data.raw))

    def launch_dependent(self, record: Any, blocks: int, threads: int, stream: int, arguments: Any) -> None:
        assert record is self.w.writes
        self.log.append(("dependent", blocks, threads, arguments.data.raw))

    def multiply(self, pointer: int, stride: int, dependent: bool = True, out: Any = None) -> Any:
        x = SimpleNamespace(pointer=pointer, stride=stride, shape=(self.problem.M, self.problem.spec.shape[0]))
        w: Any = self.w
        return self.plan.multiply(Memory(), x, w, None, out, dependent)


def test_a_launch_is_told_where_everything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for M, N in ((64, 4096), (1000, 3000), (100, 520)):
        given = Launches(monkeypatch, M, N=N)
        y = given.multiply(1024, 4096)
        given.multiply(1024, 4104, dependent=False, out=SimpleNamespace(pointer=4098, stride=N))
        assert y.shape == (M, N)
        assert [entry[0] for entry in given.log] == ["dependent", "plain"]
        assert given.made == 0
        plan = given.plan
        assert isinstance(plan, sm90_wgmma.WgmmaPlan)
        shared = plan.grid.shared_tiles
        for index, (_, blocks, threads, raw) in enumerate(given.log):
            assert (blocks, threads) == (plan.grid.blocks * plan.config.cluster, plan.config.threads)
            assert struct.unpack_from("=5q", raw) == (1024, M, 4096, plan.config.tokens, 64)
            found = struct.unpack_from("=6Qq12i", raw, 128)
            assert found == (
                512,
                256,
                0,
                4098 if index else 4096,
                4096 if shared else 0,
                8000 + shared if shared else 0,
                N,
                M,
                N,
                -(-N // 64),
                plan.grid.tiles_m,
                plan.grid.tiles // plan.grid.tiles_m,
                not index,
                plan.grid.tiles,
                4096 // SLAB_K,
                plan.grid.blocks,
                plan.grid.whole,
                *divmod(shared * 4096 // SLAB_K, plan.grid.blocks),
            )


def test_x_that_the_copy_engine_cannot_read_goes_to_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Launches(monkeypatch, 64)
    places = ((1026, 4096), (1032, 4096), (1024, 4097), (1024, 4100), (1024, 4088), (1024, 0), (1024, -4096))
    for pointer, stride in places:
        assert given.multiply(pointer, stride).shape == (64, 4096)
    assert given.log == []
    assert given.made == 1  # when it was needed, and once
    strict = Launches(monkeypatch, 64, batch_invariant=True)
    for pointer, stride in places:
        with pytest.raises(ValueError, match="batch_invariant needs rows that start at multiples of 16 bytes"):
            strict.multiply(pointer, stride)
    assert strict.log == []
    assert strict.made == 0
    strict.multiply(1024, 4096)
    assert len(strict.log) == 1
    one = Launches(monkeypatch, 1)
    for stride in (0, 1, -4096):  # of one row the stride is of no account
        one.multiply(1024, stride)
    assert len(one.log) == 3


def test_no_rows_are_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Launches(monkeypatch, 0)
    assert given.multiply(1025, 3).shape == (0, 4096)
    assert given.log == []
    out = SimpleNamespace(pointer=0, stride=0)
    assert given.multiply(1025, 3, out=out) is out


def test_rows_know_where_they_start() -> None:
    assert Rows(32, 8, 5).start_at(16)
    assert not Rows(40, 8, 5).start_at(16)
    assert Rows(40, 4, 5).start_at(8)
    assert not Rows(32, 4, 5).start_at(16)
    assert Rows(32, 3, 1).start_at(16)


def test_the_words_tell_what_splits_k() -> None:
    for config in (Config(2, 1, 1, 128, 4, 1), Config(2, 2, 1, 48, 8, 2), Config(1, 2, 1, 64, 8, 1)):
        text = str(config)
        assert ("groups of warps" in text) == (config.wgs_k > 1)
        assert ("2 blocks share" in text or "and 2 blocks" in text) == (config.cluster > 1)
        assert "weights are rounded to 16 bits after scaling" in text
