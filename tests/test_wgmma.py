"""The kernel with wgmma, on the CPU: what is built, what is offered, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from cases import FORMATS, GPUS, HALF

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.bench.shapes import LLAMA
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.jit import launch
from marlin_cupy.kernels import Problem, sm90_wgmma
from marlin_cupy.kernels.sm90_wgmma import KERNEL, Config, Tiling
from marlin_cupy.layout import SLAB_K, Layout
from marlin_cupy.spec import Spec

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
        _, text = KERNEL.source_of(spec, dtype, config)
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


@pytest.mark.parametrize("index", range(4))
def test_blocks_for_tools_trade_no_registers_and_can_be_launched(index: int) -> None:
    """Registers are those of four parts of an SM, each of which gets every fourth warp. The widest tiles need more."""
    spec = Spec("int4", (4096, 4096), 128, "float16")
    found = [
        each for each in sm90_wgmma.configs(spec.layout, H200) if each.config.row_blocks * each.config.tokens <= 160
    ]
    for rated in found[index::12]:
        config = sm90_wgmma.Untraded(**rated.config.numbers)
        _, text = KERNEL.source_of(spec, "float16", config)
        assert "trades_registers = 0" in text
        assert config.threads == 128 * config.consumers + 64
        assert config.shared_bytes(spec.layout) == rated.config.shared_bytes(spec.layout)
        assert config.key == rated.config.key
        built = jit_compile.compile(text, "sm_90a")
        assert -(-config.threads // 128) * 32 * -(-built.registers // 8) * 8 <= 65536 // 4, config
        assert "setmaxnreg" not in jit_compile.ptx(text, "sm_90a")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_stages_are_as_many_as_fit(name: str, group_size: int) -> None:
    found = sm90_wgmma.configs(layout(name=name, group_size=group_size), H200)
    assert {rated.config.tokens for rated in found} == {16, 32, 48, *range(64, 209, 16), 256}
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
    for name, factor in (("nf4", 1.4), ("int8", 1.7)):
        us = [KERNEL.candidates(problem(16, 8192, 57344, format=each))[0].predicted_us for each in ("int4", name)]
        assert us[0] < us[1] < factor * us[0]


def test_the_right_kernel_is_chosen_on_an_h200() -> None:
    for shape in LLAMA:
        for M in (1, 4, 8):
            assert kernels.choose(problem(M, shape.K, shape.N)).kernel == "sm90_stream"
        for M in (24, 32, 48, 64, 100, 128, 256, 777, 1024, 4096):
            assert kernels.choose(problem(M, shape.K, shape.N)).kernel == "sm90_wgmma"


def test_a_kernel_made_for_the_gpu_comes_before_one_made_for_all() -> None:
    for name in FORMATS:
        for dtype in HALF:
            for K, N in ((512, 4096), (1024, 1024), (4096, 28672), (8192, 8192)):
                for M in (1, 8, 16, 32, 64, 256, 2048):
                    asked = problem(M, K, N, dtype=dtype, format=name, scale_dtype=dtype)
                    found = kernels.candidates(asked)
                    assert kernels.choose(asked).kernel in ("sm90_stream", "sm90_wgmma")
                    assert found[-1].kernel == "sm80_gemm"  # offered, for tune to time it
    on_ada = kernels.candidates(problem(16, gpu=GPUS["sm_89"]))
    assert {each.kernel for each in on_ada} == {"sm80_gemm"}


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


# ---- in words


def test_the_words_tell_what_splits_k() -> None:
    for config in (Config(2, 1, 1, 128, 4, 1), Config(2, 2, 1, 48, 8, 2), Config(1, 2, 1, 64, 8, 1)):
        text = str(config)
        assert ("groups of warps" in text) == (config.wgs_k > 1)
        assert ("2 blocks share" in text or "and 2 blocks" in text) == (config.cluster > 1)
        assert "weights are rounded to 16 bits after scaling" in text
