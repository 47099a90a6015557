"""What the machine is: devices, the properties of a GPU that kernels depend on, installed packages."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from marlin_cupy.errors import DeviceError, MissingDependencyError

_PACKAGES = [
    "numpy",
    "ml_dtypes",
    "safetensors",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "jax",
    "jaxlib",
    "torch",
    "rich",
    "typer",
    "matplotlib",
    "humming-kernels",
]
#: Architectures whose own instructions need the "a" suffix, which exists from Hopper on.
_ARCH_SPECIFIC = 90


#: Shared memory per SM (CUDA C++ Programming Guide, technical specifications); a usual number of SMs and GB/s of
#: memory, from the data sheets of A100 80GB, RTX A6000, Jetson AGX Orin, RTX 4090, H200, B200, B300, RTX 5090 and GB10.
_TYPICAL_OF_ARCH = {
    "80": (164 << 10, 108, 2039),
    "86": (100 << 10, 84, 768),
    "87": (164 << 10, 16, 205),
    "89": (100 << 10, 128, 1008),
    "90": (228 << 10, 132, 4800),
    "100": (228 << 10, 148, 8000),
    "103": (228 << 10, 148, 8000),
    "120": (100 << 10, 170, 1792),
    "121": (100 << 10, 48, 273),
}
#: GB/s that a driver can be believed to mean.
_PLAUSIBLE_GBS = (20, 50_000)


@dataclass(frozen=True)
class Device:
    """Where memory is: ``Device("cpu")`` or ``Device("cuda", 0)``."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @staticmethod
    def parse(device: Device | str) -> Device:
        """``"cpu"``, ``"cuda"`` or ``"cuda:1"`` as a Device; ValueError otherwise."""
        if isinstance(device, Device):
            return device
        kind, _, index = str(device).partition(":")
        if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
            raise ValueError(f'device is {device!r}; use "cpu", "cuda" or "cuda:N".')
        return CPU if kind == "cpu" else cuda(int(index or 0))


CPU = Device("cpu")


@functools.cache
def cuda(index: int) -> Device:
    """The GPU of that index; always the same object, which makes it cheap to compare."""
    return Device("cuda", index)


@dataclass(frozen=True)
class Gpu:
    """The facts about one GPU that choosing and compiling a kernel needs. Sizes in bytes."""

    index: int
    name: str
    arch: str  # "sm_90a": the architecture NVRTC compiles for
    sm_count: int
    shared_per_block: int
    shared_per_sm: int
    l2_bytes: int
    memory_gbs: float = 1000.0  # nominal, in GB/s; an estimate


def import_cupy(purpose: str) -> ModuleType:
    """CuPy, or a MissingDependencyError that says what it was needed for and how to get it."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs CuPy, which is not importable here ({error}); "
            "pip install 'marlin_cupy[cuda13]' (or [cuda12] for a CUDA 12 driver)."
        ) from error
    return cupy


def on(device: Device) -> contextlib.AbstractContextManager[Any]:
    """A context in which CuPy allocates and computes on ``device``; nothing for the CPU.

    Around all that is done with CuPy's arrays but launches of our kernels: another GPU may be the thread's current one,
    for instance after JAX has used several, and CuPy would compute, and wait, there.
    """
    return contextlib.nullcontext() if device == CPU else import_cupy("GPU memory").cuda.Device(device.index)


def namespace(array: Any) -> ModuleType:
    """The module whose functions compute on an array: numpy, or cupy or jax.numpy, which the caller has imported."""
    package = type(array).__module__.partition(".")[0]
    return sys.modules["jax.numpy" if package in ("jax", "jaxlib") else package]


def contiguous(array: Any) -> Any:
    """``array`` in row-major order, which a view as another type needs; JAX's arrays always are."""
    xp = namespace(array)
    return array if xp.__name__ == "jax.numpy" else xp.ascontiguousarray(array)


def gpu_count() -> int:
    """Number of usable CUDA GPUs; 0 without CuPy, without a driver or without a device."""
    return _count_gpus()[0]


def no_gpu(purpose: str) -> str:
    """A sentence that says that ``purpose`` needs a GPU, and what keeps :func:`gpu_count` at 0."""
    return f"{purpose} needs a CUDA GPU that CuPy can use, and there is none: {_count_gpus()[1]}."


def _count_gpus() -> tuple[int, str]:
    """(number, why it is not larger)."""
    try:
        count = int(import_cupy("using a GPU").cuda.runtime.getDeviceCount())
    except Exception as error:  # a missing or broken driver raises types that CuPy does not export
        return 0, str(error).rstrip(".")
    return count, f"CUDA finds {count}"


def arch_of(major: int, minor: int) -> str:
    """The architecture name that NVRTC takes for a compute capability: (8, 0) is "sm_80", (9, 0) "sm_90a"."""
    number = 10 * major + minor
    return f"sm_{number}a" if number >= _ARCH_SPECIFIC else f"sm_{number}"


def gpu_of_arch(arch: str) -> Gpu:
    """The facts about a typical GPU of an architecture, for compiling without one; ValueError for unknown ones."""
    number = arch.removeprefix("sm_").rstrip("af")
    if number not in _TYPICAL_OF_ARCH:
        known = ", ".join(arch_of(*divmod(int(each), 10)) for each in _TYPICAL_OF_ARCH)
        raise ValueError(f"arch is {arch!r}; known architectures are {known}.")
    shared_per_sm, sm_count, memory_gbs = _TYPICAL_OF_ARCH[number]
    return Gpu(-1, f"any {arch}", arch, sm_count, shared_per_sm - 1024, shared_per_sm, 0, memory_gbs)


@functools.cache
def gpu(index: int = 0) -> Gpu:
    """Properties of GPU ``index``; DeviceError when there is none, MissingDependencyError without CuPy."""
    cupy = import_cupy(f"cuda:{index}")
    count = gpu_count()
    if index >= count:
        if count == 0:
            raise DeviceError(no_gpu(f"cuda:{index}"))
        raise DeviceError(f"cuda:{index} was asked for; this machine has cuda:0 to cuda:{count - 1}.")
    properties: dict[str, Any] = cupy.cuda.runtime.getDeviceProperties(index)
    arch = arch_of(properties["major"], properties["minor"])
    return Gpu(
        index=index,
        name=properties["name"].decode(),
        arch=arch,
        sm_count=properties["multiProcessorCount"],
        shared_per_block=properties["sharedMemPerBlockOptin"],
        shared_per_sm=properties["sharedMemPerMultiprocessor"],
        l2_bytes=properties["l2CacheSize"],
        memory_gbs=_memory_gbs(cupy.cuda.runtime, index, arch),
    )


def _memory_gbs(runtime: Any, index: int, arch: str) -> float:
    """The nominal rate of a GPU's memory, as the driver tells it or as is typical where that cannot be."""
    try:
        kilohertz = runtime.deviceGetAttribute(runtime.cudaDevAttrMemoryClockRate, index)
        bits = runtime.deviceGetAttribute(runtime.cudaDevAttrGlobalMemoryBusWidth, index)
    except (AttributeError, runtime.CUDARuntimeError):
        kilohertz = bits = 0
    told = 2 * kilohertz * bits / 8 / 1e6  # two bits per clock and line
    if _PLAUSIBLE_GBS[0] < told < _PLAUSIBLE_GBS[1]:
        return float(told)
    return float(_TYPICAL_OF_ARCH.get(arch.removeprefix("sm_").rstrip("af"), (0, 0, 1000))[2])


def installed() -> dict[str, str | None]:
    """Version of every package this project can use, or None where it is not installed. Imports nothing."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
