"""The fitter on times that a model made, with known numbers and some noise: it finds them, and writes no others."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import GPUS
from rich.console import Console

from marlin_cupy.bench import configs, fit, report
from marlin_cupy.bench.configs import Times
from marlin_cupy.bench.fit import COSTS, DECODE, FINE, TILES, Cell, Place
from marlin_cupy.bench.shapes import Shape
from marlin_cupy.kernels import measured, sm80_gemm, sm90_stream, sm90_wgmma
from marlin_cupy.kernels.cuda import ProductKernel
from marlin_cupy.kernels.measured import Measured

H200 = dataclasses.replace(GPUS["sm_90a"], name="NVIDIA H200", memory_gbs=4916.0)
KNOWN = measured.of(H200)
FILE = next(path for path in measured.files() if path.name == KNOWN.name)
LAYERS = (Shape("small", 2048, 2048), Shape("wide", 4096, 14336), Shape("deep", 14336, 4096), Shape("odd", 5120, 7680))
KERNELS = (sm80_gemm.KERNEL, sm90_stream.KERNEL, sm90_wgmma.KERNEL)
NOISE = 0.004


def invented(
    truth: Measured, kernel: ProductKernel, ms: tuple[int, ...], *weights: tuple[str, int, str]
) -> list[Times]:
    """Times of all that a kernel could do, as ``truth`` predicts them, with noise."""
    noise, found = np.random.default_rng(0), []
    for layer in LAYERS:
        for m in ms:
            for format, group_size, dtype in weights:
                empty = Times(layer.name, layer.K, layer.N, m, format, group_size, dtype, {})
                rated = kernel.rated(empty.problem(H200), truth)
                us = {each.key: each.predicted_us * float(np.exp(NOISE * noise.standard_normal())) for each in rated}
                found.append(dataclasses.replace(empty, us=us))
    return found


def cells_of(times: list[Times], kernel: ProductKernel, *layers: str) -> list[Cell]:
    return [cell for cell in fit.cells_of(times, H200, kernel) if not layers or cell.layer in layers]


def at(place: Place) -> float:
    return dict(fit.numbers(KNOWN.tables))[place]


@pytest.mark.parametrize(
    ("kernel", "ms"),
    list(zip(KERNELS, ((8, 64), (4, 16), (16, 64)), strict=True)),
    ids=["sm80_gemm", "sm90_stream", "sm90_wgmma"],
)
def test_decode_factors_are_found(kernel: ProductKernel, ms: tuple[int, ...]) -> None:
    weights = ("nf4", 64, "float16"), ("int4", 128, "bfloat16"), ("nf4", 32, "float16")
    asked = fit.places(KNOWN, kernel, DECODE, cells_of(invented(KNOWN, kernel, (ms[0],), *weights), kernel))
    asked += fit.places(KNOWN, kernel, FINE, [])
    parts = 2 if kernel is sm90_stream.KERNEL else 1
    assert len(asked) == 3 * parts
    assert ("decode", "int4", "float16", kernel.name) not in {each[:4] for each in asked}
    true = {place: at(place) * (1.3 if place[1] == "nf4" else 1.15) for place in asked}
    times = invented(fit.changed(KNOWN, true), kernel, ms, *weights)
    found = fit.fit(cells_of(times, kernel, "small", "deep"), KNOWN, asked)
    assert found == pytest.approx(true, rel=0.02)
    others = cells_of(times, kernel, "wide", "odd")
    after, before = fit.loss(others, fit.changed(KNOWN, found)), fit.loss(others, KNOWN)
    assert after.off < 2 * NOISE < before.off
    assert after.worst < 6 * NOISE
    assert after.mean <= before.mean + NOISE


def test_the_costs_of_a_kernel_are_found() -> None:
    kernel = sm90_stream.KERNEL
    base = ("int4", 128, "float16")
    asked = fit.places(KNOWN, kernel, COSTS, [])
    assert ("sm90_stream", "half_slab") in asked
    assert not [place for place in asked if {"shapes", "beside_bytes"} & set(place)]
    shift = np.random.default_rng(1).uniform(0.8, 1.25, len(asked)).tolist()
    true = {place: at(place) * factor for place, factor in zip(asked, shift, strict=True)}
    times = invented(fit.changed(KNOWN, true), kernel, (1, 16), base)
    cells = cells_of(times, kernel)
    assert all(map(fit.are_base, cells))
    found = fit.fit(cells, KNOWN, asked)
    assert fit.loss(cells, fit.changed(KNOWN, found)).off < 1.2 * NOISE
    for place in asked:
        if place[-1] in ("launch_us", "slab_us", "crowd_us", "half_slab"):  # the others are small parts of any time
            assert found[place] == pytest.approx(true[place], rel=0.05), place


def test_the_times_of_tiles_are_found() -> None:
    kernel = sm90_wgmma.KERNEL
    tiles = fit.places(KNOWN, kernel, TILES, [])
    assert len(tiles) == len(KNOWN.read(sm90_wgmma.Costs, kernel.name).tiles)
    assert not set(tiles) & set(fit.places(KNOWN, kernel, COSTS, []))
    asked = tiles[14:17]  # of 64 tokens
    true = {place: at(place) * factor for place, factor in zip(asked, (0.85, 1.1, 1.3), strict=True)}
    times = invented(fit.changed(KNOWN, true), kernel, (64,), ("int4", 128, "float16"))
    found = fit.fit(cells_of(times, kernel, "wide", "deep"), KNOWN, asked)
    assert found == pytest.approx(true, rel=0.02)


def test_a_number_that_nothing_depends_on_stays() -> None:
    kernel = sm90_stream.KERNEL
    place = ("sm90_stream", "up_to_16", "slab_us")
    times = invented(KNOWN, kernel, (1,), ("int4", 128, "float16"))
    assert fit.fit(cells_of(times, kernel), KNOWN, [place]) == pytest.approx({place: at(place)})


# ---- the file


def test_only_the_numbers_that_were_fitted_are_written() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert fit.written(text, {}) == text
    values: dict[Place, float] = {
        ("decode", "nf4", "bfloat16", "sm90_stream", "up_to_8"): 1.23456,
        ("sm90_wgmma", "all_bytes_per_ns"): 12345.6,
        ("sm80_gemm", "sizes", 4, "tiles", 3, "slab_ns"): 0.000123456,
    }
    new = fit.written(text, values)
    changed = [(old, now) for old, now in zip(text.splitlines(), new.splitlines(), strict=True) if old != now]
    assert [re.findall(r"[\d.]+", now)[-1] for _, now in changed[1:]] == ["0.0001235", "12350"]
    assert "sm90_stream.up_to_8 = 1.235, sm90_stream.up_to_16 = 1.35," in changed[0][1]
    assert len(changed) == len(values)
    there = dict(fit.numbers(measured.parse(FILE.name, new).tables))
    assert {place: there[place] for place in values} == fit.rounded(values)
    assert {**there, **values} == {**dict(fit.numbers(KNOWN.tables)), **values}


def test_a_table_in_pieces_is_not_written() -> None:
    with pytest.raises(ValueError, match="keep the parts of a table together"):
        fit.written("[a]\nx.y = 1\nz = 2\nx.w = 3\n", {})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fit.py", *map(str, arguments)])
    return fit.main()


@pytest.fixture
def times(tmp_path: Path) -> Path:
    """A file as bench.configs writes it, of an nf4 that sm90_stream decodes in half the time."""
    truth = fit.changed(KNOWN, {("decode", "nf4", "float16", "sm90_stream", "up_to_8"): 0.9})
    path = tmp_path / "times.json"
    cells = invented(truth, sm90_stream.KERNEL, (1,), ("nf4", 64, "float16"))
    configs.save(path, {"gpu": dataclasses.asdict(H200)}, cells)
    assert configs.load(path) == (H200, cells)
    return path


def test_the_command_fits_on_some_layers_reports_on_others_and_writes(
    times: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "h200.toml"
    copy.write_text(FILE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "WIDTH", 200)
    given = (times, "--layer", "small", "--layer", "deep", "--file", copy)
    assert run(monkeypatch, *given) == 0
    assert copy.read_text() == FILE.read_text()
    assert run(monkeypatch, *given, "--write") == 0
    found = measured.parse("h200.toml", copy.read_text(encoding="utf-8")).tables["decode"]["nf4"]["float16"]
    assert found["sm90_stream"]["up_to_8"] == pytest.approx(0.9, rel=0.02)
    assert found["sm90_stream"]["up_to_16"] == 1.35
    text = capsys.readouterr().out
    for part in (
        "fitted",
        "others",
        "loss before",
        "decode.nf4.float16.sm90_stream.up_to_8 = ",
        "was 1.8",
        f"wrote {copy}",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (("--layer", "huge"), "no times of huge; the file has deep, odd, small, wide."),
        (("--layer", "deep", "--validate", "deep"), "deep cannot be both fitted to and reported on"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    arguments: tuple[str, ...],
    refusal: str,
    times: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, times, *arguments)
    assert refusal in capsys.readouterr().err


def test_a_gpu_without_a_file_is_not_written_into_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no file of any sm_80; copy h200\.toml, write its"):
        fit.file_of(GPUS["sm_80"])
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="holds no times"):
        configs.load(tmp_path / "other.json")


# ---- what is measured


def test_the_table_shows_the_best_of_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    cells = invented(KNOWN, sm90_stream.KERNEL, (1,), ("nf4", 64, "float16"))
    configs.show(cells, H200, Console(width=200))
    text = capsys.readouterr().out
    assert text.count("sm90_stream") == len(LAYERS)
    assert f"{min(cells[0].us.values()):.2f}" in text
    assert "nf4 g64 float16" in text


def test_the_best_predicted_candidates_of_every_kernel_are_measured() -> None:
    problem = Times("odd", 5120, 7680, 16, "uint4", 128, "bfloat16", {}).problem(H200)
    found = configs.chosen(problem, (), 5)
    assert [each.kernel for each in found] == [kernel.name for kernel in configs.modelled(()) for _ in range(5)]
    everything = configs.chosen(problem, ["sm90_stream"], 1000)
    assert len(everything) > 5  # more than is offered, too
    assert {each.key for each in sm90_stream.KERNEL.candidates(problem)} < {each.key for each in everything}
    assert {each.kernel for each in configs.chosen(dataclasses.replace(problem, M=64), (), 2)} == {
        "sm80_gemm",
        "sm90_wgmma",
    }
    with pytest.raises(ValueError, match="kernel is 'sm91'; use one of sm90_stream, "):
        configs.modelled(["sm91"])
