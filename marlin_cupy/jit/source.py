"""One self-contained CUDA source string per kernel: includes inlined once, no header from anywhere else."""

from __future__ import annotations

import functools
import re
from pathlib import Path

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
