"""What of the benchmark needs no GPU: its arithmetic, its order of work, its files, and that its kernel builds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import GPUS
from rich.console import Console

from marlin_cupy import kernels, numerics, timing
from marlin_cupy.bench import (
    compile_times,
    configs,
    contenders,
    contenders_torch,
    formats,
    host_overhead,
    read_floor,
    report,
    run,
    shapes,
)
from marlin_cupy.bench.contenders import CUBLAS, FLOOR, HUMMING, OURS, TINYGEMM, Contender, Setup, UnavailableError
from marlin_cupy.bench.read_floor_bulk import BulkShape
from marlin_cupy.bench.report import Report, Row
from marlin_cupy.bench.shapes import Shape
from marlin_cupy.device import Gpu
from marlin_cupy.jit import compile as nvrtc
from marlin_cupy.kernels import reference
from marlin_cupy.scalars import by_name
from marlin_cupy.timing import Replay, Run, Sampling

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
L2 = 60 << 20  # of an H200
GPU = Gpu(0, "a GPU", "sm_90a", 132, 232448, 233472, L2)
SETUP = Setup(Shape("small", 256, 128), "int4", 128, "float16", GPU, None)
BRIEF = Sampling(sample_ms=10.0, samples=3, warmup_rounds=1)


# ---- shapes


def test_llama_layers() -> None:
    assert {(shape.K, shape.N) for shape in shapes.LLAMA} == {
        (4096, 6144),
        (4096, 4096),
        (4096, 28672),
        (14336, 4096),
        (8192, 10240),
        (8192, 8192),
        (8192, 57344),
        (28672, 8192),
    }
    assert len({shape.name for shape in shapes.LLAMA}) == 8
    assert set(shapes.QUICK) <= set(shapes.LLAMA)
    assert len(shapes.QUICK) == 2


@pytest.mark.parametrize("shape", shapes.LLAMA, ids=lambda shape: shape.name)
def test_shapes_survive_their_text(shape: Shape) -> None:
    assert shapes.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "qkv", "4096x4096", "=1x2", "a=1", "a=1x", "a=0x4", "a=4x0", "a=-1x4", "a=1x2x3"])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="NAME=KxN"):
        shapes.parse(text)


# ---- timing


@pytest.mark.parametrize(
    ("weight_bytes", "expected"),
    [(8_650_752, 30), (30_277_632, 9), (242_221_056, 2), (939_524_096, 2), (1, 64), (4 << 20, 60)],
)
def test_copies_exceed_four_times_l2(weight_bytes: int, expected: int) -> None:
    count = timing.copies(weight_bytes, L2)
    assert count == expected
    assert count == timing.MAX_LAUNCHES or count * weight_bytes >= max(4 * L2, 200_000_000)
    assert timing.is_cold(weight_bytes, count, L2) == (weight_bytes > 1)


def test_a_small_cache_still_asks_for_200_megabytes() -> None:
    assert timing.copies(50_000_000, 1 << 20) == 4


@pytest.mark.parametrize(
    ("count", "round_ms", "expected"),
    [(30, 0.15, 2), (2, 0.11, 32), (2, 130.0, 1), (2, 5.0, 2), (64, 0.1, 1), (9, 0.0, 7)],
)
def test_rounds_fill_a_graph_but_not_more_than_a_sample(count: int, round_ms: float, expected: int) -> None:
    assert timing.rounds(count, round_ms, 12.0) == expected


def test_summary_is_median_and_percentiles() -> None:
    assert timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((3.0, 1.4, 4.6))
    assert timing.summarize([7.0]) == (7.0, 7.0, 7.0)


@dataclasses.dataclass
class FakeGraph:
    name: str
    launches: int
    ms: float
    log: list[str]

    def replay(self) -> None:
        self.log.append(self.name)


def fake_timer(graph: Any, count: int) -> float:
    for _ in range(count):
        graph.replay()
    return float(count * graph.ms)


def test_contenders_take_turns_and_the_order_turns_round() -> None:
    log: list[str] = []
    graphs = {"a": FakeGraph("a", 4, 2.0, log), "b": FakeGraph("b", 10, 30.0, log)}
    found = timing.interleave(graphs, fake_timer, BRIEF)
    # each twice to estimate, then samples of 10 ms: 5 replays of a, 1 of b
    assert "".join(log) == "aabb" + "aaaaab" + "baaaaa" + "aaaaab" + "baaaaa"
    assert found == {"a": (500.0, 500.0, 500.0), "b": (3000.0, 3000.0, 3000.0)}


def test_warm_up_samples_do_not_count() -> None:
    graph = FakeGraph("a", 1, 10.0, [])
    durations = iter([10.0, 10.0, 99.0, 10.0, 20.0, 30.0])
    found = timing.interleave({"a": graph}, lambda *_: next(durations), BRIEF)
    assert found["a"].median == pytest.approx(20_000.0)


class FakeRun(Run):
    """Two weight copies; ``fail`` is raised on the first launch."""

    def __init__(self, error: float | None, fail: Exception | None = None) -> None:
        self.log: list[str] = []
        self.ms = 3.0
        self._error, self._fail = error, fail

    @property
    def launches(self) -> int:
        return 2

    def replay(self) -> None:
        if self._fail is not None:
            raise self._fail
        self.log.append("replay")

    def capture(self, rounds: int) -> Replay:
        self.log.append(f"capture {rounds}")
        return FakeGraph("graph", 2 * rounds, 1.0, self.log)

    def error(self, graph: Replay) -> float | None:
        assert isinstance(graph, FakeGraph)
        self.log.append("check")
        return self._error


def test_a_run_is_warmed_up_before_it_is_captured() -> None:
    fake = FakeRun(0.0)
    graph = timing.prepare(fake, fake_timer, BRIEF)
    assert fake.log == ["replay", "replay", "capture 3"]
    assert graph.launches == 6


# ---- contenders


def test_relative_error_sees_small_and_missing_differences() -> None:
    expected = np.random.default_rng(0).standard_normal((8, 100)).astype(np.float32)
    assert contenders.relative_error(expected, expected) == 0
    assert contenders.relative_error(expected * np.float32(1.01), expected) == pytest.approx(0.01, rel=1e-3)
    poisoned = expected.copy()
    poisoned[3, 7] = np.nan
    assert math.isnan(contenders.relative_error(poisoned, expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_poison_is_nan_and_survives_the_conversion(dtype: str) -> None:
    array = np.full((2, 3), contenders._NAN_BITS, dtype=np.uint16).view(by_name(dtype).dtype)
    assert np.isnan(contenders.as_float32(array, dtype)).all()


def test_product_is_a_matrix_product_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_COLUMNS_AT_ONCE", 2)
    rng = np.random.default_rng(1)
    x, dense = rng.standard_normal((3, 16), dtype=np.float32), rng.standard_normal((16, 5), dtype=np.float32)
    np.testing.assert_allclose(contenders.product(x, dense), x.astype(np.float64) @ dense, rtol=1e-12)


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in ("torch", "humming"):
            raise ImportError(f"no module named {name}")
        return original(name, package)

    monkeypatch.setattr(contenders_torch.importlib, "import_module", refuse)


@pytest.mark.parametrize(
    "make",
    [
        contenders_torch.TorchCublas,
        contenders_torch.Tinygemm,
        lambda setup: contenders_torch.Humming(setup, [1]),
    ],
    ids=[CUBLAS, TINYGEMM, HUMMING],
)
def test_without_torch_its_contenders_say_so(
    make: Callable[[Setup], Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_torch(monkeypatch)
    with pytest.raises(UnavailableError, match="PyTorch is not installed"):
        make(SETUP)


class FakeContender(Contender):
    """A contender with a FakeRun."""

    weight_bytes, copies, description = 1 << 20, 2, "a fake"

    def __init__(
        self, name: str, error: float | None, fail: Exception | None = None, reason: str | None = None
    ) -> None:
        self.name = name
        self._run, self._reason = FakeRun(error, fail), reason

    def refuses(self, m: int) -> str | None:
        return self._reason

    def tolerance(self, m: int) -> float:
        return 1e-3

    def details(self, m: int, dependent: bool) -> tuple[str, str]:
        return "kernel of " + self.name, f"M = {m}"

    def run(self, m: int, dependent: bool) -> Run:
        self.dependent = dependent
        return self._run


def measure_cell(*fakes: FakeContender, launch: str = "plain") -> Row:
    field = run.Field(SETUP, fakes, {TINYGEMM: "PyTorch is not installed"})
    (found,) = run.measure([field], 16, launch, fake_timer, BRIEF)
    return found


def test_a_cell_has_times_errors_and_reasons() -> None:
    row = measure_cell(
        FakeContender(OURS, 2e-4),
        FakeContender(FLOOR, None),
        FakeContender(CUBLAS, 1e-4, reason="it is shy"),
        FakeContender(HUMMING, 1e-4, fail=RuntimeError("no compiler.\nmore")),
    )
    assert (row.name, row.K, row.N, row.M, row.format, row.group_size) == ("small", 256, 128, 16, "int4", 128)
    assert (row.kernel, row.config, row.launch) == ("kernel of marlin_cupy", "M = 16", "plain")
    assert set(row.us) == set(row.spread) == {OURS, FLOOR}
    assert row.us[OURS] == pytest.approx(1000 / 6)
    assert (row.error, row.errors) == (2e-4, {OURS: 2e-4})
    assert row.skipped == {
        TINYGEMM: "PyTorch is not installed",
        CUBLAS: "it is shy",
        HUMMING: "RuntimeError: no compiler",
    }
    assert row.wrong == []
    assert not row.cold


def test_contenders_of_several_fields_take_turns_and_have_a_row_each() -> None:
    fakes = [FakeContender(name, 2e-4) for _ in range(2) for name in (OURS, FLOOR)]
    log: list[str] = []
    for fake, name in zip(fakes, "abcd", strict=True):
        fake._run.log = NamedLog(log, name)
    fields = [
        run.Field(dataclasses.replace(SETUP, format=name), fakes[i : i + 2]) for i, name in ((0, "int4"), (2, "nf4"))
    ]
    rows = run.measure(fields, 16, "plain", fake_timer, Sampling(sample_ms=1.0, samples=2, warmup_rounds=1))
    assert [row.format for row in rows] == ["int4", "nf4"]
    assert all(set(row.us) == {OURS, FLOOR} for row in rows)
    assert "".join(log).endswith("abcd" + "dcba" + "abcd")
    assert rows[0].weight_bytes == 1 << 20


class NamedLog(list[str]):
    """Of one contender, for replays of its graph: written into the log of all."""

    def __init__(self, log: list[str], name: str) -> None:
        super().__init__()
        self._log, self._name = log, name

    def append(self, word: str) -> None:
        if word == "graph":
            self._log.append(self._name)


@pytest.mark.parametrize(("launch", "dependent"), [("plain", False), ("dependent", True)])
def test_a_row_says_how_its_contenders_were_launched(launch: str, dependent: bool) -> None:
    fakes = FakeContender(OURS, 2e-4), FakeContender(FLOOR, None)
    assert measure_cell(*fakes, launch=launch).launch == launch
    assert [fake.dependent for fake in fakes] == [dependent] * 2


@pytest.mark.parametrize("error", [2e-3, math.nan, math.inf])
@pytest.mark.parametrize("wrong", [OURS, CUBLAS])
def test_a_failed_check_takes_the_time_away(wrong: str, error: float) -> None:
    row = measure_cell(*(FakeContender(name, error if name == wrong else 1e-4) for name in (OURS, CUBLAS)))
    assert row.wrong == [wrong]
    assert wrong not in row.us
    assert len(row.us) == 1


def test_a_failure_of_ours_is_no_footnote() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        measure_cell(FakeContender(OURS, 0.0, fail=RuntimeError("broken")))


# ---- read floor


@pytest.mark.parametrize("arch", ARCHS)
def test_the_read_floor_builds_and_keeps_its_loads_in_registers(arch: str) -> None:
    gpu = GPUS[arch]
    served = [shape for shape in read_floor.CANDIDATES if shape.serves(gpu)]
    assert any(isinstance(shape, BulkShape) for shape in served) == (arch not in ("sm_80", "sm_86", "sm_89"))
    assert all(shape.shared_bytes(gpu) <= gpu.shared_per_block for shape in served)
    assert len(set(map(str, served))) == len(served)
    for source in sorted({read_floor.kernel_source(shape) for shape in served}):
        build = nvrtc.compile(source, arch)
        assert build.spill_bytes == 0
        assert build.registers * 16 < 1024  # no launch shape asks for more than 1024 threads per SM and 64 registers


# ---- report


def row(name: str = "8b_o", m: int = 1, **changes: Any) -> Row:
    shape = next((shape for shape in shapes.LLAMA if shape.name == name), Shape(name, 128, 64))
    us = {OURS: 5.5 * m, FLOOR: 4.1, CUBLAS: 14.25 + m, TINYGEMM: 6.75 * m, HUMMING: 8.5 + m / 8}
    values: dict[str, Any] = {
        "K": shape.K,
        "N": shape.N,
        "M": m,
        "name": name,
        "format": "int4",
        "group_size": 128,
        "dtype": "float16",
        "launch": "plain",
        "us": us,
        "spread": {contender: [0.99 * value, 1.02 * value] for contender, value in us.items()},
        "error": 2.1e-4,
        "kernel": "sm80_gemm",
        "config": "64 x 8 tile",
        "errors": {OURS: 2.1e-4, CUBLAS: 1.9e-4},
    }
    return Row(**(values | changes))


def full_report() -> Report:
    rows = [row(shape.name, m) for shape in shapes.LLAMA for m in shapes.M_VALUES]
    return Report({"gpu": {"name": "NVIDIA H200"}, "protocol": "", "contenders": {}}, rows)


def shown(found: Report) -> str:
    output = io.StringIO()
    report.show(found, Console(file=output, width=report.WIDTH))
    return output.getvalue()


def test_the_table_fits_and_cuts_nothing_off() -> None:
    slowest = row("70b_gate_up", 2048, us=dict.fromkeys((OURS, FLOOR, CUBLAS, TINYGEMM, HUMMING), 130484.2))
    text = shown(dataclasses.replace(full_report(), rows=[*full_report().rows, slowest]))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    for expected in ("70b_gate_up", "8192x57344", "130484", "cuBLAS / ours", "ours / floor", "tinygemm", "humming"):
        assert expected in text
    first = next(line for line in text.splitlines() if line.strip().startswith("8b_o "))
    assert first.split() == ["8b_o", "1", "5.50", "4.10", "15.25", "6.75", "8.62", "1.34", "2.77"]


def test_the_table_names_what_is_wrong_missing_warm_and_how_far_samples_spread() -> None:
    us = {OURS: 5.0, FLOOR: 4.0}
    spread = {OURS: [4.9, 5.1], FLOOR: [4.0, 4.0]}
    found = Report(
        {"contenders": {CUBLAS: "the library"}},
        [
            row(us=us, spread=spread, wrong=[CUBLAS], errors={CUBLAS: math.nan}, skipped={HUMMING: "it is not there"}),
            row("tiny", us=us, spread=spread, cold=False, skipped={HUMMING: "it is not there"}),
        ],
    )
    text = shown(found)
    assert "wrong" in text
    assert "WRONG: cublas on 8b_o, M = 1, int4: relative error nan." in text
    assert "cuBLAS: the library." in text
    assert text.count("Without humming: it is not there.") == 1
    assert "warm cache: tiny." in text
    assert "at most 4.0% of the median (8b_o, M = 1)" in text


def test_formats_have_a_table_each() -> None:
    text = shown(Report({}, [row(), row(format="nf4", group_size=64)]))
    assert "int4, group size 128, float16" in text
    assert "nf4, group size 64, float16" in text


def test_dependent_launches_have_a_table_of_their_own() -> None:
    text = shown(Report({}, [row(), row(launch="dependent"), row(m=2), row(m=2, launch="dependent")]))
    assert text.count("int4, group size 128, float16, microseconds") == 2
    assert text.count("microseconds, dependent") == 1


def test_results_survive_the_file(tmp_path: Path) -> None:
    found = full_report()
    found.save(tmp_path / "new" / "bench.json")
    assert Report.load(tmp_path / "new" / "bench.json") == found


def test_the_file_has_the_fields_that_others_read(tmp_path: Path) -> None:
    Report({"gpu": {}}, [row(error=math.nan)]).save(tmp_path / "bench.json")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert set(content) == {"header", "rows"}
    (found,) = content["rows"]
    needed = {
        "K",
        "N",
        "M",
        "name",
        "format",
        "group_size",
        "dtype",
        "launch",
        "us",
        "spread",
        "error",
        "kernel",
        "config",
    }
    assert needed <= set(found)
    assert found["error"] is None  # JSON has no NaN
    assert set(found["us"]) == {"marlin_cupy", "read_floor", "cublas", "tinygemm", "humming"}


@pytest.mark.parametrize("text", ["", "{}", '{"header": {}, "rows": [{"K": 1}]}', '{"header": 1, "rows": []}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="holds no benchmark results"):
        Report.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "rows",
    [
        full_report().rows,
        [row()],
        [row(us={OURS: 5.0, FLOOR: 4.0})],
        [row(us={}, spread={}, wrong=[OURS])],
        [row(m=m, format=format) for m in (1, 16) for format in ("int4", "nf4")],
        [row(m=m, launch=launch) for m in (1, 16) for launch in ("plain", "dependent")],
    ],
    ids=["full", "one cell", "no peers", "no times", "two formats", "two launches"],
)
def test_plots_are_written(rows: list[Row], tmp_path: Path) -> None:
    found = Report({}, rows)
    paths = report.save_all(found, tmp_path / "results")
    assert [path.name for path in paths] == ["bench.json", "bench_times.png", "bench_speedup.png"]
    for path in paths[1:]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_a_json_path_names_all_files(tmp_path: Path) -> None:
    paths = report.save_all(Report({}, [row()]), tmp_path / "h200.json")
    assert [path.name for path in paths] == ["h200.json", "h200_times.png", "h200_speedup.png"]
    assert all(path.parent == tmp_path and path.is_file() for path in paths)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/anywhere/marlin_cupy/__main__.py", "bench", "--m", "16"], "python -m marlin_cupy bench --m 16"),
        (["/a/marlin_cupy/b/marlin_cupy/bench/host_overhead.py"], "python -m marlin_cupy.bench.host_overhead"),
        (["/usr/local/bin/marlin-cupy", "bench", "--output", "my results"], "marlin-cupy bench --output 'my results'"),
    ],
)
def test_the_command_has_no_place_of_this_machine(arguments: list[str], expected: str) -> None:
    assert report.command(arguments) == expected


def test_the_header_says_what_a_result_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "gpu", lambda index: GPU)
    header = report.header(protocol="as told")
    assert {"gpu", "driver", "versions", "commit", "command", "date", "protocol"} <= set(header)
    assert header["gpu"]["name"] == "a GPU"
    assert {"marlin_cupy", "python", "numpy"} <= set(header["versions"])
    json.dumps(header)


# ---- without a GPU


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, host_overhead, compile_times, formats):
        monkeypatch.setattr(module, "gpu_count", lambda: 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: run.run(None, None, None, None, "float16", None, True),
        lambda: host_overhead.main([]),
        lambda: compile_times.main(["--m", "1"]),
        lambda: formats.main(["--m", "1"]),
    ],
    ids=["bench", "host_overhead", "compile_times", "formats"],
)
def test_without_a_gpu_one_sentence_and_exit_code_1(
    call: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_gpu(monkeypatch)
    assert call() == 1
    output = capsys.readouterr().out
    assert output.startswith("The benchmark needs a CUDA GPU that CuPy can use, and there is none: ")
    assert output.count("\n") == 1


def test_what_was_measured_is_kept_when_the_run_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Report({}, [])
    interrupted = run.reported(found, report.show, report.save_all, tmp_path)
    with contextlib.suppress(KeyboardInterrupt), interrupted:
        found.rows.append(row())
        raise KeyboardInterrupt
    assert "8b_o" in capsys.readouterr().out
    assert Report.load(tmp_path / "bench.json") == found


# ---- a whole run, with NumPy in the place of CuPy and the CPU in the place of the GPU


class HostGraph:
    def __init__(self, stream: HostStream) -> None:
        self._steps = stream.steps

    def launch(self, stream: HostStream) -> None:
        for step in self._steps:
            step()


class HostStream(contextlib.nullcontext["HostStream"]):
    """Collects the multiplications that are made while it captures."""

    def __init__(self, non_blocking: bool = False) -> None:
        super().__init__(self)
        self.ptr = 1
        self.steps: list[Callable[[], object]] = []
        self.capturing = False

    def begin_capture(self) -> None:
        self.capturing, self.steps = True, []

    def end_capture(self) -> HostGraph:
        self.capturing = False
        return HostGraph(self)


class HostEvent:
    def record(self, stream: HostStream) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = HostStream()
    rng = np.random.default_rng(0)
    cuda = SimpleNamespace(
        Device=lambda index=0: contextlib.nullcontext(),
        Stream=lambda non_blocking: stream,
        Event=HostEvent,
        get_elapsed_time=lambda first, last: 1e3 * (last.time - first.time),
        MemoryPool=lambda: SimpleNamespace(malloc=None),
        using_allocator=lambda allocator: contextlib.nullcontext(),
    )

    def on_stream(function: Callable[..., object]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            if stream.capturing:
                stream.steps.append(lambda: function(*args, **kwargs))
            else:
                function(*args, **kwargs)

        return call

    def normal(seed: int, scale: float, values: np.ndarray) -> None:
        values[...] = scale * rng.standard_normal(values.shape, dtype=np.float32)

    cupy = SimpleNamespace(
        cuda=cuda,
        empty=np.empty,
        dot=on_stream(
            lambda x, w, out: np.copyto(out, (x.astype(np.float32) @ w.astype(np.float32)).astype(out.dtype))
        ),
        ElementwiseKernel=lambda *args: normal,
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
    )
    for module in (contenders, timing, run, formats):
        monkeypatch.setattr(module, "import_cupy", lambda purpose: cupy)
    for module in (run, formats):
        monkeypatch.setattr(module, "gpu_count", lambda: 1)
        monkeypatch.setattr(module, "gpu", lambda index: dataclasses.replace(GPU, l2_bytes=1 << 10))
    monkeypatch.setattr(contenders, "_normal", lambda: normal)
    monkeypatch.setattr(contenders, "matmul", on_stream(contenders.matmul))
    monkeypatch.setattr(reference.ReferencePlan, "multiply", on_stream(reference.ReferencePlan.multiply))
    monkeypatch.setattr(contenders, "cublas_missing", lambda: None)
    monkeypatch.setattr(contenders.read_floor, "fastest", lambda gpu, buffers, stream, time, dependent: HostReader())
    monkeypatch.setattr(report, "gpu", lambda index: GPU)
    monkeypatch.setattr(run, "QUICK_SAMPLING", Sampling(sample_ms=0.1, samples=3, warmup_rounds=1))
    without_torch(monkeypatch)


class HostReader:
    shape = read_floor.CANDIDATES[0]

    def run(self, buffers: list[np.ndarray], stream: HostStream) -> timing.CupyRun:
        return timing.CupyRun(stream, [buffer.sum for buffer in buffers], None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_from_weights_to_files(
    dtype: str, host: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 3000)
    layers, formats = [("small", 128, 64), ("odd", 80, 33)], ["int4", "nf4"]
    code = run.run(layers, [5, 1], formats, None, dtype, tmp_path, True, sample_ms=0.2)
    found = Report.load(tmp_path / "bench.json")
    assert "samples of about 0.2 ms each" in found.header["protocol"]
    cells = [(row.name, row.format, row.group_size, row.M) for row in found.rows]
    assert cells == [
        (name, format, group, m)
        for name in ("small", "odd")
        for format, group in (("int4", 128), ("nf4", 64))
        for m in (1, 5)
    ]
    for row in found.rows:
        assert set(row.us) == {OURS, FLOOR, CUBLAS}
        assert row.errors.keys() == {OURS, CUBLAS}
        assert row.error is not None
        assert 0 < row.error < numerics.unstated_bound(dtype) / 2
        assert row.kernel == "reference"
        assert row.cold
        assert row.skipped.keys() == {TINYGEMM, HUMMING}
    assert set(found.header["contenders"]) == {OURS, FLOOR, CUBLAS}
    assert code == 0
    assert "wrote" in capsys.readouterr().out


def test_cells_without_dependent_launches_have_no_such_row(host: None, tmp_path: Path) -> None:
    seen: list[bool] = []
    multiply = contenders.matmul

    def spy(*arguments: Any, **options: Any) -> None:
        seen.append(options["dependent"])
        multiply(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "matmul", spy)
        for launches in (["dependent"], ["plain", "dependent"]):
            run.run([("small", 128, 64)], [1], None, None, "float16", tmp_path, True, launches)
    assert [row.launch for row in Report.load(tmp_path / "bench.json").rows] == ["plain"]  # of the second run
    assert seen
    assert not any(seen)
    with pytest.raises(ValueError, match="launch is early; use plain or dependent"):
        run.run([("small", 128, 64)], [1], None, None, "float16", None, True, ["early"])
    for sample_ms in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="use a number of milliseconds above 0"):
            run.run([("small", 128, 64)], [1], None, None, "float16", None, True, sample_ms=sample_ms)


def test_ours_can_be_batch_invariant(host: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = contenders.matmul
    seen: list[dict[str, Any]] = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return multiply(*arguments, **options)

    monkeypatch.setattr(contenders, "matmul", spy)
    assert run.run([("small", 128, 64)], [1], None, None, "float16", tmp_path, True, batch_invariant=True) == 0
    assert seen
    assert all(options["batch_invariant"] for options in seen)
    assert "batch_invariant=True" in Report.load(tmp_path / "bench.json").header["contenders"][OURS]


def test_ours_can_be_a_named_kernel(host: None, tmp_path: Path) -> None:
    assert run.run([("small", 128, 64)], [1, 5], None, None, "float16", tmp_path, True, kernel="reference") == 0
    found = Report.load(tmp_path / "bench.json")
    assert [(row.kernel, row.wrong) for row in found.rows] == [("reference", [])] * 2
    assert "by reference, whichever kernel would be chosen" in found.header["contenders"][OURS]
    with pytest.raises(ValueError, match="sm90_stream does not serve M = 1: it runs on a GPU"):
        run.run([("small", 128, 64)], [1], None, None, "float16", None, True, kernel="sm90_stream")
    with pytest.raises(ValueError, match="kernel is 'sm91'; use one of sm90_stream, "):
        run.run([("small", 128, 64)], [1], None, None, "float16", None, True, kernel="sm91")


def test_a_result_that_is_not_written_is_wrong(
    host: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "matmul", lambda x, w, bias, out, **options: None)
    assert run.run([("small", 128, 64)], [1], None, None, "float16", None, True) == 1
    assert "WRONG: marlin_cupy on small, M = 1, int4: relative error nan." in capsys.readouterr().out


# ---- formats beside one another


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4:32", ("int4", 32, {})),
        ("nf4", ("nf4", 64, {})),
        ("int8:-1", ("int8", -1, {})),
        ("int4::search=mse", ("int4", 128, {"search": "mse"})),
        ("uint4:64:search=absmax:scale_dtype=null", ("uint4", 64, {"search": "absmax", "scale_dtype": None})),
    ],
)
def test_a_format_is_a_name_a_group_size_and_options(text: str, expected: tuple[str, int, dict[str, Any]]) -> None:
    assert formats.parse(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "int5"], "known formats are fp8_e4m3"),
        (["--formats", ""], "known formats are fp8_e4m3"),
        (["--formats", "int4:wide"], "use NAME[:GROUP_SIZE[:OPTION=VALUE ...]]"),
        (["--formats", "int4:128:mse"], "use NAME[:GROUP_SIZE[:OPTION=VALUE ...]]"),
        (["--formats", "int4", "int4:7"], "group_size is 7"),
        (["--formats", "int4::colour=red"], "colour"),
        (["--formats", "int4::search=best"], "best"),
        (["--layers", "4096x4096"], "use NAME=KxN"),
        (["--m", "1", "0"], "m is 0"),
        (["--dtypes", "float32"], "float32"),
        (["--sample-ms", "0"], "above 0"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        formats.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_formats_are_timed_beside_one_another(
    host: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 3000)
    items = ["nf4:64:search=mse", "int4:32", "int4"]
    arguments = ["--layers", "small=128x64", "odd=80x33", "--m", "5", "1", "--formats", *items, "--sample-ms", "0.1"]
    output = tmp_path / "new" / "formats.json"
    assert formats.main([*arguments, "--output", str(output)]) == 0
    found = Report.load(output)
    assert {"gpu", "driver", "versions", "commit", "command", "protocol"} <= set(found.header)
    assert [(row.name, row.dtype, row.M, row.weight) for row in found.rows] == [
        (name, dtype, m, weight)
        for name in ("small", "odd")
        for dtype in ("float16", "bfloat16")
        for m in (5, 1)
        for weight in ("nf4:64:search=mse", "int4:32", "int4:128")
    ]
    for row in found.rows:
        assert set(row.us) == {OURS, FLOOR}
        assert row.error is not None
        assert 0 < row.error < numerics.unstated_bound(row.dtype) / 2
        assert (row.kernel, row.launch, row.wrong) == ("reference", "plain", [])
        assert row.weight_bytes
    assert found.rows[0].options == {"search": "mse"}
    text = capsys.readouterr().out
    assert "small 128x64, bfloat16, plain launches, microseconds" in text
    assert f"wrote {output}" in text


def test_a_wrong_format_is_named(
    host: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "matmul", lambda x, w, bias, out, **options: None)
    arguments = ["--layers", "small=128x64", "--m", "1", "--formats", "int4", "--dtypes", "float16"]
    assert formats.main([*arguments, "--sample-ms", "0.1"]) == 1
    assert "WRONG: int4:128 on small, float16, M = 1: relative error nan." in capsys.readouterr().out


def test_the_table_of_formats_fits_and_compares_with_int4_byte_by_byte() -> None:
    rows = [
        row("70b_gate_up", 4096, us={OURS: 100.0, FLOOR: 80.0}, spread={}, weight_bytes=200_000_000),
        row(
            "70b_gate_up",
            4096,
            us={OURS: 13200.4, FLOOR: 12000.0},
            spread={},
            format="fp8_e4m3",
            group_size=-1,
            options={"scale": "column", "and": "more of these"},
            weight_bytes=400_000_000,
            kernel="sm90_stream",
        ),
        row("70b_gate_up", 16, us={FLOOR: 80.0}, spread={}, wrong=[OURS], weight_bytes=200_000_000, errors={OURS: 1.0}),
        row("70b_gate_up", 16, us={OURS: 90.0, FLOOR: 80.0}, spread={}, format="nf4", weight_bytes=200_000_000),
    ]
    output = io.StringIO()
    formats.show(Report({}, rows), Console(file=output, width=report.WIDTH))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["4096", "int4:128", "200.0", "100.0", "80.00", "1.25", "1.00", "1.00", "2.1e-04", "sm80_gemm"] in lines
    numbers = ["400.0", "13200", "12000", "1.10", "132.00", "66.00", "2.1e-04", "sm90_stream"]
    (other,) = [line for line in lines if line[-8:] == numbers]
    assert other[0].startswith("fp8_e4m3:-1:")  # and no emoji in it; the rest folds
    assert ["16", "int4:128", "200.0", "wrong", "80.00", "-", "-", "-", "2.1e-04", "sm80_gemm"] in lines
    assert ["nf4:128", "200.0", "90.00", "80.00", "1.12", "-", "-", "2.1e-04", "sm80_gemm"] in lines
    assert max(len(line.rstrip()) for line in output.getvalue().splitlines()) <= report.WIDTH
    assert "…" not in output.getvalue()


# ---- the candidates of a cell


def test_candidates_take_turns_and_their_times_are_kept(
    host: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(problem: kernels.Problem, names: list[str], most: int) -> list[kernels.Candidate]:
        assert (names, most) == ([], 3)
        return kernels.GEMM.candidates(dataclasses.replace(problem, gpu=None))

    for name, value in (("chosen", chosen), ("gpu_count", lambda: 1), ("gpu", lambda index: GPU)):
        monkeypatch.setattr(configs, name, value)
    monkeypatch.setattr(configs, "import_cupy", contenders.import_cupy)
    monkeypatch.setattr(configs, "_SAMPLING", Sampling(sample_ms=0.1, samples=3, warmup_rounds=1))
    output = tmp_path / "times.json"
    words = f"configs --layer small=128x64 --m 1 --m 5 --format int4 --format nf4 --most 3 --output {output}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert configs.main() == 0
    _, found = configs.load(output)
    assert [(cell.name, cell.K, cell.N, cell.format, cell.group_size, cell.M) for cell in found] == [
        ("small", 128, 64, format, group_size, m) for format, group_size in (("int4", 128), ("nf4", 64)) for m in (1, 5)
    ]
    assert all(cell.us.keys() == {"reference:all"} and cell.us["reference:all"] > 0 for cell in found)
