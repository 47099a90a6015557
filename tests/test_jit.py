"""Source, NVRTC, cache and bundle: every kernel compiled for every architecture, without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import DTYPES, FORMATS, GPUS, HALF, product_of

import marlin_cupy as mc
from marlin_cupy import formats, kernels
from marlin_cupy.device import Gpu
from marlin_cupy.jit import cache
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.jit.launch import MAX_COUNTERS
from marlin_cupy.jit.source import inline, source_root
from marlin_cupy.kernels import dequantize, measured, sm80_gemm, sm90_stream
from marlin_cupy.spec import Spec

H200 = GPUS["sm_90a"]
#: Smallest kernel that NVRTC builds: for the tests that are about the cache.
TINY = 'extern "C" __global__ void tiny(int* y) { *y = 1; }\n'

#: Bytes (stores and loads) that the compiler may spill in tiles for more than 32 rows; see spills_allowed.
SPILLS_OF_WIDE_TILES = 352

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)


def spec(name: str = "int4", group_size: int = 128, scale_dtype: str = "float16") -> Spec:
    return Spec(name, (4096, 4096), group_size, scale_dtype)


def sources(spec: Spec, dtype: str, gpu: Gpu) -> list[str]:
    """Every kernel that a weight of ``spec`` needs on ``gpu``, each once."""
    found = list(dict.fromkeys(text for _, text in kernels.variants(spec, dtype, gpu)))
    assert found
    return found


@functools.cache
def build(text: str, arch: str) -> jit_compile.Build:
    found = jit_compile.compile(text, arch)
    assert found.cubin[:4] == b"\x7fELF"
    assert b"gemm" in found.cubin or b"dequantize" in found.cubin
    assert 0 < found.registers <= 255
    return found


def configuration(text: str) -> str:
    """The line of a source that says which configuration it is."""
    return next(line for line in text.splitlines() if line.startswith("struct Config"))


# ---- every kernel compiles


@pytest.mark.parametrize("arch", GPUS)
def test_every_kernel_compiles_for_every_architecture(arch: str) -> None:
    for text in sources(spec(), "float16", GPUS[arch]):
        build(text, arch)


def test_an_architecture_can_be_named_without_its_own_instructions() -> None:
    for arch in ("sm_90", "sm_100", "sm_120"):
        build(sources(spec(), "bfloat16", GPUS["sm_86"])[0], arch)


def spills_allowed(config: str) -> int:
    """Bytes: none, but for tiles with 4 x 8 fragments of sums a warp, whose 128 registers leave few for the rest."""
    wide = "row_atoms = 4, token_tiles = 8" in config
    assert not wide or "scale_weights = 1" in config
    return SPILLS_OF_WIDE_TILES if wide else 0


@every_dtype
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nothing_spills_at_the_default_group_size(arch: str, dtype: str) -> None:
    mma_sync = [text for text in sources(spec(), dtype, GPUS[arch]) if "wgmma<" not in text]  # test_wgmma.py has others
    found = {configuration(text): build(text, arch).spill_bytes for text in mma_sync}
    assert found
    assert not {config: spills for config, spills in found.items() if spills > spills_allowed(config)}


@every_format
@every_dtype
def test_every_format_compiles(name: str, dtype: str) -> None:
    for text in sources(spec(name), dtype, H200)[::11]:
        build(text, "sm_90a")


@every_format
@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
def test_every_granule_compiles(name: str, group_size: int) -> None:
    for dtype, scale_dtype in (HALF, HALF[::-1]):
        for text in sources(spec(name, group_size, scale_dtype), dtype, H200)[1::31]:
            build(text, "sm_90a")


@every_format
def test_what_a_small_gpu_runs_compiles_for_it(name: str) -> None:
    for text in sources(spec(name), "float16", GPUS["sm_86"])[::7]:
        build(text, "sm_86")


@every_format
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("arch", GPUS)
def test_every_gpu_has_a_kernel_that_fits_for_every_m(name: str, group_size: int, arch: str) -> None:
    gpu = GPUS[arch]
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 1000):
        fitting = sm80_gemm.configs(m, spec(name, group_size), "float16", gpu)
        assert fitting, f"M={m}"
        assert sm80_gemm.KERNEL.refuses(product_of(m, "float16", spec(name, group_size), gpu)) is None
    for text in sources(spec(name, group_size), "float16", gpu):
        reserved = re.search(r"SHARED_BYTES = (\d+);", text)
        assert reserved is not None
        assert int(reserved[1]) <= gpu.shared_per_block


def test_a_gpu_with_too_little_shared_memory_is_refused() -> None:
    small = dataclasses.replace(GPUS["sm_86"], name="a small GPU", shared_per_block=16384, shared_per_sm=17408)
    problem = product_of(1, "float16", spec("int4"), small)
    with pytest.raises(mc.UnsupportedError, match="16384 bytes of a small GPU"):
        kernels.GEMM.choose(problem)


@pytest.mark.parametrize("arch", GPUS)
def test_every_block_has_work_and_shared_tiles_have_counters(arch: str) -> None:
    for K, N in ((1, 1), (128, 64), (333, 65), (4096, 4096), (28672, 8192), (8192, 57344), (65536, 64)):
        asked = Spec("int4", (K, N), 128, "float16")
        layout = asked.layout
        for m in (1, 8, 9, 64, 129, 1000, 100000):
            for rated in sm80_gemm.configs(m, asked, "float16", GPUS[arch]):
                for predicted_us, grid in sm80_gemm.grids(
                    rated, m, layout, GPUS[arch], "float16", measured.of(GPUS[arch])
                ):
                    assert predicted_us > 0
                    assert 1 <= grid.blocks <= grid.tiles * grid.steps
                    assert grid.tiles * rated.config.rows * rated.config.tokens >= m * N
                    assert grid.steps * rated.config.k >= K
                    assert not grid.is_cut or grid.tiles <= MAX_COUNTERS


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale_dtype", HALF)
def test_weights_are_scaled_above_32_rows_but_not_where_bfloat16_would_round_the_scales(
    arch: str, dtype: str, scale_dtype: str
) -> None:
    allowed = dtype == "float16" or scale_dtype == dtype
    for m in (1, 8, 16, 32, 33, 64, 65, 128, 129, 4096):
        found = [each.config for each in sm80_gemm.configs(m, spec("int4", 128, scale_dtype), dtype, GPUS[arch])]
        assert found
        for config in found:
            assert config.scale_weights == (allowed and m > 32)
            assert ("rounded to 16 bits after scaling" in str(config)) == config.scale_weights
            assert config.scale_weights or config.row_atoms * config.token_tiles <= 16


def test_the_kernel_says_what_it_does_not_serve() -> None:
    for dtype in (*DTYPES, "float64"):
        refusal = sm80_gemm.KERNEL.refuses(product_of(1, dtype, spec(), H200))
        assert (refusal is None) == (dtype in HALF)
        if refusal is not None:
            assert dtype in refusal
    old = Gpu(0, "an old GPU", "sm_75", 40, 65536, 65536, 4 << 20)
    assert "sm_75" in str(sm80_gemm.KERNEL.refuses(product_of(1, "float16", spec(), old)))
    assert "host memory" in str(sm80_gemm.KERNEL.refuses(product_of(1, "float16", spec(), None)))


def test_the_streaming_kernel_gives_every_tile_to_a_cluster_that_is_resident() -> None:
    for name in FORMATS:
        for N in (1, 64, 65, 1000, 3000, 6144, 8192, 10240, 28672, 57344, 250000):
            for m in (1, 8, 9, 16):
                problem = product_of(m, "float16", Spec(name, (4096, N), 64, "float16"), H200)
                layout = problem.w.layout
                for candidate in sm90_stream.KERNEL.candidates(problem):
                    assert isinstance(candidate.configuration, sm90_stream.Streams)
                    config, clusters = candidate.configuration.config, candidate.configuration.clusters
                    assert config.tokens >= m
                    assert config.shared_bytes(layout) <= H200.shared_per_block
                    assert config.blocks_per_sm * (config.shared_bytes(layout) + 1024) <= H200.shared_per_sm
                    assert 1 <= clusters <= sm90_stream.tiles(config, layout)
                    assert clusters * config.cluster <= H200.sm_count * config.blocks_per_sm


def test_the_streaming_kernel_says_what_it_does_not_serve() -> None:
    def refusal(m: int, gpu: Gpu | None, dtype: str = "float16", N: int = 4096) -> str:
        return str(sm90_stream.KERNEL.refuses(product_of(m, dtype, Spec("int4", (4096, N), 128, "float16"), gpu)))

    assert refusal(1, H200) == refusal(16, H200) == refusal(16, H200, N=57344) == "None"
    assert "host memory" in refusal(1, None)
    assert "sm_80" in refusal(1, GPUS["sm_80"])
    assert "float32" in refusal(1, H200, "float32")
    assert "not 17" in refusal(17, H200)
    assert "shared memory" in refusal(1, dataclasses.replace(H200, shared_per_block=16384))


# ---- what the compiler says


class FakeNvrtc:
    """Builds anything; its log is given."""

    class NVRTCError(Exception):
        pass

    def __init__(self, log: str, cubin: bytes) -> None:
        self.log = log
        self.cubin = cubin
        self.live = 0

    def createProgram(self, *_: Any) -> int:
        self.live += 1
        return 1

    def compileProgram(self, *_: Any) -> None:
        pass

    def getProgramLog(self, _: int) -> str:
        return self.log

    def getCUBIN(self, _: int) -> bytes:
        return self.cubin

    def destroyProgram(self, _: int) -> None:
        self.live -= 1

    def getVersion(self) -> tuple[int, int]:
        return 13, 0


@pytest.fixture
def fake_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Any:
    cubin = jit_compile.compile(TINY, "sm_90a").cubin

    def install(log: str) -> FakeNvrtc:
        fake = FakeNvrtc(log, cubin)
        monkeypatch.setattr(jit_compile, "_nvrtc", lambda: fake)
        return fake

    return install


_USAGE = "ptxas info    : Used 40 registers, used 1 barriers\n"
_NO_SPILLS = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"


def test_registers_and_spills_are_read_from_the_log(fake_nvrtc: Any) -> None:
    fake = fake_nvrtc(_USAGE + "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n")
    found = jit_compile.compile(TINY, "sm_90a")
    assert (found.registers, found.spill_bytes) == (40, 20)
    assert fake.live == 0
    fake_nvrtc(_USAGE + _NO_SPILLS)
    assert jit_compile.compile(TINY, "sm_90a").spill_bytes == 0


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7508) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in function 'gemm'",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage",
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to the "
        "presence of Extern calls in the function 'gemm'",
        "ptxas info    : setmaxnreg ignored to maintain minimum register requirements.",
    ],
    ids=["C7508", "C7510", "C7512", "setmaxnreg"],
)
def test_a_build_that_would_be_slow_fails(fake_nvrtc: Any, line: str) -> None:
    fake = fake_nvrtc(_USAGE + line + "\n" + _NO_SPILLS)
    with pytest.raises(mc.CompileError) as caught:
        jit_compile.compile(TINY, "sm_90a")
    assert "sm_90a" in str(caught.value)
    assert line in str(caught.value)
    assert fake.live == 0


def test_threads_of_a_fresh_process_can_compile_first_at_the_same_time() -> None:
    script = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from marlin_cupy.jit.compile import compile\n"
        "together = threading.Barrier(4)\n"
        "def build(i):\n"
        "    together.wait()\n"
        "    return compile(f'__global__ void k(int* y) {{ *y = {i}; }}', 'sm_80').registers > 0\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(all(pool.map(build, range(4))))\n"
    )
    for _ in range(3):
        assert run_python(script).stdout.strip() == "True"


def test_an_error_carries_the_log_of_nvrtc() -> None:
    with pytest.raises(mc.CompileError) as caught:
        jit_compile.compile("int f() { return undefined_name; }", "sm_80")
    for part in ("sm_80", "undefined_name", "marlin_cupy.cu", "NVRTC " + jit_compile.nvrtc_version()):
        assert part in str(caught.value)


@pytest.mark.parametrize("arch", ["sm_20", "sm_999"])
def test_an_architecture_that_nvrtc_does_not_know_is_a_compile_error(arch: str) -> None:
    with pytest.raises(mc.CompileError, match=arch):
        jit_compile.compile(TINY, arch)


# ---- the source


@every_format
def test_the_source_stands_alone(name: str) -> None:
    for text in sources(spec(name), "bfloat16", H200):
        code = re.sub(r"//[^\n]*", "", text)
        assert "#include" not in code
        assert "#pragma once" not in code
        assert str(source_root()) not in text
        assert str(Path.home()) not in text
        assert "/tmp" not in text
        assert text.isascii()


def test_each_file_is_inlined_once() -> None:
    text = inline('#include "kernels/sm80_gemm.cuh"\n#include "ptx/types.cuh"')
    banners = re.findall(r"^// ---- (\S+)$", text, re.MULTILINE)
    assert len(banners) == len(set(banners))
    assert "ptx/types.cuh" in banners


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such_file\.cuh"):
        inline('#include "no_such_file.cuh"')


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(mc.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_two_processes_make_the_same_source() -> None:
    script = (
        "import hashlib\n"
        "from marlin_cupy import formats\n"
        "from marlin_cupy.device import Gpu\n"
        "from marlin_cupy import kernels\n"
        "from marlin_cupy.tensor import Spec\n"
        f"gpu = {H200!r}\n"
        "digest = hashlib.sha256()\n"
        "for name in formats.names():\n"
        "    for variant, text in kernels.variants(Spec(name, (4096, 4096), 64, 'bfloat16'), 'float16', gpu):\n"
        "        digest.update((variant + text).encode())\n"
        "print(digest.hexdigest())\n"
    )
    digest = hashlib.sha256()
    for name in formats.names():
        for variant, text in kernels.variants(spec(name, 64, "bfloat16"), "float16", H200):
            digest.update((variant + text).encode())
    found = {run_python(script, PYTHONHASHSEED=seed).stdout.strip() for seed in ("1", "2")}
    assert found == {digest.hexdigest()}


def test_the_source_depends_on_what_the_kernel_is_built_for_and_on_nothing_else() -> None:
    described = [
        (name, group_size, scale_dtype, dtype)
        for name in FORMATS
        for group_size in (16, 128)
        for scale_dtype in HALF
        for dtype in HALF
    ]
    found = {key: set(sources(spec(*key[:3]), key[3], H200)) for key in described}
    assert len(set.union(*found.values())) == sum(map(len, found.values()))
    other_shape = Spec("int4", (512, 77), 128, "float16")  # shapes are arguments: one build serves all
    assert set(sources(other_shape, "float16", H200)) == found["int4", 128, "float16", "float16"]
    one_group = Spec("int4", (512, 77), -1, "float16")  # and so does one granule
    assert set(sources(one_group, "float16", H200)) == found["int4", 128, "float16", "float16"]


# ---- the cache


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def never_compile(monkeypatch: pytest.MonkeyPatch) -> Any:
    def forbid() -> None:
        def fail(source: str, arch: str) -> jit_compile.Build:
            raise AssertionError("compiled, although the cubin is there")

        monkeypatch.setattr(jit_compile, "compile", fail)

    return forbid


def only_entry(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def test_the_second_call_reads_from_disk(cache_folder: Path, never_compile: Any) -> None:
    first = jit_compile.cubin("tiny", TINY, "sm_80")
    entry = only_entry(cache_folder)
    assert re.fullmatch(r"tiny-sm_80-[0-9a-f]{32}\.cubin", entry.name)
    assert cache.size(cache_folder) == (1, entry.stat().st_size)
    never_compile()
    assert jit_compile.cubin("tiny", TINY, "sm_80") == first


def test_anything_that_matters_changes_the_entry(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jit_compile.cubin("tiny", TINY, "sm_80")
    jit_compile.cubin("tiny", TINY + "// changed\n", "sm_80")
    jit_compile.cubin("tiny", TINY, "sm_86")
    assert cache.size(cache_folder)[0] == 3
    monkeypatch.setattr(jit_compile, "nvrtc_version", lambda: "99.0")
    jit_compile.cubin("tiny", TINY, "sm_80")
    assert cache.size(cache_folder)[0] == 4
    assert cache.key("ab", "c") != cache.key("a", "bc")


@pytest.mark.parametrize(
    "damage", ["empty", "half", "one byte short", "first byte", "middle byte", "last byte", "folder"]
)
def test_a_damaged_entry_is_rebuilt(cache_folder: Path, damage: str, never_compile: Any) -> None:
    first = jit_compile.cubin("tiny", TINY, "sm_80")
    entry = only_entry(cache_folder)
    good = entry.read_bytes()
    flips = {"first byte": 0, "middle byte": len(good) // 2, "last byte": -1}
    cuts = {"empty": 0, "half": len(good) // 2, "one byte short": -1}
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
        assert jit_compile.cubin("tiny", TINY, "sm_80") == first  # cannot be replaced; costs a compilation
        return
    damaged = bytearray(good)
    if damage in flips:
        damaged[flips[damage]] ^= 1
    else:
        del damaged[cuts[damage] :]
    entry.write_bytes(damaged)
    assert jit_compile.cubin("tiny", TINY, "sm_80") == first
    assert only_entry(cache_folder).read_bytes() == good
    never_compile()
    assert jit_compile.cubin("tiny", TINY, "sm_80") == first


def test_a_cache_that_cannot_be_written_is_tolerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder can be made below this")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert jit_compile.cubin("tiny", TINY, "sm_80") == jit_compile.compile(TINY, "sm_80").cubin
    assert cache.size(cache.cache_dir()) == (0, 0)
    assert os.listdir(tmp_path) == ["file"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "named"))
    assert cache.cache_dir() == tmp_path / "named"
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    assert cache.cache_dir() == tmp_path / "xdg" / "marlin_cupy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "marlin_cupy"


def test_eight_processes_share_a_cache(cache_folder: Path, tmp_path: Path, never_compile: Any) -> None:
    text = sources(spec(), "float16", H200)[0]
    cache_folder.mkdir(parents=True)
    source_file = cache_folder.parent / "kernel.cu"
    source_file.write_text(text)
    ready = tmp_path / "ready"  # all start together, however long their imports take
    ready.mkdir()
    script = (
        "import hashlib, os, pathlib, sys, time\n"
        "from marlin_cupy.jit.compile import cubin, nvrtc_version\n"
        "nvrtc_version()\n"
        f"ready = pathlib.Path({str(ready)!r})\n"
        "(ready / str(os.getpid())).touch()\n"
        "while len(os.listdir(ready)) < 8:\n"
        "    time.sleep(0.005)\n"
        f"text = pathlib.Path({str(source_file)!r}).read_text()\n"
        "for round in range(3):\n"
        "    print(hashlib.sha256(cubin('gemm', text, 'sm_90a')).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, [errors for _, errors in outputs]
    entry = only_entry(cache_folder)  # no temporary file is left
    assert entry.name.startswith("gemm-sm_90a-")
    never_compile()
    found = hashlib.sha256(jit_compile.cubin("gemm", text, "sm_90a")).hexdigest()
    assert {line for output, _ in outputs for line in output.split()} == {found}


# ---- bundles


def test_a_bundle_serves_without_compiling(
    cache_folder: Path, tmp_path: Path, never_compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    path = jit_compile.add_to_bundle(bundle, "tiny", TINY, "sm_90a")
    assert path.parent == bundle
    assert os.listdir(bundle) == [path.name]
    expected = jit_compile.compile(TINY, "sm_90a").cubin

    never_compile()
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "another machine"))
    monkeypatch.setenv(cache.BUNDLE_VARIABLE, str(bundle))
    monkeypatch.setattr(jit_compile, "nvrtc_version", lambda: "99.0")  # or none at all
    assert jit_compile.cubin("tiny", TINY, "sm_90a") == expected
    assert not (tmp_path / "another machine").exists()
    with pytest.raises(AssertionError, match="compiled"):
        jit_compile.cubin("tiny", TINY, "sm_80")


def test_a_damaged_bundle_is_not_used(cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jit_compile.add_to_bundle(tmp_path / "bundle", "tiny", TINY, "sm_90a")
    expected = jit_compile.cubin("tiny", TINY, "sm_90a")
    monkeypatch.setenv(cache.BUNDLE_VARIABLE, str(path.parent))
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    assert jit_compile.cubin("tiny", TINY, "sm_90a") == expected
    assert path.read_bytes() == damaged  # bundles are never written


def test_a_bundle_that_cannot_be_written_is_an_error(cache_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file.* choose a folder"):
        jit_compile.add_to_bundle(tmp_path / "file" / "bundle", "tiny", TINY, "sm_80")


# ---- dense runs of a weight


@every_format
@every_dtype
def test_the_kernel_for_dense_weights_compiles_everywhere_and_spills_nowhere(name: str, dtype: str) -> None:
    for group_size, scale_dtype in ((16, "float16"), (-1, "bfloat16")):
        ((_, text),) = kernels.DEQUANTIZE.variants(spec(name, group_size, scale_dtype), dtype, H200)
        for arch in GPUS:
            assert build(text, arch).spill_bytes == 0
        reserved = re.search(r"SHARED_BYTES = (\d+);", text)
        assert reserved is not None
        assert int(reserved[1]) <= min(gpu.shared_per_block for gpu in GPUS.values())


@pytest.mark.parametrize("shape", [(1, 1), (300, 70), (4096, 4096), (4096, 28672), (8192, 57344), (1000, 1 << 20)])
def test_dense_runs_are_bounded_and_cover_k(shape: tuple[int, int]) -> None:
    K, N = shape
    runs = list(dequantize.runs(Spec("int4", (K, N), 128, "float16")))
    assert [slab for run in runs for slab in run] == list(range(-(-K // 128)))
    assert all(len(run) == 1 or 2 * 128 * len(run) * N <= 64 << 20 for run in runs)
    assert all(run for run in runs)
