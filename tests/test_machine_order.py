"""sm90_stream refills a slot when its loads have ended: read from the machine code, where the source cannot say so.

The copy engine writes to shared memory without asking whether loads from there have ended. A load that has only been
issued may get what the copy writes. Instructions of sm_90 are 128 bits, some of which order them:

    bits 0-11     opcode
    bits 110-112  the scoreboard that counts a load until its data are there; 7 is none, it ends before the next one
    bits 116-121  scoreboards that have to be at zero before the instruction is issued
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, replace

import pytest
from cases import FORMATS, GPUS, HALF

from marlin_cupy import formats
from marlin_cupy.bench.machine_code import text_of
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.kernels import sm90_stream
from marlin_cupy.spec import Spec

H200 = GPUS["sm_90a"]
LOADS = {0x984: "LDS", 0x83B: "LDSM"}
COPIES = {0x3BA: "UBLKCP", 0x5B4: "UTMALDG"}
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """What orders an instruction."""

    address: int
    opcode: int
    scoreboard: int
    waits: int  # a bit per scoreboard

    @staticmethod
    def of(address: int, low: int, high: int) -> Instruction:
        return Instruction(address, low & 0xFFF, high >> 46 & 7, high >> 52 & 63)


def instructions(cubin: bytes) -> list[Instruction]:
    """In the order of their addresses, which is that of a turn of the loop over slabs."""
    words = struct.iter_unpack("<2Q", text_of(cubin))
    return [Instruction.of(16 * index, low, high) for index, (low, high) in enumerate(words)]


def early_copies(code: list[Instruction]) -> list[str]:
    """Copies that are issued while loads before them may be under way.

    Loads from shared memory end in the order in which they are issued: one without a scoreboard has ended when the next
    one has.
    """
    found = []
    uncounted: list[int] = []  # addresses of loads that wait for one with a scoreboard
    pending: dict[int, int] = {}  # the address of a load, the scoreboard that counts it
    for each in code:
        pending = {address: board for address, board in pending.items() if not each.waits >> board & 1}
        if each.opcode in LOADS:
            uncounted.append(each.address)
            if each.scoreboard != NO_SCOREBOARD:
                pending |= dict.fromkeys(uncounted, each.scoreboard)
                uncounted.clear()
        elif each.opcode in COPIES and (pending or uncounted):
            loads = [hex(address) for address in (*pending, *uncounted)]
            found.append(f"{COPIES[each.opcode]} at {each.address:#x} after loads at {loads}")
    return found


def refill(code: list[Instruction]) -> int:
    """Index of the first copy behind loads: the one of the loop, other copies come before any load."""
    first_load = next(index for index, each in enumerate(code) if each.opcode in LOADS)
    return next(index for index, each in enumerate(code) if index > first_load and each.opcode in COPIES)


def stream_code(config: sm90_stream.Config, name: str, dtype: str) -> list[Instruction]:
    _, text = sm90_stream.KERNEL.source_of(Spec(name, (4096, 4096), 128, dtype), dtype, config)
    return instructions(jit_compile.compile(text, "sm_90a").cubin)


def shapes(largest_m: int, name: str) -> list[sm90_stream.Config]:
    return sm90_stream.configs(largest_m, Spec(name, (4096, 4096), 128, "float16").layout, H200)


_CASES = list(itertools.product(FORMATS, HALF, (8, 16)))


@pytest.mark.parametrize(("index", "name", "dtype", "largest_m"), [(i, *case) for i, case in enumerate(_CASES)])
def test_a_slot_is_refilled_when_its_loads_have_ended(index: int, name: str, dtype: str, largest_m: int) -> None:
    """Each time a few shapes, others each time."""
    found = shapes(largest_m, name)
    for config in found[index % 7 :: 7]:
        code = stream_code(config, name, dtype)
        at = refill(code)
        loads = [each for each in code[:at] if each.opcode in LOADS]
        of_codes = config.rows * 128 * formats.get(name).bits // 8 // 512  # 16 bytes a lane
        assert len(loads) >= of_codes + 4 * config.token_tiles, "the copies of the loop are not behind its loads"
        assert not early_copies(code), config


@pytest.fixture(scope="module")
def code() -> list[Instruction]:
    return stream_code(shapes(8, "int4")[0], "int4", "float16")


def test_loads_that_nothing_waits_for_are_found(code: list[Instruction]) -> None:
    assert early_copies([replace(each, waits=0) for each in code])


def test_a_refill_right_behind_the_last_load_is_found(code: list[Instruction]) -> None:
    at = refill(code)
    last = max(index for index in range(at) if code[index].opcode in LOADS)
    moved = [*code[: last + 1], replace(code[at], waits=0), *code[last + 1 : at], *code[at + 1 :]]
    assert any(f"{code[at].address:#x}" in each for each in early_copies(moved))
