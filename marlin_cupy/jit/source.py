"""One self-contained CUDA source string per kernel: includes inlined once, no header from anywhere else."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from marlin_cupy.scalars import by_name
from marlin_cupy.spec import Spec

_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"\s*$')


@functools.cache
def source_root() -> Path:
    """The folder ``cuda_src``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "cuda_src", package.parent / "cuda_src"):
        if (root / "kernels").is_dir():
            return root
    raise FileNotFoundError(f"cuda_src is neither in {package} nor beside it; reinstall marlin_cupy.")


@functools.lru_cache(maxsize=256)
def inline(text: str) -> str:
    """``text`` with every ``#include "path under cuda_src"`` replaced by that file, each file once."""
    seen: set[str] = set()

    def expand(text: str) -> list[str]:
        lines = []
        for line in text.splitlines():
            match = _INCLUDE.match(line)
            if match is None:
                lines += [line] if line.strip() != "#pragma once" else []
            elif match[1] not in seen:
                seen.add(match[1])
                lines += [f"// ---- {match[1]}", *expand((source_root() / match[1]).read_text(encoding="utf-8"))]
        return lines

    return "\n".join(expand(text)) + "\n"


def specialized(kernel: str, *preamble: str) -> str:
    """The complete source of ``cuda_src/kernels/<kernel>.cuh`` after the lines that say what it is built for."""
    return inline("\n".join(['#include "ptx/types.cuh"', *preamble, f'#include "kernels/{kernel}.cuh"']))


def scalar(alias: str, dtype: str) -> str:
    """The line that names the C++ type of float16 or bfloat16 values."""
    return f"using {alias} = {by_name(dtype).cpp};"


def weight(spec: Spec) -> list[str]:
    """The lines that say how a packed weight is stored: Slab, and constants of its format."""
    return [spec.layout.cpp()]


def codec(spec: Spec) -> list[str]:
    """The lines that say what its codes mean: Codec."""
    return [f'#include "formats/{spec.format}.cuh"']
