"""NVRTC through CuPy: source to cubin for any architecture, with or without a GPU, through the disk cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cupy.device import import_cupy
from marlin_cupy.errors import CompileError, MissingDependencyError
from marlin_cupy.jit import cache

_NVRTC_LOCK = threading.Lock()
_OPTIONS = ("-std=c++17", "--ptxas-options=-v")
_ARCH = re.compile(r"sm_\d{2,3}[af]?")
#: ptxas reports these in the log of a build that succeeds: wgmma serialised, setmaxnreg ignored.
_SLOW = re.compile(r"C75\d\d|serialized|setmaxnreg.*ignored", re.IGNORECASE)
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Build:
    """A compiled kernel and what ptxas said of it."""

    cubin: bytes
    registers: int
    spill_bytes: int


def compile(source: str, arch: str) -> Build:
    """Compile, without any cache.

    Raises:
        CompileError: NVRTC's error log, or a log line that means a slow build (serialised wgmma and the like).
        ValueError: ``arch`` is no architecture name. MissingDependencyError: no CuPy.
    """
    if not _ARCH.fullmatch(arch):
        raise ValueError(f'arch is {arch!r}; use a name like "sm_80" or "sm_90a".')
    nvrtc = _nvrtc()
    with _compiled(source, arch, (*_OPTIONS, f"-arch={arch}")) as program:
        log, cubin = nvrtc.getProgramLog(program), _whole(nvrtc.getCUBIN(program))
    slow = [line for line in log.splitlines() if _SLOW.search(line)]
    if slow:
        raise CompileError(f"the build for {arch} would be slow:\n" + "\n".join(slow))
    registers, spills = _REGISTERS.search(log), _SPILLS.findall(log)
    return Build(cubin, int(registers[1]) if registers else 0, sum(int(a) + int(b) for a, b in spills))


def ptx(source: str, arch: str) -> str:
    """The intermediate code of ``source``, which decides the machine code; quick, and for comparisons alone."""
    virtual = arch.replace("sm_", "compute_")
    with _compiled(source, arch, ("-std=c++17", f"-arch={virtual}")) as program:
        text: bytes = _nvrtc().getPTX(program)
        return text.decode()


@contextlib.contextmanager
def _compiled(source: str, arch: str, options: tuple[str, ...]) -> Iterator[Any]:
    """A program of NVRTC that has been compiled; CompileError with its log where it cannot be."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, "marlin_cupy.cu", [], [])
    try:
        nvrtc.compileProgram(program, list(options))
        yield program
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).rstrip("\0\n ")
        raise CompileError(f"NVRTC {nvrtc_version()} cannot build for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """``cubin`` with the last byte that CuPy's binding cuts off, a zero of the last table of the ELF file.

    The driver does not mind, tools that check the file do.
    """
    program_table, section_table = struct.unpack_from("<2Q", cubin, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<4H", cubin, 54)
    end = max(program_table + program_size * programs, section_table + section_size * sections)
    return cubin.ljust(end, b"\0")


def cubin(name: str, source: str, arch: str) -> bytes:
    """The cubin of ``source`` for ``arch``: from the bundle, from the cache, or compiled and cached."""
    bundle = cache.bundle_dir()
    if bundle is not None:
        found = cache.read(bundle, bundle_name(name, source, arch))
        if found is not None:
            return found
    entry = f"{name}-{arch}-{cache.key(source, *_OPTIONS, arch, nvrtc_version())}.cubin"
    found = cache.read(cache.cache_dir(), entry)
    if found is None:
        found = compile(source, arch).cubin
        cache.write(cache.cache_dir(), entry, found)  # a read-only cache costs a compilation per process, no more
    return found


def bundle_name(name: str, source: str, arch: str) -> str:
    """The file of a kernel in a bundle. The NVRTC version is left out: the machine that reads it may have another."""
    return f"{name}-{arch}-{cache.key(source, *_OPTIONS, arch)}.cubin"


def add_to_bundle(folder: Path, name: str, source: str, arch: str) -> Path:
    """Put a kernel into a bundle folder; OSError where it cannot be written."""
    entry = bundle_name(name, source, arch)
    if not cache.write(folder, entry, cubin(name, source, arch)):
        raise OSError(f"cannot write {folder / entry}; choose a folder that can be written.")
    return folder / entry


@functools.cache
def nvrtc_version() -> str:
    """Major and minor version of the NVRTC that CuPy found."""
    major, minor = _nvrtc().getVersion()
    return f"{major}.{minor}"


def _nvrtc() -> Any:
    with _NVRTC_LOCK:  # threads that compile first at the same time: one of them loads the libraries
        return _loaded_nvrtc()


@functools.cache
def _loaded_nvrtc() -> Any:
    import_cupy("compiling a kernel")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()  # loads the library, whose companion can then be found beside it
    except RuntimeError as error:  # CuPy's loader found no libnvrtc
        raise MissingDependencyError(
            "compiling a kernel needs NVRTC, which CuPy does not find; "
            "pip install 'marlin_cupy[cuda13]' (or [cuda12] for a CUDA 12 driver)."
        ) from error
    _load_builtins()
    return nvrtc


def _load_builtins() -> None:
    """Make NVRTC's companion library findable when another package loaded NVRTC by path.

    NVRTC opens ``libnvrtc-builtins`` by name. Where JAX has loaded libnvrtc from a folder that the dynamic linker
    does not search, that fails; a library already in the process is found by its name.
    """
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = {line.split()[-1] for line in maps if "libnvrtc.so" in line}
    for path in loaded:
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so*"):
            try:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
