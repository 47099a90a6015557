"""Contenders that need PyTorch: cuBLAS as ``torch.mm``, PyTorch's int4 op (tinygemm), and humming.

PyTorch is looked up by name when a contender is made; nothing here imports it before. Its graphs are captured by its
own ``CUDAGraph`` on the stream of the bench, so that all contenders share one order of work.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from marlin_cupy.bench.contenders import (
    CUBLAS,
    HUMMING,
    TINYGEMM,
    Contender,
    Setup,
    UnavailableError,
)
from marlin_cupy.scalars import BF16
from marlin_cupy.timing import Replay, Run

Tensor = Any  # a torch.Tensor

_ROWS_AT_ONCE = 4096


class Torch:
    """PyTorch on the stream of the bench; UnavailableError where it is not installed or sees no GPU."""

    def __init__(self, setup: Setup) -> None:
        try:
            self.module: Any = importlib.import_module("torch")
        except ImportError as error:
            raise UnavailableError("PyTorch is not installed") from error
        if not self.module.cuda.is_available():
            raise UnavailableError(f"PyTorch {self.module.__version__} sees no CUDA GPU")
        self.device = f"cuda:{setup.gpu.index}"
        self._stream = self.module.cuda.ExternalStream(int(setup.stream.ptr), device=self.device)

    def on_stream(self) -> Any:
        """A context in which PyTorch works on the stream of the bench."""
        return self.module.cuda.stream(self._stream)

    def dtype(self, name: str) -> Any:
        """The torch.dtype of that name."""
        return getattr(self.module, name)

    def random(self, rows: int, columns: int, dtype: str, scale: float) -> Tensor:
        """Normal values times ``scale``."""
        values = self.module.randn((rows, columns), dtype=self.dtype(dtype), device=self.device)
        return values.mul_(scale)


class TorchGraph:
    """A captured graph and the tensor that its last launch writes. A Replay."""

    def __init__(self, torch: Torch, graph: Any, launches: int, y: Tensor) -> None:
        self.launches = launches
        self.y = y
        self._torch, self._graph = torch, graph

    def replay(self) -> None:
        """Launch the graph."""
        with self._torch.on_stream():
            self._graph.replay()


class TorchRun(Run):
    """Launches in PyTorch; a step returns the tensor that it wrote."""

    def __init__(
        self, torch: Torch, x: Tensor, steps: Sequence[Callable[[], Tensor]], expected: Callable[[Tensor], Tensor]
    ) -> None:
        self._torch, self._x, self._steps, self._expected = torch, x, steps, expected

    @property
    def launches(self) -> int:
        """One per step."""
        return len(self._steps)

    def replay(self) -> None:
        """All steps."""
        with self._torch.on_stream():
            for step in self._steps:
                step()

    def capture(self, rounds: int) -> Replay:
        """Through torch.cuda.CUDAGraph, whose private pool keeps what the steps allocate."""
        graph = self._torch.module.cuda.CUDAGraph()
        y: Tensor = None
        with self._torch.on_stream():
            self._torch.module.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for _ in range(rounds):
                    for step in self._steps:
                        y = step()
            except BaseException:
                with contextlib.suppress(Exception):  # the capture may be invalid; its error would hide the cause
                    graph.capture_end()
                raise
            graph.capture_end()
        return TorchGraph(self._torch, graph, rounds * self.launches, y)

    def error(self, graph: Replay) -> float | None:
        """Of the graph's last launch, for fresh inputs and poisoned output."""
        assert isinstance(graph, TorchGraph)
        with self._torch.on_stream():
            self._x.normal_()
            graph.y.fill_(math.nan)
            graph.replay()
            expected = self._expected(self._x.float())
            return float((graph.y.float() - expected).norm() / expected.norm())


class TorchCublas(Contender):
    """torch.mm on W stored as (N, K), as nn.Linear does."""

    name = CUBLAS

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        torch = self._torch = Torch(setup)
        K, N = setup.shape.K, setup.shape.N
        with torch.on_stream():
            first = torch.random(N, K, setup.dtype, 1 / math.sqrt(K))
            self._weights = self._cold(first, first.nbytes, lambda weight: weight.clone())
        version = torch.module.__version__
        self.description = f"torch.mm(x, W.t()) of PyTorch {version}, {setup.dtype} weights stored as (N, K)"

    def run(self, m: int, dependent: bool) -> Run:
        """One GEMM per weight copy."""
        torch, K, N = self._torch, self._setup.shape.K, self._setup.shape.N
        with torch.on_stream():
            x = torch.random(m, K, self._setup.dtype, 1.0)
            y = torch.module.empty((m, N), dtype=torch.dtype(self._setup.dtype), device=torch.device)
        steps = [functools.partial(torch.module.mm, x, weight.t(), out=y) for weight in self._weights]
        return TorchRun(torch, x, steps, lambda x32: x32 @ self._weights[0].float().t())


class Tinygemm(Contender):
    """PyTorch's own int4 op: bfloat16, asymmetric, weight = (code - 8) * scale + zero per group."""

    name = TINYGEMM
    _MAX_M = 128

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        torch = self._torch = Torch(setup)
        K, N = setup.shape.K, setup.shape.N
        group = setup.group_size
        tiles = next((tiles for tiles in (8, 4, 2) if K % (16 * tiles) == 0), None)
        if setup.format != "int4":
            raise UnavailableError(f"it has int4 weights, not {setup.format}")
        if group not in (32, 64, 128, 256) or tiles is None or K % group or N % 8:
            raise UnavailableError(
                f"it takes groups of 32, 64, 128 or 256 that divide K, K in multiples of 32 and N of 8, "
                f"not K={K}, N={N} with groups of {group}"
            )
        with torch.on_stream():
            codes, scales, zeros = self._quantize(torch.random(N, K, BF16.name, 1 / math.sqrt(K)), group)
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            packed = torch.module.ops.aten._convert_weight_to_int4pack(pairs, tiles)
            params = torch.module.stack([scales, zeros], dim=2).transpose(0, 1).contiguous()
            self._dense = self._dequantize(codes, scales, zeros)
            self._weights = self._cold(
                (packed, params), packed.nbytes + params.nbytes, lambda pair: (pair[0].clone(), pair[1].clone())
            )
        version = torch.module.__version__
        self.description = (
            f"torch.ops.aten._weight_int4pack_mm of PyTorch {version}, bfloat16, at most {self._MAX_M} rows"
        )
        self.dtype = BF16.name

    def _quantize(self, weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 codes (N, K), bfloat16 scales and zeros (N, groups), from the extremes of each group."""
        torch = self._torch.module
        codes, scales, zeros = [], [], []
        for rows in weight.split(_ROWS_AT_ONCE):
            grouped = rows.float().view(rows.shape[0], -1, group)
            low, high = grouped.amin(dim=2), grouped.amax(dim=2)
            scale = ((high - low) / 15).clamp(min=1e-6).bfloat16()
            zero = (low + 8 * scale.float()).bfloat16()
            steps = (grouped - zero.float()[:, :, None]) / scale.float()[:, :, None] + 8
            codes.append(steps.round_().clamp_(0, 15).to(torch.uint8).view(rows.shape))
            scales.append(scale)
            zeros.append(zero)
        return torch.cat(codes), torch.cat(scales), torch.cat(zeros)

    @staticmethod
    def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """float32 (N, K)."""
        grouped = codes.view(*scales.shape, -1).float()
        return grouped.sub_(8).mul_(scales.float()[:, :, None]).add_(zeros.float()[:, :, None]).view(codes.shape)

    def refuses(self, m: int) -> str | None:
        """Large M: it is made for few rows."""
        return f"above M = {self._MAX_M}, where its time grows with every row" if m > self._MAX_M else None

    def run(self, m: int, dependent: bool) -> Run:
        """The op allocates its result; the graph's pool keeps it."""
        torch, group = self._torch, self._setup.group_size
        with torch.on_stream():
            x = torch.random(m, self._setup.shape.K, BF16.name, 1.0)
        multiply = torch.module.ops.aten._weight_int4pack_mm
        steps = [functools.partial(multiply, x, packed, group, params) for packed, params in self._weights]
        return TorchRun(torch, x, steps, lambda x32: x32 @ self._dense.t())


class Humming(Contender):
    """humming-kernels, through its layer class for the weights and its functional forward for the launches.

    Runs as shipped: its own choice of kernel per M, which on Hopper uses programmatic dependent launch. Compiles its
    kernels at run time, for some shapes many seconds.
    """

    name = HUMMING
    _DTYPES = ("int4", "int8")

    def __init__(self, setup: Setup, ms: Sequence[int]) -> None:
        super().__init__(setup)
        if setup.format not in self._DTYPES:
            raise UnavailableError(f"it is timed for {' and '.join(self._DTYPES)} weights, not {setup.format}")
        torch = self._torch = Torch(setup)
        try:
            package = importlib.import_module("humming")
            layer_class = importlib.import_module("humming.layer").HummingLayer
            self._forward = importlib.import_module("humming.forward").humming_forward
            heuristics = importlib.import_module("humming.tune").get_heuristics_config
        except ImportError as error:
            raise UnavailableError(f"humming-kernels cannot be imported ({error})") from error
        K, N = setup.shape.K, setup.shape.N
        group_size = 0 if setup.group_size == -1 else setup.group_size
        with torch.on_stream(), torch.module.no_grad():
            layer = layer_class(
                shape_n=N,
                shape_k=K,
                weight_config={"dtype": setup.format, "group_size": group_size},
                torch_dtype=torch.dtype(setup.dtype),
            ).to(torch.device)
            layer.load_from_unquantized(torch.random(N, K, setup.dtype, 1 / math.sqrt(K)))
            stored = {"weight": layer.weight, "weight_scale": layer.weight_scale}
            self._dense = layer.weight_schema.dequant_tensors(stored).float()
            layer.transform()
            self._config = layer.humming_config
            names = ("weight", "weight_scale", "weight_scale_2")
            first = {name: getattr(layer, name).detach() for name in names if getattr(layer, name, None) is not None}
            self._weights = self._cold(
                {name: tensor.clone() for name, tensor in first.items()},
                sum(tensor.nbytes for tensor in first.values()),
                lambda tensors: {name: tensor.clone() for name, tensor in tensors.items()},
            )
            self._locks = [layer.locks.clone() for _ in range(self.copies)]
        # Its kernel choice as intervals of M without gaps, so that the first launch compiles them all, in parallel.
        bounds = sorted(set(ms))
        choices = [heuristics(self._config, shape_m=m, device=setup.gpu.index) for m in bounds]
        intervals = list(zip([0, *bounds], bounds, choices, strict=False))
        self._tuning = json.dumps(intervals, default=lambda value: value.value)  # enums by value
        self._choices = dict(zip(bounds, choices, strict=True))
        self.description = f"humming {package.__version__} as shipped, with dependent launch where it chooses so"

    def details(self, m: int, dependent: bool) -> tuple[str, str]:
        """Its tuning configuration."""
        return self.name, json.dumps(self._choices[m], default=lambda value: value.value)

    def run(self, m: int, dependent: bool) -> Run:
        """One forward per weight copy."""
        torch, K, N = self._torch, self._setup.shape.K, self._setup.shape.N
        with torch.on_stream():
            x = torch.random(m, K, self._setup.dtype, 1.0)
            y = torch.module.empty((m, N), dtype=torch.dtype(self._setup.dtype), device=torch.device)

        def step(weight: dict[str, Tensor], locks: Tensor) -> Tensor:
            self._forward(self._config, inputs=x, outputs=y, locks=locks, tuning_config=self._tuning, **weight)
            return y

        steps = [functools.partial(step, *copy) for copy in zip(self._weights, self._locks, strict=True)]
        return TorchRun(torch, x, steps, lambda x32: x32 @ self._dense.t())


def release_memory() -> None:
    """Give PyTorch's unused GPU memory back, where PyTorch has been imported."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
