"""What XLA makes of programs for GPUs: compiled here, by JAX's plugin for CUDA, which needs no GPU for that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from jax_deviceless import GROUP, LAYERS, PRODUCTS, K, M

import marlin_cupy as mc
from marlin_cupy.spec import Spec

#: Instructions that leave memory as it is.
_HANDED_ON = {"parameter", "tuple", "get-tuple-element", "bitcast", "while"}
_EXCHANGE = re.compile(r"(all-|reduce-scatter|collective-|ragged-)[\w-]*(?<!-done)")


class Instruction(NamedTuple):
    """Of a compiled program.

    Attributes:
        made: types and shapes of what it makes, as "u8[8,4,4352]".
        taken: those of its operands, where it is a call.
        is_ours: whether it is a call of our kernels.
    """

    name: str
    made: list[str]
    taken: list[str]
    is_ours: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    script = Path(__file__).with_name("jax_deviceless.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def instructions(folder: Path, program: str) -> list[Instruction]:
    found = []
    for line in (folder / program / "program.txt").read_text().splitlines():
        match = re.match(r"\s+(?:ROOT )?%\S+ = (.*?) ([\w-]+)\(", line)
        if match:
            taken = re.search(r"operand_layout_constraints={(.*?})}", line)
            is_ours = 'custom_call_target="marlin_cupy_matmul"' in line
            found.append(Instruction(match[2], shapes(match[1]), shapes(taken[1]) if taken else [], is_ours))
    assert found
    return found


def shapes(text: str) -> list[str]:
    return re.findall(r"\w+\[[\d,]*\]", text)


def packed(*lead: int, parts_of_n: int = 1, parts_of_k: int = 1) -> str:
    """The array of a weight, or of a share of one."""
    slabs_n, slabs_k, slab_bytes = Spec("int4", (K, K), GROUP, "float16").layout.packed_shape
    return f"u8[{','.join(map(str, (*lead, slabs_n // parts_of_n, slabs_k // parts_of_k, slab_bytes)))}]"


def calls(folder: Path, program: str) -> list[Instruction]:
    return [each for each in instructions(folder, program) if each.is_ours]


def makes_weights(folder: Path, program: str) -> set[str]:
    """Instructions that write packed weights: copies, slices and what gathers them from other devices."""
    found = instructions(folder, program)
    return {each.name for each in found if any(made.startswith("u8[") for made in each.made)} - _HANDED_ON


def recorded(folder: Path, program: str) -> list[bool]:
    """Of every call that the program makes: whether it is part of a run that XLA records into a CUDA graph."""
    *_, last = sorted((folder / program).glob("*.thunk_sequence*.txt"))  # ..., and after passes that changed something
    found, depth = [], None
    for line in last.read_text().splitlines():
        indent = len(line) - len(line.lstrip())
        if depth is not None and indent <= depth:
            depth = None
        if ": kCommandBuffer" in line:
            depth = indent
        elif ": kCustomCall" in line:
            found.append(depth is not None)
    return found


@pytest.mark.parametrize(("program", "number"), [("unrolled", PRODUCTS), ("exported", PRODUCTS), ("in_place", 2)])
def test_all_products_are_calls_that_are_recorded(folder: Path, program: str, number: int) -> None:
    assert len(calls(folder, program)) == number
    assert recorded(folder, program) == [True] * number


def test_gradients_decode_weights_when_they_need_them(folder: Path) -> None:
    """And again for the next product, rather than to keep them."""
    found = (folder / "gradient" / "program.txt").read_text()
    assert len(calls(folder, "gradient")) == found.count('custom_call_target="marlin_cupy_dense"') == PRODUCTS
    assert recorded(folder, "gradient") == [True] * 2 * PRODUCTS
    assert makes_weights(folder, "gradient") == set()


@pytest.mark.parametrize("program", ["unrolled", "exported"])
def test_weights_are_read_where_they_are(folder: Path, program: str) -> None:
    for call in calls(folder, program):
        assert call.taken == [f"f16[{M},{K}]", packed(), f"f32[{K}]", f"f16[{K}]"]
    assert makes_weights(folder, program) == set()
    assert not {"dot", "conditional"} & {each.name for each in instructions(folder, program)}


def test_layers_of_a_stack_are_read_where_they_are(folder: Path) -> None:
    for call in calls(folder, "in_place"):
        assert call.taken == [f"f16[{M},{K}]", packed(LAYERS), f"f32[{LAYERS},{K}]", "s32[]"]
    assert makes_weights(folder, "in_place") == set()
    assert makes_weights(folder, "sliced") != set()  # the check itself


@pytest.mark.parametrize(("program", "lead", "layers"), [("layers", [], LAYERS), ("in_place", [LAYERS], 1)])
def test_four_gpus_read_their_shares_and_exchange_sums(
    folder: Path, program: str, lead: list[int], layers: int
) -> None:
    program = f"{program} on four"
    read = [call.taken[1] for call in calls(folder, program)]
    assert sorted(read) == sorted([packed(*lead, parts_of_n=4), packed(*lead, parts_of_k=4)] * layers)
    assert makes_weights(folder, program) == set()
    exchanged = [each for each in instructions(folder, program) if _EXCHANGE.fullmatch(each.name)]
    assert {each.name.removesuffix("-start") for each in exchanged} == {"all-reduce"}
    assert [set(each.made) for each in exchanged] == [{f"f32[{M},{K}]"}] * layers
