"""Choosing, tuning, warming up and explaining, on the CPU: what is predicted, what is kept, what is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import FORMATS, GPUS, HALF, gaussian, product_of, rows

import marlin_cupy as mc
from marlin_cupy import api, device, kernels, progress, ready, tuning
from marlin_cupy.jit import cache, launch
from marlin_cupy.kernels import Candidate, Operand, Problem, tuned
from marlin_cupy.placed import Placed
from marlin_cupy.spec import Spec

H200 = dataclasses.replace(GPUS["sm_90a"], name="NVIDIA H200", memory_gbs=4916.0)
RESULTS = Path(__file__).parents[1] / "examples" / "results"
#: How far predictions may be off what is in the results, and from one another for what was best there.
PREDICTION_SLACK, CHOICE_SLACK = 0.2, 0.2
EVERY_M = (1, 8, 9, 16, 17, 32, 64, 100, 128, 512, 4096)


def problem(M: int, K: int = 4096, N: int = 4096, **changes: Any) -> Problem:
    spec = Spec(changes.pop("format", "int4"), (K, N), changes.pop("group_size", 128), "float16")
    dtype = changes.pop("dtype", "float16")
    return dataclasses.replace(product_of(M, dtype, spec, H200), **changes)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and no memory of what was tuned in another."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    tuned.forget()
    tuned._warn.cache_clear()
    yield tmp_path / "cache"
    tuned.forget()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in host memory are taken to be on an H200, until something is launched."""

    def as_if(M: int, x: Operand, w: Spec, y: str, _: None, batch_invariant: bool = False) -> Problem:
        return Problem(M, x, w, y, H200, batch_invariant)

    monkeypatch.setattr(ready, "Problem", as_if)


# ---- what is predicted


@pytest.mark.parametrize("arch", GPUS)
def test_candidates_are_sorted_and_have_names_of_their_own(arch: str) -> None:
    for M, (K, N), format in itertools.product(EVERY_M, ((64, 64), (4096, 6144), (28672, 8192)), FORMATS):
        found = kernels.GEMM.candidates(dataclasses.replace(problem(M, K, N, format=format), gpu=GPUS[arch]))
        assert found
        assert len({each.key for each in found}) == len(found)
        order = [(each.kernel == "sm80_gemm", each.predicted_us) for each in found]  # made for all: last
        assert order == sorted(order)
        assert all(0 < each.predicted_us < np.inf for each in found)
        assert len(set(found)) == len(found)  # hashable


def test_keys_are_short_and_do_not_depend_on_the_process() -> None:
    found = {each.key for M in (1, 16, 64) for each in kernels.GEMM.candidates(problem(M))}
    assert "sm90_stream:1-8-3-2-1-2/64" in found
    assert all(len(key) < 60 and key.isascii() for key in found)


@pytest.mark.parametrize("arch", GPUS)
def test_more_work_is_predicted_to_take_longer(arch: str) -> None:
    def best(M: int, K: int, N: int) -> float:
        return kernels.GEMM.choose(dataclasses.replace(problem(M, K, N), gpu=GPUS[arch])).predicted_us

    for M, K, N in itertools.product((1, 16, 64, 300), (512, 4096, 16384), (1024, 6144, 40000)):
        assert best(M, 2 * K, N) >= best(M, K, N)
        assert best(M, K, 2 * N) >= best(M, K, N)
        assert best(4 * M, K, N) >= best(M, K, N)


@pytest.mark.parametrize("arch", GPUS)
def test_nothing_is_predicted_to_read_faster_than_the_memory(arch: str) -> None:
    for M, K, N in itertools.product((1, 16, 64), (4096, 28672), (4096, 57344)):
        asked = dataclasses.replace(problem(M, K, N), gpu=GPUS[arch])
        floor = kernels.floor_us(asked)
        assert floor is not None
        assert kernels.GEMM.candidates(asked)[0].predicted_us > floor > 0
    assert kernels.floor_us(problem(1, gpu=None)) is None


def test_the_memory_is_as_fast_as_the_driver_says_if_that_can_be() -> None:
    class Runtime:
        CUDARuntimeError = RuntimeError
        cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth = "clock", "width"

        def __init__(self, **told: int) -> None:
            self.told = told

        def deviceGetAttribute(self, name: str, index: int) -> int:
            if name not in self.told:
                raise RuntimeError(name)
            return self.told[name]

    assert device._memory_gbs(Runtime(clock=3_201_000, width=6144), 0, "sm_90a") == pytest.approx(4916.7, abs=0.1)
    for told in ({"clock": 0, "width": 6144}, {"clock": 10**9, "width": 6144}, {"clock": 3_201_000}, {}):
        assert device._memory_gbs(Runtime(**told), 0, "sm_80") == GPUS["sm_80"].memory_gbs > 0
    assert device._memory_gbs(Runtime(), 0, "sm_150a") > 0


def published(file: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / file).read_text())["rows"]
    return [row for row in found if row["M"] <= 128]


def is_of_row(candidate: Candidate, row: dict[str, Any]) -> bool:
    """Whether a row was measured with ``candidate``."""
    return candidate.kernel == row["kernel"] and str(candidate.configuration) == row["config"]


@pytest.mark.parametrize("file", ["h200.json", "h200_portable.json"])
def test_predictions_are_near_what_was_published(file: str) -> None:
    """Of what is still offered, but for tiles that have changed since."""
    offered = 0
    for row in published(file):
        asked = problem(row["M"], row["K"], row["N"])
        found = [each for each in kernels.GEMM.candidates(asked) if is_of_row(each, row)]
        for each in found:
            assert each.predicted_us == pytest.approx(row["us"]["marlin_cupy"], rel=PREDICTION_SLACK), row
        assert kernels.floor_us(asked) == pytest.approx(row["us"]["read_floor"], rel=0.04)
        offered += len(found)
    assert offered


def test_what_was_published_as_best_is_chosen_or_close_to_it() -> None:
    """What a kernel would take, beside what was published for it; and nothing that is predicted to be much slower."""
    for row in published("h200.json"):
        found = kernels.GEMM.candidates(problem(row["M"], row["K"], row["N"]))
        assert found[0].predicted_us <= (1 + PREDICTION_SLACK) * row["us"]["marlin_cupy"], row
        best = next(each for each in found if each.kernel == row["kernel"])
        for was in (each for each in found if is_of_row(each, row)):
            assert was.predicted_us <= (1 + CHOICE_SLACK) * best.predicted_us, row


# ---- what is kept


def test_measured_times_decide(cache_folder: Path) -> None:
    asked = problem(16)
    first, *_, last = kernels.GEMM.candidates(asked)
    assert kernels.GEMM.choose(asked) == first
    assert not cache_folder.exists()  # asking leaves nothing behind
    assert kernels.GEMM.remember(asked, {first.key: 9.0, last.key: 5.0, "gone:1-2": 1.0})
    assert kernels.GEMM.choose(asked) == last
    tuned.forget()  # as another process
    assert kernels.GEMM.choose(asked) == last
    assert kernels.GEMM.times(asked) == {first.key: 9.0, last.key: 5.0, "gone:1-2": 1.0}


@pytest.mark.parametrize(
    "other",
    [
        problem(15),
        problem(17),
        problem(16, N=4160),
        problem(16, K=4160),
        problem(16, format="uint4"),
        problem(16, group_size=64),
        problem(16, dtype="bfloat16"),
        problem(16, x=Operand("float16", aligned=False)),
        problem(16, gpu=dataclasses.replace(H200, name="NVIDIA H100")),
    ],
    ids=lambda each: f"{each.M} {each.x} {each.w} {each.gpu.name}",
)
def test_measured_times_hold_for_that_problem_only(cache_folder: Path, other: Problem) -> None:
    kernels.GEMM.remember(problem(16), {each.key: 1.0 for each in kernels.GEMM.candidates(problem(16))})
    assert kernels.GEMM.times(other) == {}
    assert kernels.GEMM.choose(other) == kernels.GEMM.candidates(other)[0]


def test_times_of_several_problems_are_kept_together(cache_folder: Path) -> None:
    for M in (1, 2, 3):
        tuned.forget()  # each as a process of its own
        kernels.GEMM.remember(problem(M), {"a:1": float(M)})
    kernels.GEMM.remember(problem(2), {"a:1": 7.0})
    tuned.forget()
    assert [kernels.GEMM.times(problem(M)) for M in (1, 2, 3)] == [{"a:1": 1.0}, {"a:1": 7.0}, {"a:1": 3.0}]
    assert [each.name for each in cache_folder.iterdir()] == [tuned.FILE]  # no temporary file is left
    assert cache.size(cache_folder) == (0, 0)


def test_times_of_other_sources_do_not_count(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.GEMM.remember(problem(16), {"a:1": 1.0})
    monkeypatch.setattr(tuned, "fingerprint", lambda: "of the next version")
    assert kernels.GEMM.times(problem(16)) == {}


def test_the_fingerprint_is_that_of_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = tuned.fingerprint.__wrapped__()
    assert before == tuned.fingerprint()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "other.cuh").write_text("// another kernel")
    monkeypatch.setattr(tuned.source, "source_root", lambda: tmp_path)
    assert tuned.fingerprint.__wrapped__() != before


DAMAGE = {
    "empty": "",
    "half": '{"version": 1, "rows": [{"gpu"',
    "binary": "\x00\x01",
    "a list": "[1, 2]",
    "a number": "3",
    "another version": '{"version": 99, "rows": []}',
    "rows of numbers": '{"version": 1, "rows": [1]}',
    "no times": '{"version": 1, "rows": [{"M": 1, "fingerprint": "x"}]}',
    "a time in words": '{"version": 1, "rows": [{"M": 1, "fingerprint": "x", "us": {"a:1": "fast"}}]}',
    "an infinite time": '{"version": 1, "rows": [{"M": 1, "fingerprint": "x", "us": {"a:1": Infinity}}]}',
    "times in a list": '{"version": 1, "rows": [{"M": 1, "fingerprint": "x", "us": [1.0]}]}',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(cache_folder: Path, damage: str) -> None:
    cache_folder.mkdir()
    (cache_folder / tuned.FILE).write_text(DAMAGE[damage])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert kernels.GEMM.choose(problem(1)) == kernels.GEMM.candidates(problem(1))[0]
        kernels.GEMM.choose(problem(2))
        tuned.forget()
        kernels.GEMM.choose(problem(1))
        assert kernels.GEMM.remember(problem(1), {"a:1": 1.0})
    assert len(caught) == 1
    assert tuned.FILE in str(caught[0].message)
    tuned.forget()
    assert kernels.GEMM.times(problem(1)) == {"a:1": 1.0}


def test_a_folder_that_cannot_be_written_costs_later_processes_only(cache_folder: Path) -> None:
    cache_folder.parent.mkdir(exist_ok=True)
    cache_folder.write_text("no folder")
    assert not kernels.GEMM.remember(problem(1), {"a:1": 1.0})
    assert kernels.GEMM.times(problem(1)) == {"a:1": 1.0}


def test_plans_of_every_weight_are_made_again_after_tuning(
    cache_folder: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def plan(asked: Problem, candidate: Candidate) -> str:
        made.append(candidate)
        return str(candidate)

    monkeypatch.setattr(kernels.GEMM, "plan", plan)
    weights = [mc.quantize(gaussian(256, 192, seed)) for seed in range(2)]
    for w in weights * 3:
        kernels.GEMM.ready(api.problem_of(w, 16, "float16"))
        kernels.GEMM.ready(api.problem_of(w, 1, "float16"))
    assert len(made) == 2
    asked = api.problem_of(weights[0], 16, "float16")
    slow = kernels.GEMM.candidates(asked)[-1]
    kernels.GEMM.remember(asked, {slow.key: 1.0})
    for w in weights * 3:
        assert kernels.GEMM.ready(api.problem_of(w, 16, "float16")) == str(slow)
        kernels.GEMM.ready(api.problem_of(w, 1, "float16"))
    assert len(made) == 4


# ---- tune


class FakeRig:
    """Times that are made up: by position, the later the faster. The last candidate is wrong if asked for."""

    wrong = False

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> FakeRig:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def measure(self, asked: Problem, candidates: Sequence[Candidate]) -> tuple[dict[str, float], dict[str, str]]:
        us = {each.key: 100.0 - index for index, each in enumerate(candidates)}
        wrong = {candidates[-1].key: "it is off"} if self.wrong else {}
        return {key: time for key, time in us.items() if key not in wrong}, wrong


@pytest.fixture
def rig(cache_folder: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> type[FakeRig]:
    monkeypatch.setattr(tuning, "Rig", FakeRig)
    monkeypatch.setattr(FakeRig, "wrong", False)
    return FakeRig


def test_tune_keeps_the_fastest_per_m(rig: type[FakeRig], capfd: pytest.CaptureFixture[str]) -> None:
    w = mc.quantize(gaussian(4096, 192, seed=1))
    found = mc.tune(w, [1, 16, 1], progress=False)
    assert [row.M for row in found.rows] == [1, 16]
    assert found.path == str(tuned.path())
    for row in found.rows:
        asked = api.problem_of(w, row.M, "float16")
        predicted = kernels.GEMM.candidates(asked)
        tried = len(row.candidates)
        assert 2 <= tried <= 8
        assert row.before.predicted_us == predicted[0].predicted_us
        assert row.chosen.us == 101.0 - tried
        assert kernels.GEMM.choose(asked) == predicted[tried - 1]
        assert [each.us for each in row.candidates] == sorted(each.us or np.inf for each in row.candidates)
    text = str(found)
    assert max(map(len, text.splitlines()[:-1])) <= 100
    assert "NVIDIA H200" in text
    assert str(cache_folder_of(found)) in text
    assert capfd.readouterr().err == ""
    assert kernels.GEMM.times(api.problem_of(w, 8, "float16")) == {}


def cache_folder_of(found: mc.Tuning) -> Path:
    assert found.path is not None
    return Path(found.path).parent


def test_tune_again_tries_what_is_used(rig: type[FakeRig]) -> None:
    w = mc.quantize(gaussian(4096, 192, seed=1))
    asked = api.problem_of(w, 1, "float16")
    last = kernels.GEMM.candidates(asked)[-1]
    kernels.GEMM.remember(asked, {last.key: 1.0})
    row = mc.tune(w, 1, progress=False).rows[0]
    assert row.before.config == str(last.configuration)
    assert row.before in row.candidates


def test_a_wrong_candidate_is_reported_and_never_chosen(rig: type[FakeRig]) -> None:
    rig.wrong = True
    w = mc.quantize(gaussian(256, 192, seed=1))
    row = mc.tune(w, 1, progress=False).rows[0]
    assert row.candidates[-1].wrong == "it is off"
    assert row.candidates[-1].us is None
    assert row.chosen.us == 102.0 - len(row.candidates)
    assert "WRONG" in str(mc.tune(w, 1, progress=False))
    assert kernels.GEMM.choose(api.problem_of(w, 1, "float16")).key in kernels.GEMM.times(
        api.problem_of(w, 1, "float16")
    )


def test_tune_without_a_place_to_write_says_so(rig: type[FakeRig], cache_folder: Path) -> None:
    cache_folder.write_text("no folder")
    w = mc.quantize(gaussian(256, 192, seed=1))
    with pytest.warns(UserWarning, match="cannot be written"):
        found = mc.tune(w, 1, progress=False)
    assert found.path is None
    assert "not kept" in str(found)
    assert api.explain((1, 256), "float16", w).reason.startswith("mc.tune measured")


def test_every_candidate_wrong_is_an_error(rig: type[FakeRig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig, "measure", lambda self, asked, found: ({}, {each.key: "it is off" for each in found}))
    with pytest.raises(RuntimeError, match="every candidate for M = 2 is wrong: it is off"):
        mc.tune(mc.quantize(gaussian(256, 192, seed=1)), 2, progress=False)


def test_tune_needs_a_gpu_and_says_so(cache_folder: Path) -> None:
    with pytest.raises(mc.DeviceError, match=r"the weight is on cpu; pass w\.to\('cuda'\)"):
        mc.tune(mc.quantize(gaussian(256, 192, seed=1)), 1)


@pytest.mark.parametrize("call", [mc.tune, mc.warmup])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("w", 0), ValueError, "ms is 0"),
        (("w", []), ValueError, "at least 1"),
        (("w", [1, -2]), ValueError, "at least 1"),
        (("w", 1.5), TypeError, "ms is 1.5"),
        (("w", [True]), TypeError, "number of rows"),
        (("w", 1, "float32"), ValueError, "dtype is 'float32'"),
        (("x", 1), TypeError, "pass a QuantizedTensor"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(call: Any, arguments: Any, kind: type[Exception], message: str) -> None:
    w = mc.quantize(gaussian(100, 63, seed=1))
    given = {"w": w, "x": np.zeros((2, 2), np.float32)}[arguments[0]]
    with pytest.raises(kind, match=message):
        call([given] if call is mc.warmup else given, arguments[1], dtype=(*arguments, None)[2])


class NumpyAsCupy:
    """NumPy with as much of CuPy's interface as the rig uses."""

    asarray, empty, stack = staticmethod(np.asarray), staticmethod(np.empty), staticmethod(np.stack)

    class cuda:
        class runtime:
            @staticmethod
            def memGetInfo() -> tuple[int, int]:
                return 1 << 20, 1 << 30

        class Device(contextlib.nullcontext[None]):
            def synchronize(self) -> None:
                pass

        class Stream(contextlib.nullcontext[Any]):
            def __init__(self, non_blocking: bool = False) -> None:
                super().__init__(self)

            def synchronize(self) -> None:
                pass

    class get_default_memory_pool:
        def free_all_blocks(self) -> None:
            pass


class StepRun:
    """Runs the steps at once; nothing is captured."""

    def __init__(self, stream: Any, steps: Sequence[Any], error: None) -> None:
        self.steps, self.launches = steps, len(steps)

    def replay(self) -> None:
        for step in self.steps:
            step()

    def capture(self, rounds: int) -> StepRun:
        return self


@pytest.mark.parametrize("dtype", HALF)
def test_the_rig_times_what_is_right_and_reports_what_is_not(
    cache_folder: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    wrong = kernels.GEMM.candidates(problem(70, 300, 129, dtype=dtype))[1]

    class Multiplies:
        def __init__(self, candidate: Candidate) -> None:
            self.factor = 2 if candidate.key == wrong.key else 1

        def multiply(self, framework: Any, x: Any, w: Placed, bias: None, out: Any, dependent: bool) -> None:
            values = np.concatenate([values for _, values in w.blocks()], axis=1) * self.factor
            out[...] = (x.astype(np.float32) @ values).astype(out.dtype)

    monkeypatch.setattr(kernels.GEMM, "plan", lambda asked, candidate: Multiplies(candidate))
    monkeypatch.setattr(tuning, "import_cupy", lambda purpose: NumpyAsCupy)
    monkeypatch.setattr(mc.QuantizedTensor, "to", lambda self, where: self)
    monkeypatch.setattr(tuning.timing, "CupyRun", StepRun)
    monkeypatch.setattr(tuning.timing, "EventTimer", lambda stream: lambda replay, count: float(count))
    w = mc.quantize(gaussian(300, 129, seed=1))
    found = mc.tune(w, 70, dtype=dtype, progress=False)
    assert found.title.endswith(f"{dtype} on NVIDIA H200")
    assert [each.config for each in found.rows[0].candidates if each.wrong] == [str(wrong.configuration)]
    rig = tuning.Rig(w, dtype, H200)
    with rig:
        assert len(rig._weights) == 1 + min((1 << 19) // w.nbytes, tuning.timing.MAX_LAUNCHES - 1)


def test_the_check_finds_a_wrong_element() -> None:
    right = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    columns, bound = slice(0, 256), tuning.tolerance(problem(16))
    assert 0.001 < bound < 0.01
    check = tuning.Check(right[:4, columns], columns, bound)
    lost, elsewhere, no_number = right.copy(), right.copy(), right.copy()
    lost[2, 3] = elsewhere[9, 400] = 0
    no_number[15, 511] = np.nan
    assert "dequantized product" in str(check(-right))
    assert check(right) is None
    assert check(right * (1 + bound / 4)) is None
    assert "dequantized product" in str(check(lost))
    assert "first candidate" in str(check(elsewhere))
    assert "first candidate" in str(check(no_number))


def test_the_check_passes_weights_that_are_zero() -> None:
    zeros = np.zeros((16, 512), np.float32)
    check = tuning.Check(zeros[:4], slice(0, 512), tuning.tolerance(problem(16)))
    assert check(zeros) is None
    assert check(zeros + 1) is not None


def test_progress_without_rich_is_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress.bar("tuning", 2) as begin:
        begin("M = 1")
        begin("M = 2")
    assert capsys.readouterr().err == "tuning: M = 1\ntuning: M = 2\n"
    with progress.bar("tuning", 1, show=False) as begin:
        begin("M = 3")
    assert capsys.readouterr().err == ""


def test_progress_with_rich_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.bar("tuning", 2) as begin:
        begin("M = 1")
    assert capfd.readouterr().out == ""


# ---- warmup


def test_warmup_compiles_each_kernel_once_and_fills_the_plans(
    cache_folder: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(name: str, source: str, arch: str, device: int, entry: str, *shared_bytes: int) -> object:
        loaded.append(source)
        return object()

    monkeypatch.setattr(launch, "load", load)
    weights = [mc.quantize(gaussian(2048, N, seed=1)) for N in (192, 192, 128)]
    count = mc.warmup(weights, (1, 2, 16, 64))
    assert count == len(set(loaded)) >= 3
    loaded.clear()
    for w in weights:
        for m in (1, 2, 16, 64):
            kernels.GEMM.ready(api.problem_of(w, m, "float16"))
    assert not loaded
    assert mc.warmup(iter(weights[:1]), 1, dtype="bfloat16") == 1


def test_warmup_passes_errors_on(cache_folder: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> object:
        raise mc.CompileError("NVRTC does not like it")

    monkeypatch.setattr(launch, "load", load)
    with pytest.raises(mc.CompileError, match="does not like it"):
        mc.warmup(mc.quantize(gaussian(256, 192, seed=1)), (1, 16, 64))


def test_warmup_of_weights_in_host_memory_has_nothing_to_compile() -> None:
    w = mc.quantize(gaussian(100, 63, seed=1))
    assert mc.warmup(w, [1, 5]) == 0
    assert mc.warmup([], 1) == 0


# ---- explain


def test_explain_says_why_before_and_after_tuning(cache_folder: Path, on_gpu: None) -> None:
    w = mc.quantize(gaussian(4096, 192, seed=1))
    found = mc.explain((3, 4096), "float16", w)
    assert "are predicted, the least of" in found.reason
    assert "not tuned" in found.reason
    assert found.floor_us == kernels.floor_us(api.problem_of(w, 3, "float16"))
    assert (found.candidates[0].kernel, found.candidates[0].config) == (found.kernel, found.config)
    assert all(each.measured_us is None for each in found.candidates)

    asked = api.problem_of(w, 3, "float16")
    slow = kernels.GEMM.candidates(asked)[-1]
    kernels.GEMM.remember(asked, {slow.key: 3.25, kernels.GEMM.candidates(asked)[1].key: 4.5})
    found = mc.explain((3, 4096), "float16", w)
    assert found.config == str(slow.configuration)
    assert found.reason == "mc.tune measured 3.25 us, the least of 2 candidates"
    assert [each.measured_us for each in found.candidates[:3]] == [3.25, 4.5, None]
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("3.25", "4.50", "predicted", "measured", "reading the weight takes about"):
        assert part in text
    assert set(found.passed_over) == {kernel.name for kernel in kernels.GEMM.kernels} - {found.kernel}
    for name in found.passed_over:
        assert f"not {name}: " in text


def test_explain_of_host_memory_is_short() -> None:
    found = mc.explain((3, 100), "float16", mc.quantize(gaussian(100, 63, seed=1)))
    assert found.floor_us is None
    assert "host memory" in found.reason
    assert "predicted" not in str(found)


# ---- batch_invariant


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(100, 63), (512, 384)], ids=str)
def test_rows_have_the_same_bits_in_any_company(dtype: str, shape: tuple[int, int]) -> None:
    w = mc.quantize(gaussian(*shape, seed=1))
    x = rows((37, shape[0]), seed=2, dtype=dtype)
    whole = mc.matmul(x, w, batch_invariant=True)
    for part in (slice(0, 1), slice(3, 4), slice(5, 9), slice(1, 37), slice(36, 37)):
        assert (mc.matmul(x[part], w, batch_invariant=True).view(np.uint16) == whole[part].view(np.uint16)).all()
    assert (mc.matmul(x[:, None], w, batch_invariant=True)[:, 0].view(np.uint16) == whole.view(np.uint16)).all()
    assert mc.matmul(x[:0], w, batch_invariant=True).shape == (0, shape[1])
    np.testing.assert_allclose(whole.astype(np.float32), mc.matmul(x, w).astype(np.float32), rtol=0.02, atol=0.02)


def test_kernels_that_cannot_promise_it_refuse() -> None:
    asked = problem(4, batch_invariant=True)
    for name in ("sm80_gemm", "sm90_stream"):
        assert "batch_invariant" in str(kernels.GEMM.refusals(asked)[name])
    with pytest.raises(mc.UnsupportedError, match="batch_invariant was asked for"):
        kernels.GEMM.choose(dataclasses.replace(asked, gpu=GPUS["sm_80"]))


def test_explain_takes_batch_invariant() -> None:
    w = mc.quantize(gaussian(100, 63, seed=1))
    assert "one row at a time" in mc.explain((3, 100), "float16", w, batch_invariant=True).config
    assert "all rows at once" in mc.explain((3, 100), "float16", w).config
