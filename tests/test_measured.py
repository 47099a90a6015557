"""What was measured: every number is read, no format lacks a row, and the choices that follow are those that were."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import FORMATS, GPUS, HALF, product_of

from marlin_cupy import formats, kernels
from marlin_cupy.bench.shapes import LLAMA
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.kernels import measured
from marlin_cupy.kernels.cuda import ProductKernel
from marlin_cupy.spec import Spec

FILES = {path.name: measured.parse(path.name, path.read_text(encoding="utf-8")) for path in measured.files()}
H200 = dataclasses.replace(GPUS["sm_90a"], name="NVIDIA H200", memory_gbs=4916.0)
MODELLED = [each for each in kernels.GEMM.kernels if isinstance(each, ProductKernel)]


# ---- the files


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("format", formats.names())
@pytest.mark.parametrize("dtype", HALF)
def test_every_format_has_a_row_of_every_kernel(file: str, format: str, dtype: str) -> None:
    known = FILES[file]
    on = dataclasses.replace(GPUS[known.gpu.arch], name=known.gpu.names[0], memory_gbs=known.gpu.memory_gbs)
    served = set()
    row = FORMATS[format]
    for M, group_size in itertools.product((1, 16, 64), row.groups(32, -1)):
        w = Spec(format, (4096, 4096), group_size, row.scale(group_size, dtype))
        problem = product_of(M, dtype, w, on)
        for kernel in MODELLED:
            if kernel.refuses(problem) is None:
                served.add(kernel.name)
                assert all(each.predicted_us > 0 for each in kernel.rated(problem, known))
    assert served == {kernel.name for kernel in MODELLED if kernel.made_for in (None, known.gpu.arch)}


@pytest.mark.parametrize("kernel", MODELLED, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("lost", ["format", "dtype", "kernel"])
def test_a_missing_row_is_an_error_that_says_what_to_write(
    kernel: ProductKernel, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = {format: {dtype: dict(row) for dtype, row in rows.items()} for format, rows in decode_table().items()}
    if lost == "format":
        del decode["nf4"]
    elif lost == "dtype":
        del decode["nf4"]["bfloat16"]
    else:
        del decode["nf4"]["bfloat16"][kernel.name]
    known = dataclasses.replace(measured.of(H200), tables={**measured.of(H200).tables, "decode": decode})
    problem = product_of(8, "bfloat16", Spec("nf4", (4096, 4096), 64, "bfloat16"), H200)
    with pytest.raises(
        UnsupportedError, match=rf"h200\.toml does not say how long {kernel.name}.* decodes nf4 with bf"
    ):
        kernel.rated(problem, known)
    monkeypatch.setattr(measured, "of", lambda gpu: known)
    with pytest.raises(UnsupportedError, match=r"give it a row \[decode\] nf4.bfloat16 with a number for"):
        kernels.GEMM.choose(problem)


def decode_table() -> measured.Table:
    found: measured.Table = measured.of(H200).tables["decode"]
    return found


def test_a_number_that_is_missing_or_unread_is_an_error() -> None:
    @dataclass(frozen=True)
    class Wanted:
        one_us: float
        names: tuple[str, ...] = ()

    read = measured.parse("x.toml", "[k]\none_us = 1\n").read(Wanted, "k")
    assert read == Wanted(1.0)
    assert isinstance(read.one_us, float)
    for text, wrong in (
        ("two_us = 1", r"x.toml: k lacks \['one_us'\] and has \['two_us'\] that nothing reads"),
        ('one_us = "1"', "x.toml: k.one_us is '1'; it should be of type float"),
        ("one_us = true", "x.toml: k.one_us is True; it should be of type float"),
        ('one_us = 1\nnames = ["a", 2]', r"x.toml: k.names\[1\] is 2; it should be of type str"),
    ):
        with pytest.raises(ValueError, match=wrong):
            measured.parse("x.toml", f"[k]\n{text}\n").read(Wanted, "k")


def test_a_gpu_without_a_file_is_predicted_by_the_nearest() -> None:
    def pretended(name: str, arch: str, memory_gbs: int) -> measured.Measured:
        gpu = f'[gpu]\nnames = ["{name}"]\narch = "{arch}"\nsm_count = 132\nmemory_gbs = {memory_gbs}\n'
        return measured.parse(f"{name}.toml", gpu)

    a100, h100, h200 = (
        pretended("A100", "sm_80", 2039),
        pretended("H100", "sm_90a", 3352),
        pretended("H200", "sm_90a", 4800),
    )
    known = (a100, h100, h200)
    hopper = GPUS["sm_90a"]
    for gpu, expected in (
        (dataclasses.replace(hopper, name="H200 NVL", memory_gbs=1.0), h200),
        (dataclasses.replace(hopper, name="H100 PCIe", memory_gbs=4800.0), h100),
        (dataclasses.replace(hopper, name="H20", memory_gbs=4000.0), h100),
        (dataclasses.replace(hopper, name="H800", memory_gbs=4600.0), h200),
        (GPUS["sm_86"], a100),
        (GPUS["sm_120a"], h100),
    ):
        assert measured.nearest(gpu, known) is expected, gpu.name
        assert measured.nearest(gpu, (h200,)) is h200


# ---- what is chosen


CHOICES = Path(__file__).with_name("choices.json")
ROWS_OF_X = (1, 2, 8, 9, 16, 17, 33, 64, 100, 256, 1024, 4096)
LAYERS = [(shape.K, shape.N) for shape in LLAMA[::3]] + [(333, 65)]
#: Factors of other formats are guesses.
FITTED = ("int4", "uint4", "int8", "nf4")
PLACES = {**GPUS, "NVIDIA H200": H200}


def choices(place: str, format: str) -> str:
    """A hash of all that is offered, in order, with the bits of its predicted times."""
    found = [
        (each.key, each.predicted_us.hex())
        for dtype, group_size, shape, M in itertools.product(HALF, (32, 128, -1), LAYERS, ROWS_OF_X)
        for each in kernels.GEMM.candidates(
            product_of(M, dtype, Spec(format, shape, group_size, "float16"), PLACES[place])
        )
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


@pytest.mark.parametrize("place", PLACES)
def test_choices_are_what_they_were(place: str) -> None:
    """Whoever fits anew, or changes a model, writes them again: ``python tests/test_measured.py``."""
    for format, expected in json.loads(CHOICES.read_text())[place].items():
        assert choices(place, format) == expected, format


if __name__ == "__main__":
    kept = {place: {format: choices(place, format) for format in FITTED} for place in PLACES}
    CHOICES.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(0)
