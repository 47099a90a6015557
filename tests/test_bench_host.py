"""What of the benchmarks of the host needs no GPU: launches that are recorded, loops that are timed, tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from marlin_cupy.bench import compile_times, host_overhead, report
from marlin_cupy.jit.launch import Function

# ---- host overhead


def test_launches_are_recorded_with_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Function, "launch", lambda self, *arguments: log.append(arguments))
    function = object.__new__(Function)

    def call() -> None:
        function.launch(4, 256, 7, "arguments")
        function.launch(1, 32, 7, "more")

    repeat = host_overhead.record_launches(call)
    assert len(log) == 2
    repeat()
    assert log[2:] == [(4, 256, 7, "arguments"), (1, 32, 7, "more")]


def test_a_call_without_a_launch_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no kernel"):
        host_overhead.record_launches(lambda: None)


def test_host_time_is_per_call_and_without_the_waits() -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        now += 2e-6
        calls += 1

    def synchronize() -> None:
        nonlocal now
        now += 1.0

    found = host_overhead.per_call_us(call, synchronize, calls=1200, clock=lambda: now)
    assert found == pytest.approx(2.0)
    assert calls == 200 + 7 * 1200


def test_host_overhead_table() -> None:
    output = io.StringIO()
    rows = [host_overhead.Overhead("cupy", "matmul(x, w)", 9.5, 2.25)]
    host_overhead.show(rows, {"jax": "ImportError: no jax"}, Console(file=output, width=report.WIDTH))
    assert "7.25" in output.getvalue()
    assert "without jax: ImportError: no jax" in output.getvalue()


def test_a_product_in_host_memory_stands_beside_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    def per_call_us(call: Any, synchronize: Any) -> float:
        timed.append(call())
        return 50.0 - 20 * len(timed)

    monkeypatch.setattr(host_overhead, "per_call_us", per_call_us)
    x = np.linspace(-1, 1, host_overhead.HOST_K, dtype=np.float32).astype(np.float16)[None]
    found = host_overhead.on_host(x)
    assert (found.library, found.us, found.beyond_launch_us) == ("numpy", 30.0, 20.0)
    np.testing.assert_array_equal(*timed)


# ---- compile times


def test_parts_of_a_first_call_are_added_up() -> None:
    spent = {"nvrtc": 0.0}
    timed = compile_times._timed(lambda a, b: a + b, spent, "nvrtc")
    assert timed(1, b=2) == 3
    first = spent["nvrtc"]
    assert first > 0
    timed(1, 2)
    assert spent["nvrtc"] > first


def test_each_measurement_starts_from_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLIN_CUPY_BUNDLE_DIR", "/somewhere")
    folders: list[str] = []

    def probe(format: str, dtype: str, m: int, environment: dict[str, str]) -> compile_times.FirstCall:
        assert "MARLIN_CUPY_BUNDLE_DIR" not in environment
        folder = Path(environment["MARLIN_CUPY_CACHE_DIR"])
        folders.append(str(folder))
        was_empty = not list(folder.iterdir())
        (folder / "entry").touch()
        return compile_times.FirstCall(900.0 if was_empty else 30.0, 0.0, 0.0, "kernel", "config")

    monkeypatch.setattr(compile_times, "_probe", probe)
    found = [compile_times.measure("int4", "float16", m) for m in (1, 16)]
    assert [(time.cold.total_ms, time.warm.total_ms) for time in found] == [(900.0, 30.0)] * 2
    assert folders[0] == folders[1] != folders[2] == folders[3]
    output = io.StringIO()
    compile_times.show(found, Console(file=output, width=report.WIDTH))
    assert "900.0" in output.getvalue()
