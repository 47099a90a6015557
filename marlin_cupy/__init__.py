"""One packed quantized weight, one GEMM, shared by NumPy, CuPy, JAX and PyTorch."""

from marlin_cupy.api import Considered, Explanation, explain, matmul
from marlin_cupy.errors import (
    CompileError,
    DeviceError,
    FileFormatError,
    MissingDependencyError,
    UnsupportedError,
)
from marlin_cupy.loading import load
from marlin_cupy.quantizing import dequantize, pack, quantize
from marlin_cupy.tensor import QuantizedTensor, Unpacked
from marlin_cupy.tuning import TunedCandidate, TunedRows, Tuning, tune
from marlin_cupy.warming import warmup

__version__ = "0.1.0"

__all__ = [
    "CompileError",
    "Considered",
    "DeviceError",
    "Explanation",
    "FileFormatError",
    "MissingDependencyError",
    "QuantizedTensor",
    "TunedCandidate",
    "TunedRows",
    "Tuning",
    "Unpacked",
    "UnsupportedError",
    "dequantize",
    "explain",
    "load",
    "matmul",
    "pack",
    "quantize",
    "tune",
    "warmup",
]
