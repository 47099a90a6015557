"""The command line, in this process and as users start it."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import cupy
import numpy
import pytest
from cases import FORMATS
from typer.testing import CliRunner

import marlin_cupy as mc
from marlin_cupy import __main__ as cli
from marlin_cupy import formats
from marlin_cupy.device import gpu_of_arch
from marlin_cupy.errors import CompileError
from marlin_cupy.jit import cache, compile

ROOT = Path(__file__).parents[1]
SMALL = ["--k", "256", "--n", "192", "--m", "3"]


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints to both streams, after a check of its exit code."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)


# ---- info


def test_info_as_a_module() -> None:
    done = run_python("-m", "marlin_cupy", "info")
    assert done.returncode == 0, done.stderr
    for text in (mc.__version__, numpy.__version__, "sm80_gemm", "reference", "NVRTC: 1", cache.CACHE_VARIABLE):
        assert text in done.stdout
    assert done.stderr == ""


def test_info_counts_the_cache_and_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(cache.BUNDLE_VARIABLE, str(tmp_path / "bundle"))
    cache.write(tmp_path / "bundle", "kernel.cubin", bytes(3 << 20))
    output = run("info")
    assert f"cache: {tmp_path / 'cache'}, 0 kernels, 0.0 MiB" in output
    assert f"bundle: {tmp_path / 'bundle'}, 1 kernels, 3.0 MiB" in output


def test_info_without_cupy() -> None:
    code = "import sys; sys.modules['cupy'] = None; from marlin_cupy.__main__ import app; app(['info'])"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "NVRTC: none" in done.stdout
    assert "marlin_cupy[cuda13]" in done.stdout


# ---- demo


def test_demo_as_a_module() -> None:
    done = run_python("-m", "marlin_cupy", "demo", "--device", "cpu", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("correct")
    assert "reference: NumPy" in done.stdout


@pytest.mark.parametrize("format", formats.names())
def test_demo_is_correct_for_every_format(format: str) -> None:
    one_group = ["--group-size", str(FORMATS[format].group(-1))]
    for sizes in (SMALL, ["--k", "130", "--n", "71", "--m", "1", "--group-size", "32"], [*SMALL, *one_group]):
        output = run("demo", "--device", "cpu", "--format", format, *sizes)
        assert "correct" in output
        assert "times smaller" in output


@pytest.mark.parametrize("factor", [1.002, float("nan")])
def test_demo_notices_a_wrong_product(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    matmul = mc.matmul
    monkeypatch.setattr(mc, "matmul", lambda x, w: matmul(x, w) * numpy.float16(factor))
    output = run("demo", "--device", "cpu", *SMALL, code=1)
    assert "WRONG" in output
    assert "correct" not in output


def test_demo_notices_one_wrong_column(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = mc.matmul

    def wrong(x: Any, w: mc.QuantizedTensor) -> Any:
        y = matmul(x, w)
        y[:, 17] = y[:, 18]
        return y

    monkeypatch.setattr(mc, "matmul", wrong)
    assert "WRONG" in run("demo", "--device", "cpu", *SMALL, code=1)


@pytest.mark.gpu
@pytest.mark.parametrize("format", formats.names())
def test_demo_on_a_gpu(format: str) -> None:
    for sizes in ([], [*SMALL, "--group-size", str(FORMATS[format].group(-1))]):
        output = run("demo", "--device", "cuda", "--format", format, *sizes)
        assert "on cuda:0" in output
        assert "correct" in output


# ---- compile


def test_compile_makes_a_bundle_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run("compile", "--arch", "sm_90a", "--format", "int4", "--dtype", "float16", "--output", tmp_path / "new")
    built = cli.variants(["int4"], None, ["float16"], gpu_of_arch("sm_90a"))
    assert f"{len(built)} kernels for sm_90a" in output
    assert cache.BUNDLE_VARIABLE in output
    assert cache.size(tmp_path / "new")[0] == len(built)

    monkeypatch.setenv(cache.BUNDLE_VARIABLE, str(tmp_path / "new"))
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "empty"))
    monkeypatch.setattr(compile, "compile", None)  # nothing may be compiled
    for name, source in built:
        assert compile.cubin(name, source, "sm_90a")[:4] == b"\x7fELF"
    assert not (tmp_path / "empty").exists()


def test_variants_cover_every_format_and_dtype() -> None:
    sources = cli.variants(None, None, None, gpu_of_arch("sm_80"))
    assert len(set(sources)) == len(sources)
    names = {name for name, _ in sources}
    for format in formats.names():
        assert {name.rpartition("-")[2] for name in names if f"-{format}-" in name} == {"float16", "bfloat16"}


def test_compile_names_the_dtypes_that_there_are(tmp_path: Path) -> None:
    output = run("compile", "--arch", "sm_80", "--dtype", "float32", "--output", tmp_path / "new", code=2)
    assert "dtype is 'float32'; use float16 or bfloat16." in output
    assert not (tmp_path / "new").exists()


def test_compile_takes_several_architectures(tmp_path: Path) -> None:
    arguments = ["--arch", "sm_80", "--arch", "sm_120a", "--format", "nf4", "--dtype", "bfloat16", "--group-size", "32"]
    run("compile", *arguments, "--output", tmp_path)
    entries = [entry.name for entry in tmp_path.iterdir()]
    for arch in ("sm_80", "sm_120a"):
        assert any(f"-{arch}-" in entry for entry in entries)
    assert all("nf4-g32-bfloat16" in entry for entry in entries)


# ---- tune


def test_tune_without_a_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "gpu_count", lambda: 0)
    output = run("tune", "--shape", "qkv=4096x6144", "--m", "1", code=1)
    assert output.startswith("Tuning needs a CUDA GPU that CuPy can use, and there is none: ")
    assert output.count("\n") == 1


def test_tune_shows_every_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    fast = mc.TunedCandidate("sm80_gemm", "64 x 8 tile", 5.0, 4.25, None)
    slow = mc.TunedCandidate("sm90_stream", "8 warps", 4.0, 6.5, None)
    wrong = mc.TunedCandidate("sm90_stream", "4 warps", 4.5, None, "off by [much]")
    rows = (mc.TunedRows(16, 3.5, (fast, slow, wrong), slow),)
    cli._show_tuning("qkv", mc.Tuning("int4 4096 x 6144 on a GPU", rows, "a file"))
    output = capsys.readouterr().out
    for text in ("4.25", "6.50", "3.50", "(chosen)", "(used before)", "off by [much]", "kept in a file"):
        assert text in output


# ---- bench


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def record(*arguments: object) -> int:
        calls.append(arguments)
        return 7

    stub = types.ModuleType("marlin_cupy.bench.run")
    monkeypatch.setattr(stub, "run", record, raising=False)
    monkeypatch.setitem(sys.modules, "marlin_cupy.bench.run", stub)
    options = ["--m", "1", "--m", "16", "--format", "nf4", "--group-size", "64", "--dtype", "bfloat16", "--quick"]
    options += ["--launch", "plain", "--launch", "dependent", "--sample-ms", "400", "--batch-invariant"]
    options += ["--kernel", "sm80_gemm"]
    run("bench", "--shape", "qkv=4096x6144", "--shape", "o=64x96", *options, "--output", tmp_path, code=7)
    layers, launches = [("qkv", 4096, 6144), ("o", 64, 96)], ["plain", "dependent"]
    what = layers, [1, 16], ["nf4"], 64, "bfloat16", Path(tmp_path), True, launches, 400.0, True, "sm80_gemm"
    assert calls == [what]


def test_bench_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "marlin_cupy.bench.run", None)
    assert "marlin_cupy[bench]" in run("bench", code=2)


# ---- refusals

REFUSALS = {
    "demo --format int5": "unknown format 'int5'; known formats are fp8_e4m3",
    "demo --group-size 20": "group_size is 20",
    "demo --device tpu": "device is 'tpu'",
    "demo --device cuda:99": "cuda:99 ",
    "compile --arch 90 --output {tmp}/new": "arch is '90'; on such GPUs marlin_cupy looks for 'sm_90a'",
    "compile --arch sm_80 --arch sm_99 --output {tmp}/new": "arch is 'sm_99'; known architectures are",
    "compile --arch sm_75 --output {tmp}/new": "arch is 'sm_75'; known architectures are",
    "compile --arch sm_90 --output {tmp}/new": "arch is 'sm_90'; on such GPUs marlin_cupy looks for 'sm_90a'",
    "compile --arch sm_80a --output {tmp}/new": "arch is 'sm_80a'; on such GPUs marlin_cupy looks for 'sm_80'",
    "compile --arch sm_80 --format int5 --output {tmp}/new": "unknown format 'int5'",
    "compile --arch sm_80 --dtype float32 --output {tmp}/new": "'float32'; use float16 or bfloat16",
    "compile --arch sm_80 --group-size 20 --output {tmp}/new": "group_size is 20",
    "compile --arch sm_80 --output {tmp}/file": "file",
    "tune --shape 4096x6144 --m 1": "shape is '4096x6144'; use NAME=KxN",
    "tune --shape a=64x64 --m 1 --format int5": "unknown format 'int5'",
    "tune --shape a=64x64 --m 1 --dtype float32": "dtype is 'float32'",
    "bench --shape 4096x6144": "shape is '4096x6144'; use NAME=KxN",
    "bench --shape a=0x64": "shape is 'a=0x64'",
    "bench --format int5": "unknown format 'int5'",
    "bench --dtype float32": "dtype is 'float32'",
    "bench --launch early": "launch is early; use plain or dependent",
    "bench --kernel sm91": "kernel is 'sm91'; use one of sm90_stream, sm90_wgmma, sm80_gemm",
    "bench --sample-ms 0": "sample_ms is 0; use a number of milliseconds above 0",
}


@pytest.mark.parametrize("command", REFUSALS)
def test_bad_input_is_refused_in_one_sentence(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should go")
    output = run(*command.format(tmp=tmp_path).split(), code=2)
    assert output.startswith("marlin-cupy: ")
    assert REFUSALS[command] in output
    assert output.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_compile_needs_an_nvrtc_that_knows_the_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def too_old(source: str, arch: str) -> None:
        raise CompileError("invalid value for --gpu-architecture")

    monkeypatch.setattr(compile, "compile", too_old)
    output = run("compile", "--arch", "sm_120a", "--output", tmp_path / "new", code=2)
    assert "cannot build for sm_120a." in output


@pytest.mark.parametrize(
    "command",
    ["demo --m 0", "demo --k x", "tune --m 1", "tune --shape a=64x64 --m 0", "compile --arch sm_80", "unknown"],
)
def test_bad_usage_is_refused(command: str) -> None:
    assert "Usage: " in run(*command.split(), code=2)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_it_says_which(package: str) -> None:
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module('marlin_cupy', run_name='__main__')"
    done = run_python("-c", code)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'marlin_cupy[cli]'" in done.stderr
    assert package in done.stderr


def test_nvrtc_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> tuple[int, int]:
        raise RuntimeError("no libnvrtc")

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", missing)
    for cached in (compile._loaded_nvrtc, compile.nvrtc_version):
        cached.cache_clear()
    assert "marlin_cupy[cuda13]" in run("compile", "--arch", "sm_80", "--output", tmp_path / "new", code=2)
    assert "NVRTC: none" in run("info")
