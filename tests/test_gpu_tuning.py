"""tune, warmup and explain on a GPU, and every candidate that they choose from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cupy
import pytest
from cases import FORMATS, HALF, quantized
from gpu_arrays import (
    activations,
    assert_same_bits,
    float64,
    is_poison,
    poisoned_with_guard,
    rounding_of,
    weights,
)
from product import Product
from typer.testing import CliRunner

import marlin_cupy as mc
from marlin_cupy import __main__ as cli
from marlin_cupy import frameworks, kernels
from marlin_cupy.api import problem_of
from marlin_cupy.device import gpu
from marlin_cupy.jit import cache, launch
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.kernels import tuned

pytestmark = pytest.mark.gpu


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    tuned.forget()
    yield tmp_path
    tuned.forget()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", HALF)
def test_every_candidate_is_right(name: str, dtype: str) -> None:
    """Not only those that are chosen: tune may choose any of them."""
    for K, N in ((1030, 3000), (4160, 513), (256, 33000)):
        w = quantized(weights(K, N), name, 64)
        x = activations(129, K, dtype)
        product = Product(float64(x), float64(w.dequantize("float32")))
        for M in (1, 8, 9, 16, 17, 64, 129):
            problem = problem_of(w, M, dtype)
            for candidate in kernels.GEMM.candidates(problem):
                out, guard = poisoned_with_guard(M, N, dtype)
                rows = x[:M]
                kernels.GEMM.plan(problem, candidate).multiply(frameworks.of(rows), rows, w.placed, None, out, True)
                rounding = kernels.GEMM.rounding(problem, candidate)
                product.check(float64(out), rounding, f"M={M}, K={K}, N={N}: {candidate}")
                assert is_poison(guard), str(candidate)


@pytest.mark.parametrize("name", FORMATS)
def test_tune_finds_nothing_wrong_and_its_choice_is_used(cache_folder: Path, name: str) -> None:
    w, other = (mc.quantize(weights(2048, 3000), name) for _ in range(2))
    packed = w.packed.copy()
    mc.matmul(activations(16, 2048, "float16"), other)
    found = mc.tune(w, (1, 16, 40), progress=False)
    assert bool((w.packed == packed).all())
    for row in found.rows:
        assert not [each for each in row.candidates if each.wrong], str(found)
        assert row.chosen.us == min(each.us or 0 for each in row.candidates)
        assert row.floor_us > 0
        for each in (w, other):
            explained = mc.explain((row.M, 2048), "float16", each)
            assert explained.config == row.chosen.config
            assert explained.reason.startswith(f"mc.tune measured {row.chosen.us:.2f} us")
            assert str(kernels.GEMM.ready(problem_of(each, row.M, "float16"))) == row.chosen.config
        x = activations(row.M, 2048, "float16")
        product = Product(float64(x), float64(w.dequantize("float32")))
        product.check(float64(mc.matmul(x, other)), rounding_of(row.M, "float16", other), str(row.chosen))
    assert "not tuned" in mc.explain((2, 2048), "float16", w).reason
    kept = json.loads((cache_folder / tuned.FILE).read_text())
    assert {row["gpu"] for row in kept["rows"]} == {gpu().name}
    assert [row["M"] for row in kept["rows"]] == [1, 16, 40]


def test_tune_notices_a_wrong_kernel(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = mc.quantize(weights(2048, 3000))
    fast = kernels.GEMM.candidates(problem_of(w, 16, "float16"))[0]
    plan = kernels.GEMM.plan

    class Lazy:
        def multiply(self, framework: object, x: object, w: object, bias: object, out: object, dependent: bool) -> None:
            pass

    monkeypatch.setattr(kernels.GEMM, "plan", lambda asked, each: Lazy() if each == fast else plan(asked, each))
    row = mc.tune(w, 16, progress=False).rows[0]
    assert [each.config for each in row.candidates if each.wrong] == [str(fast.configuration)]
    assert row.chosen.config != str(fast.configuration)


def test_tune_for_other_dtypes_and_large_m(cache_folder: Path) -> None:
    w = mc.quantize(weights(1030, 513), "int8", 48, scale_dtype="bfloat16")
    for dtype in (None, "float16"):
        found = mc.tune(w, (1, 300), dtype=dtype, progress=False)
        assert not [each for row in found.rows for each in row.candidates if each.wrong], str(found)
    assert str(found).count("\n") >= 3


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1.0, 1e4])
def test_tune_takes_weights_of_any_size(cache_folder: Path, factor: float) -> None:
    w = mc.quantize(weights(1030, 513) * cupy.float32(factor), scale_dtype="bfloat16")
    found = mc.tune(w, 16, dtype="float16", progress=False)
    assert not [each for row in found.rows for each in row.candidates if each.wrong], str(found)


def test_times_are_near_those_that_are_predicted(cache_folder: Path) -> None:
    """A sanity check, with room for other GPUs than the one that the costs were fitted to."""
    w = mc.quantize(weights(4096, 4096))
    for row in mc.tune(w, (1, 16, 64), progress=False).rows:
        assert row.chosen.us is not None
        assert 0.2 < row.chosen.us / row.chosen.predicted_us < 5
        assert row.chosen.us > 0.5 * row.floor_us


def test_warmup_leaves_nothing_to_compile_or_load(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.load.cache_clear()
    several = [mc.quantize(weights(1030, N), name) for N in (513, 3000) for name in ("int4", "nf4")]
    count = mc.warmup(several, (1, 12, 64))
    assert count >= 4
    assert cache.size(cache_folder)[0] == count

    def never(*_: object) -> None:
        raise AssertionError("compiled or loaded")

    monkeypatch.setattr(jit_compile, "compile", never)
    monkeypatch.setattr(launch, "load", never)
    for w in several:
        for M in (1, 12, 64):
            x = activations(M, 1030, "float16")
            product = Product(float64(x), float64(w.dequantize("float32")))
            product.check(float64(mc.matmul(x, w)), rounding_of(M, "float16", w), f"M={M}, {w!r}")


def test_warmup_takes_what_tune_found(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = mc.quantize(weights(2048, 3000))
    chosen = mc.tune(w, 16, progress=False).rows[0].chosen
    mc.warmup(w, 16)
    assert str(kernels.GEMM.ready(problem_of(w, 16, "float16"))) == chosen.config


def test_tuning_leaves_no_memory_behind(cache_folder: Path) -> None:
    w = mc.quantize(weights(2048, 3000))
    mc.tune(w, 1, progress=False)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    mc.tune(w, 1, progress=False)
    assert pool.used_bytes() <= before + (8 << 20)  # counters of captured launches are never used again


def test_repeated_tuning_gives_the_same_bits_per_choice(cache_folder: Path) -> None:
    w = mc.quantize(weights(2048, 3000))
    mc.tune(w, 16, progress=False)
    x = activations(16, 2048, "float16")
    assert_same_bits(mc.matmul(x, w), mc.matmul(x, w))


def test_the_command_line_tunes(cache_folder: Path) -> None:
    done = CliRunner().invoke(cli.app, ["tune", "--shape", "small=1024x512", "--m", "1", "--m", "16"])
    assert done.exit_code == 0, done.output
    for text in ("small: int4 1024 x 512", "chosen", "predicted", "to read the weight", tuned.FILE):
        assert text in done.output
