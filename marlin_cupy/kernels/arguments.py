"""The struct that a kernel takes: declared once, printed for C++, packed by the host.

::

    class Args(Struct):
        weight: Annotated[int, pointer("const u8"), "packed slabs"]
        M: Int
        stack: Stack

``Args.cpp()`` prints the C++ struct with the comments; a test compiles ``Args.asserts()``, which say where members lie.
``Args.packer.pack_into(memory, 0, weight, M, layer, layers)`` takes all values in order, those of a member struct one
by one: one call, since each launch pays for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Primitive:
    """A member that ``struct`` packs as one value.

    Attributes:
        cpp: its C++ type.
        code: what ``struct`` calls it.
        size, alignment: bytes.
        header: the file of cuda_src that declares the type.
    """

    cpp: str
    code: str
    size: int
    alignment: int
    header: str = "ptx/types.cuh"


Int = Annotated[int, Primitive("int", "i", 4, 4)]
Int64 = Annotated[int, Primitive("i64", "q", 8, 8)]
#: See jit.tensor_map.
TensorMap = Annotated[bytes, Primitive("TensorMap", "128s", 128, 64, "ptx/tensor_copy.cuh")]


def pointer(to: str) -> Primitive:
    """A device address of elements of a C++ type."""
    return Primitive(f"{to}*", "Q", 8, 8)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class Place(NamedTuple):
    """Where a value lies in a struct, and how ``struct`` packs it."""

    offset: int
    code: str


class Struct:
    """Annotated members in the order of C++: values that are :class:`Primitive`, or other structs.

    A struct with a ``header`` is declared there, for it has C++ functions; others are printed.

    Attributes:
        size, alignment: bytes, as C++ has them.
        places: of every value, by its name; "stack.layer" is that of a member's member.
        packer: packs all values at once.
    """

    size: ClassVar[int]
    alignment: ClassVar[int]
    places: ClassVar[dict[str, Place]]
    packer: ClassVar[struct.Struct]
    _header: ClassVar[str | None]

    def __init_subclass__(cls, header: str | None = None) -> None:
        cls._header = header
        cls.places, cls.alignment, end = {}, 1, 0
        for name, _, kind, _ in cls._members():
            start = _aligned(end, kind.alignment)
            if isinstance(kind, Primitive):
                cls.places[name] = Place(start, kind.code)
            else:
                cls.places |= {f"{name}.{inner}": Place(start + at, code) for inner, (at, code) in kind.places.items()}
            end, cls.alignment = start + kind.size, max(cls.alignment, kind.alignment)
        cls.size = _aligned(end, cls.alignment)
        text, end = "=", 0
        for start, code in cls.places.values():
            text += f"{start - end}x{code}" if start > end else code
            end = start + struct.calcsize(f"={code}")
        cls.packer = struct.Struct(f"{text}{cls.size - end}x")

    @classmethod
    def _members(cls) -> list[tuple[str, str, Any, str]]:
        """(name, C++ type, Primitive or Struct, comment) of each."""
        found = []
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if get_origin(hint) is not ClassVar:
                kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
                if not issubclass(kind, Struct):
                    kind, *more = more
                cpp = kind.cpp if isinstance(kind, Primitive) else kind.__name__
                found.append((name, cpp, kind, more[0] if more else ""))
        return found

    @classmethod
    def cpp(cls) -> list[str]:
        """The lines of C++: the headers that it needs, and the struct."""
        members = cls._members()
        headers = [kind.header if isinstance(kind, Primitive) else kind._header for _, _, kind, _ in members]
        lines = [f'#include "{header}"' for header in dict.fromkeys(headers) if header]
        if cls._header is None:
            lines.append(f"struct {cls.__name__} {{")
            lines += [
                f"    {cpp} {name};" + (f"  // {comment}" if comment else "") for name, cpp, _, comment in members
            ]
            lines.append("};")
        lines.append(f'static_assert(sizeof({cls.__name__}) == {cls.size}, "the host packs so many bytes");')
        return lines

    @classmethod
    def asserts(cls) -> list[str]:
        """The lines of C++ that say where the host takes each member to be, for tests: older NVRTC has no offsetof."""
        return [
            f'static_assert(__builtin_offsetof({cls.__name__}, {name}) == {place.offset}, "where the host packs it");'
            for name, place in cls.places.items()
        ]
