"""The script that compares the machine code of two commits tells changes that matter from those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlin_cupy.bench import machine_code
from marlin_cupy.jit import compile as jit_compile

SOURCE = """// ---- kernels/doubled.cuh
extern "C" __global__ void gemm(float* y) { y[threadIdx.x] *= 2.0f; }
"""


def kernel(after: str) -> machine_code.Kernel:
    return machine_code.Kernel("int4", "sm_80", 128, "float16", "doubled", 0, SOURCE, after)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (("// ----", "// a comment\n// ----"), "source"),
        (("y[threadIdx.x] *= 2.0f", "float* const z = y; z[threadIdx.x] *= 2.0f"), "ptx"),
        (("2.0f", "3.0f"), "differs"),
    ],
)
def test_a_change_is_told_by_what_it_changes(change: tuple[str, str], outcome: str) -> None:
    assert machine_code.compare(kernel(SOURCE.replace(*change))) == outcome


def test_the_text_of_a_cubin_is_its_machine_code_alone() -> None:
    cubin = jit_compile.compile(SOURCE, "sm_80").cubin
    text = machine_code.text_of(cubin)
    assert 0 < len(text) < len(cubin)
    assert len(text) % 16 == 0  # instructions
    assert text in cubin


def test_kernels_of_a_tree_are_those_that_it_prints() -> None:
    here = Path(machine_code.__file__).parents[2]
    wanted = [("int4", "sm_80", 128, "float16")]
    found = list(machine_code.pairs(here, here, wanted))
    assert {each.kernel for each in found} == {"sm80_gemm", "dequantize"}
    assert all(machine_code.compare(each) == "source" for each in found)
