"""Structs of arguments: what C++ makes of them and where the host packs them is the same."""

from __future__ import annotations

import struct
from typing import Annotated

import pytest

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.jit import compile as jit_compile
from marlin_cupy.jit import source
from marlin_cupy.kernels.arguments import Int, Int64, Struct, TensorMap, pointer
from marlin_cupy.kernels.cuda import CudaKernel
from marlin_cupy.spec import Spec


class Inner(Struct):
    first: Int
    address: Annotated[int, pointer("float"), "is aligned"]


class Args(Struct):
    """Every kind of member, with gaps before, between and after."""

    flag: Int
    x: Annotated[TensorMap, "at a multiple of 64"]
    y: Annotated[int, pointer("u16")]
    count: Int
    stride: Int64
    inner: Annotated[Inner, "a struct"]
    last: Int


def text(arguments: type[Struct], *more: str) -> str:
    lines = [*Inner.cpp(), *arguments.cpp(), *arguments.asserts(), 'extern "C" __global__ void gemm() {}', *more]
    return source.inline("\n".join(lines))


def test_members_lie_where_cpp_has_them() -> None:
    assert {name: place.offset for name, place in Args.places.items()} == {
        **{"flag": 0, "x": 64, "y": 192, "count": 200, "stride": 208},
        **{"inner.first": 216, "inner.address": 224, "last": 232},
    }
    assert (Args.size, Args.alignment) == (256, 64)
    assert (Inner.size, Inner.alignment) == (16, 8)
    jit_compile.compile(text(Args), "sm_90a")


def test_what_is_packed_is_found_there() -> None:
    values = (1, b"m" * 128, 1 << 63, -2, -(1 << 40), 3, 1 << 50, 4)
    data = bytearray(b"?" * Args.size)
    Args.packer.pack_into(data, 0, *values)
    found = [struct.unpack_from(f"={code}", data, offset)[0] for offset, code in Args.places.values()]
    assert tuple(found) == values
    assert data.count(b"?") == 0


def test_comments_are_printed() -> None:
    assert "    TensorMap x;  // at a multiple of 64" in Args.cpp()
    assert "    float* address;  // is aligned" in Inner.cpp()


@pytest.mark.parametrize("change", [("int last;", "i64 last[4];"), ("int count;", ""), ("u16* y;", "int y;")])
def test_a_twin_that_differs_does_not_compile(change: tuple[str, str]) -> None:
    changed = text(Args).replace(*change)
    assert changed != text(Args)
    with pytest.raises(mc.CompileError):
        jit_compile.compile(changed, "sm_90a")


def test_a_struct_of_cuda_src_is_checked_and_not_printed() -> None:
    class Vector(Struct, header="ptx/types.cuh"):
        word: Int

    Vector.__name__ = "Vec4"
    assert not any(line.startswith("struct") for line in Vector.cpp())
    with pytest.raises(mc.CompileError, match="so many bytes"):
        jit_compile.compile(source.inline("\n".join(['#include "ptx/types.cuh"', *Vector.cpp()])), "sm_90a")


@pytest.mark.parametrize("kernel", [*kernels.GEMM.kernels, *kernels.DEQUANTIZE.kernels], ids=lambda kernel: kernel.name)
def test_every_kernel_finds_its_arguments_where_the_host_packs_them(kernel: kernels.Kernel) -> None:
    if isinstance(kernel, CudaKernel):
        lines = ["constexpr bool STACKED = false;", *spec.layout.cpp().splitlines()]
        lines = ['#include "ptx/types.cuh"', *lines, '#include "layout.cuh"', *kernel.arguments.cpp()]
        jit_compile.compile(source.inline("\n".join([*lines, *kernel.arguments.asserts()])), "sm_90a")


spec = Spec.checked("int4", (4096, 4096), 128, "float16")
