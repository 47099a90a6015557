"""What was measured on a model of GPU: a TOML file each, by which kernels predict their times.

A GPU of which there is no file is predicted by the nearest one: of the closest family of architectures, then of the
closest architecture in it, then of the closest memory rate. An SM is then taken to be as fast as there; the number of
SMs and the memory are those of the GPU at hand. Predictions rank candidates; times to rely on come from
:func:`marlin_cupy.tune`.

Each kernel says in a dataclass of its own which numbers it wants; a number that is missing, or that nothing reads, is
an error.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from marlin_cupy.device import Gpu
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.layout import Layout

Table = Mapping[str, Any]
T = TypeVar("T")

#: Granules that are so small take longer.
_FINE_GRANULE = 32


@dataclass(frozen=True)
class MeasuredGpu:
    """Which GPU was measured.

    Attributes:
        names: how the names of such GPUs begin.
        arch: its architecture.
        sm_count: its SMs, which limits of all SMs together are of.
        memory_gbs: the nominal rate of its memory.
    """

    names: tuple[str, ...]
    arch: str
    sm_count: int
    memory_gbs: float


@dataclass(frozen=True)
class Memory:
    """How fast memory is read.

    Attributes:
        floor_share: the part of the nominal rate that a kernel with nothing but bulk copies reaches.
        floor_launch_us: what its launch adds to that.
        read_share: the part that kernels are taken to reach.
    """

    floor_share: float
    floor_launch_us: float
    read_share: float


@dataclass(frozen=True, eq=False)
class Measured:
    """The content of a file: its name, and its tables by name."""

    name: str
    tables: Table
    _read: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)  # what was read before

    @functools.cached_property
    def gpu(self) -> MeasuredGpu:
        """Which GPU was measured."""
        return self.read(MeasuredGpu, "gpu")

    @functools.cached_property
    def memory(self) -> Memory:
        """How fast its memory is read."""
        return self.read(Memory, "memory")

    def read(self, kind: type[T], table: str) -> T:
        """A table as a ``kind``, a dataclass whose fields have the names of the table's keys."""
        if (kind, table) not in self._read:
            self._read[kind, table] = _built(kind, self.tables[table], f"{self.name}: {table}")
        found: T = self._read[kind, table]
        return found

    def decode_factor(self, kernel: str, layout: Layout, dtype: str) -> float:
        """How much longer ``kernel`` takes for a slab of ``layout`` than for one of int4 with float16.

        UnsupportedError where the file has no row for the format and ``dtype``, or none of ``kernel`` in it.
        """
        wanted = kernel, layout.format.name, dtype, layout.granule <= _FINE_GRANULE
        if wanted not in self._read:
            self._read[wanted] = self._decode_factor(*wanted)
        found: float = self._read[wanted]
        return found

    def _decode_factor(self, kernel: str, format: str, dtype: str, is_fine: bool) -> float:
        factor = _inner(self.tables["decode"], (format, dtype, *kernel.split(".")))
        fine = _inner(self.tables["fine_granules"], tuple(kernel.split(".")))
        if not isinstance(factor, int | float) or not isinstance(fine, int | float):
            raise UnsupportedError(
                f"{self.name} does not say how long {kernel} decodes {format} with {dtype} activations; give it a row "
                f"[decode] {format}.{dtype} with a number for {kernel}."
            )
        return float(factor * fine) if is_fine else float(factor)


def parse(name: str, text: str) -> Measured:
    """The content of a file of that name."""
    return Measured(name, tomllib.loads(text))


@functools.cache
def files() -> tuple[Path, ...]:
    """All files, sorted."""
    return tuple(sorted(Path(__file__).parent.glob("*.toml")))


@functools.cache
def of(gpu: Gpu) -> Measured:
    """What was measured on ``gpu``, or else on the one that is nearest to it."""
    return nearest(gpu, _all_measured())


def nearest(gpu: Gpu, known: tuple[Measured, ...]) -> Measured:
    """The one of that name, else the one of the closest architecture and memory rate."""

    def distance(measured: Measured) -> tuple[bool, int, int, float]:
        its = measured.gpu
        (family, member), (wanted_family, wanted_member) = (divmod(_number(arch), 10) for arch in (its.arch, gpu.arch))
        return (
            not gpu.name.startswith(its.names),
            abs(family - wanted_family),
            abs(member - wanted_member),
            abs(its.memory_gbs - gpu.memory_gbs),
        )

    return min(known, key=distance)


@functools.cache
def _all_measured() -> tuple[Measured, ...]:
    return tuple(parse(path.name, path.read_text(encoding="utf-8")) for path in files())


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


def _inner(table: Table, keys: tuple[str, ...]) -> Any:
    """What lies at the end of ``keys``; None where there is no such way."""
    found: Any = table
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _built(kind: Any, value: Any, where: str) -> Any:
    """``value`` of a TOML file as a ``kind``: a dataclass, a tuple of equal kinds, a number or text."""
    if typing.get_origin(kind) is tuple:
        return tuple(_built(typing.get_args(kind)[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        missing = {each.name for each in fields if each.default is dataclasses.MISSING} - value.keys()
        unknown = value.keys() - {each.name for each in fields}
        if missing or unknown:
            raise ValueError(f"{where} lacks {sorted(missing)} and has {sorted(unknown)} that nothing reads.")
        kinds = typing.get_type_hints(kind)
        return kind(**{key: _built(kinds[key], each, f"{where}.{key}") for key, each in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {value!r}; it should be of type {kind.__name__}.")
    return value
