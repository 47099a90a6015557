"""The house: imports point one way, twins match, importing is cheap, the public names are documented."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import marlin_cupy as mc
from marlin_cupy import formats, kernels
from marlin_cupy.jit.source import source_root

PACKAGE = Path(mc.__file__).parent
CUDA = source_root()

#: Lower rooms first; a room imports from rooms below it and from itself. Rooms of one row do not import one another.
ROWS = (
    ("errors",),
    ("device",),
    ("scalars",),
    ("frameworks", "formats", "timing", "progress", "writes"),
    ("layout", "numerics"),
    ("spec",),
    ("files",),
    ("packing",),
    ("jit",),
    ("kernels",),
    ("ready",),
    ("placed",),
    ("compilers",),
    ("tensor",),
    ("quantizing", "loading"),
    ("api",),
    ("tuning",),
    ("warming",),
    ("__init__",),
    ("quantizers", "checkpoints", "integrations"),
    ("bench",),
    ("__main__",),
)
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}
#: Rooms that may know PyTorch and JAX.
FRAMEWORK_ROOMS = ("frameworks", "compilers", "integrations")
#: Names that say nothing about what is inside.
VAGUE = ("utils", "util", "common", "helpers", "helper", "misc", "core", "base")

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(node: ast.AST) -> list[str]:
    """Full names of the modules (or of names in them) that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            yield getattr(node, "lineno", 0), name


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports_of(path):
        top, *rest = name.split(".")
        if top == "marlin_cupy":
            yield line, rest[0] if rest and rest[0] in LEVEL else "__init__"


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@every_module
def test_every_room_is_in_the_plan(path: Path) -> None:
    assert room_of(path) in LEVEL


@every_module
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the public names: from anything below
        wrong = [(line, other) for line, other in rooms_imported(path) if LEVEL[other] >= LEVEL["__init__"]]
    else:
        wrong = [(line, other) for line, other in rooms_imported(path) if other != room and LEVEL[other] >= LEVEL[room]]
    assert not wrong, f"{room} imports from above: {wrong}"


def test_formats_and_layout_know_no_array_library() -> None:
    for path in MODULES:
        if room_of(path) in ("formats", "layout"):
            libraries = {name.partition(".")[0] for _, name in imports_of(path)}
            assert not libraries & {"numpy", "cupy", "jax", "torch"}, name_of(path)
            assert "frameworks" not in {room for _, room in rooms_imported(path)}, name_of(path)


@every_module
def test_only_the_framework_rooms_import_torch_or_jax(path: Path) -> None:
    if room_of(path) not in FRAMEWORK_ROOMS:
        libraries = {name.partition(".")[0] for _, name in imports_of(path)}
        assert not libraries & {"torch", "jax", "jaxlib", "flax", "equinox"}


@every_module
def test_no_import_hides_in_a_function(path: Path) -> None:
    for function in ast.walk(tree_of(path)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                hidden = [name for name in imported(node) if name.partition(".")[0] == "marlin_cupy"]
                assert not hidden, f"{hidden} in {getattr(function, 'name', 'a lambda')}"


def test_no_two_modules_import_one_another() -> None:
    """Within rooms too."""
    modules = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in MODULES}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = set()
        for _, full in imports_of(path):
            parts = full.split(".")[1:] if full.startswith("marlin_cupy.") else []
            if ".".join(parts) in modules:
                targets.add(".".join(parts))
            elif ".".join(parts[:-1]) in modules:
                targets.add(".".join(parts[:-1]))
        edges[name] = targets - {name}

    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@every_module
def test_names_say_what_is_inside(path: Path) -> None:
    assert not {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts} & set(VAGUE)


# ---- host and device twins


def cuda_files(folder: str) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((CUDA / folder).glob("*.cuh"))}


def test_every_format_has_both_twins() -> None:
    codec = re.compile(r"^(?:struct|using) Codec\b", re.MULTILINE)
    decoders = {name for name, text in cuda_files("formats").items() if codec.search(text)}
    assert decoders == set(formats.names())
    for name in formats.names():
        assert (PACKAGE / "formats" / f"{name}.py").is_file()


@pytest.mark.parametrize("name", formats.names())
def test_a_decoder_reads_what_the_slab_of_its_format_has(name: str) -> None:
    """All planes, and all parameters after the scale, which kernels read themselves."""
    text = cuda_files("formats")[name]
    format = formats.get(name)
    assert set(re.findall(r"Slab::(plane\d)", text)) == {f"plane{number}" for number in range(len(format.planes))}
    assert set(re.findall(r"Slab::(\w+)>\(\)", text)) - {"plane0", "plane1"} == set(format.params[1:])


def test_every_kernel_has_both_twins() -> None:
    on_gpu = {kernel.name for kernel in kernels.GEMM.kernels} - {"reference"}
    in_cuda = set(cuda_files("kernels"))
    assert on_gpu <= in_cuda
    for name in in_cuda:  # kernels that multiply, and those that only measure
        assert (PACKAGE / "kernels" / f"{name}.py").is_file() or (PACKAGE / "bench" / f"{name}.py").is_file(), name
    for name in on_gpu:
        assert (PACKAGE / "kernels" / f"{name}.py").is_file()


def test_cuda_includes_only_its_own_files() -> None:
    for path in sorted(CUDA.rglob("*.cuh")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("#include"):
                match = re.fullmatch(r'#include "([^"]+)"', line.strip())
                assert match is not None, f"{path.name}: {line}"
                assert (CUDA / match[1]).is_file(), f"{path.name}: {line}"


# ---- importing


_IMPORT = """
import sys
import marlin_cupy
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_loads_no_other_library() -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    found = subprocess.run(
        [sys.executable, "-c", _IMPORT], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(found.stdout.split())
    others = {"cupy", "cupyx", "cupy_backends", "jax", "jaxlib", "torch", "rich", "typer", "matplotlib", "scipy"}
    assert not others & loaded
    assert "numpy" in loaded


# ---- the public names


def public_callables() -> dict[str, object]:
    found: dict[str, object] = {}
    for name in mc.__all__:
        value = getattr(mc, name)
        found[name] = value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if isinstance(member, property):
                    found[f"{name}.{attribute}"] = member.fget
                elif inspect.isfunction(member) and not attribute.startswith("_"):
                    found[f"{name}.{attribute}"] = member
    return found


PUBLIC = public_callables()


def test_all_names_are_there_and_sorted() -> None:
    assert mc.__all__ == sorted(mc.__all__)
    for name in ("quantize", "matmul", "dequantize", "pack", "load", "explain", "QuantizedTensor"):
        assert name in mc.__all__
    assert re.fullmatch(r"\d+\.\d+\.\d+", mc.__version__)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_api_is_documented_and_typed(name: str) -> None:
    value = PUBLIC[name]
    assert (inspect.getdoc(value) or "").rstrip().endswith((".", '"', ":", ")"))
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        untyped = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.name != "self" and parameter.annotation is parameter.empty
        ]
        assert not untyped
        assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", ["quantize", "matmul", "pack", "load", "explain", "tune", "warmup"])
def test_functions_say_what_they_take_and_refuse(name: str) -> None:
    doc = inspect.getdoc(getattr(mc, name)) or ""
    assert "Args:" in doc
    assert "Raises:" in doc
    for parameter in inspect.signature(getattr(mc, name)).parameters:
        assert re.search(rf"\b{parameter}\b", doc), parameter
