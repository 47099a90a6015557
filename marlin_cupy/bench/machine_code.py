"""Does a change leave the machine code alone? Compares every kernel with that of another commit::

    python -m marlin_cupy.bench.machine_code --against e089279
    python -m marlin_cupy.bench.machine_code --against e089279 --formats int4 nf4 --arch sm_90a --every 6

Both commits print the sources of all their kernels. Kernels are compared in the order in which they are printed. Equal
sources need no compilation. Others are compiled to PTX first, which is quick: equal PTX gives equal machine code. Where
PTX differs, ptxas runs too, and the .text sections decide. No GPU is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from marlin_cupy.bench import report
from marlin_cupy.jit import compile as nvrtc
from marlin_cupy.progress import bar

FORMATS = ("int4", "uint4", "int8", "nf4")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
GROUP_SIZES = (32, 128, -1)
DTYPES = ("float16", "bfloat16")

#: Runs in the other commit too, so that it asks for no more than both have.
_ENUMERATE = """
import json, sys
from marlin_cupy import kernels
from marlin_cupy.device import gpu_of_arch
from marlin_cupy.spec import Spec
for format, arch, group_size, dtype in json.load(sys.stdin):
    spec = Spec.checked(format, (4096, 4096), group_size, dtype)
    found = [source for _, source in kernels.variants(spec, dtype, gpu_of_arch(arch))]
    print(json.dumps([format, arch, group_size, dtype, found]))
"""
_COMMENTS = re.compile(r"\s*//.*|\n(?=\n)")  # and empty lines


@dataclass(frozen=True)
class Kernel:
    """One kernel of both commits."""

    format: str
    arch: str
    group_size: int
    dtype: str
    kernel: str
    number: int  # among those of this weight, in the order in which they are printed
    before: str
    after: str

    @property
    def label(self) -> str:
        """For a reader."""
        return f"{self.arch} {self.format} g{self.group_size} {self.dtype} {self.kernel} #{self.number}"


def sources_of(tree: Path, wanted: Sequence[tuple[str, str, int, str]]) -> dict[tuple[str, str, int, str], list[str]]:
    """The sources that the package in ``tree`` prints for each (format, arch, group size, dtype)."""
    done = subprocess.run(
        [sys.executable, "-c", _ENUMERATE], input=json.dumps(wanted), cwd=tree, text=True, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(f"{tree} cannot print its kernels:\n{done.stderr}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(format, arch, group_size, dtype): found for format, arch, group_size, dtype, found in rows}


def pairs(before: Path, after: Path, wanted: Sequence[tuple[str, str, int, str]]) -> Iterator[Kernel]:
    """Kernels of the same place in both trees; RuntimeError where one tree has more of them."""
    old, new = sources_of(before, wanted), sources_of(after, wanted)
    for key in wanted:
        if len(old[key]) != len(new[key]):
            raise RuntimeError(f"{key}: {len(old[key])} kernels before and {len(new[key])} after; offer the same ones.")
        for number, (a, b) in enumerate(zip(old[key], new[key], strict=True)):
            yield Kernel(*key, _name_of(b), number, a, b)


def _name_of(source: str) -> str:
    return str(re.findall(r"^// ---- kernels/(\w+)\.cuh", source, re.MULTILINE)[-1])


def text_of(cubin: bytes) -> bytes:
    """The machine code in a cubin, an ELF file: its .text sections, one after the other."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + size * index) for index in range(count)]
    start = sections[names][4]
    found = []
    for name, _, _, _, offset, length in sections:
        label = cubin[start + name : cubin.index(b"\0", start + name)]
        if label.startswith(b".text"):
            found.append(cubin[offset : offset + length])
    return b"".join(found)


def compare(kernel: Kernel) -> str:
    """How far a kernel had to be taken to be found equal ("source", "ptx", "text"), or "differs"."""
    if _COMMENTS.sub("", kernel.before) == _COMMENTS.sub("", kernel.after):
        return "source"
    before_ptx, after_ptx = (_entry(nvrtc.ptx(each, kernel.arch)) for each in (kernel.before, kernel.after))
    if before_ptx == after_ptx:
        return "ptx"
    before, after = (text_of(nvrtc.compile(each, kernel.arch).cubin) for each in (kernel.before, kernel.after))
    return "text" if before == after else "differs"


def _entry(ptx: str) -> str:
    """The kernel alone: what is before it are names of constants, which are part of its instructions already."""
    return ptx[ptx.index(".visible .entry") :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, show, and write JSON if asked to. The exit code is 1 where machine code differs."""
    parser = report.parser("machine_code", __doc__)
    parser.add_argument("--against", required=True, help="a commit of this checkout")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--group-sizes", nargs="+", type=int, default=GROUP_SIZES)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--every", type=int, default=1, help="take each n-th kernel alone")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    here = Path(__file__).resolve().parents[2]
    wanted = [
        (format, arch, group_size, dtype)
        for arch in options.arch
        for format in options.formats
        for group_size in options.group_sizes
        for dtype in options.dtypes
    ]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", before, options.against], cwd=here, check=True)
        try:
            found = list(pairs(before, here, wanted))[:: options.every]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=here, check=True)
    outcomes: dict[str, str] = {}
    unique = {hashlib.sha256((each.arch + each.before + each.after).encode()).hexdigest(): each for each in found}
    with bar("comparing", len(unique), True) as begin, ThreadPoolExecutor(options.workers) as pool:
        for each, outcome in zip(unique.values(), pool.map(compare, unique.values()), strict=True):
            begin(each.label)
            outcomes[each.label] = outcome
            if outcome == "differs":
                print(f"differs: {each.label}", flush=True)
    counts = Counter(outcomes.values())
    console = Console(width=report.WIDTH, highlight=False)
    console.print(f"{len(found)} kernels, {len(unique)} of them different sources or architectures: {dict(counts)}")
    if options.output is not None:
        header = report.header(against=options.against, every=options.every, kernels=len(found), outcomes=dict(counts))
        differing = [each for each in unique.values() if outcomes[each.label] == "differs"]
        rows = [{k: v for k, v in asdict(each).items() if k not in ("before", "after")} for each in differing]
        report.write_json(options.output, {"header": header, "rows": rows})
    return 1 if counts["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
