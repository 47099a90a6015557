"""Compiles JAX programs for GPUs that are not there; what XLA made of them goes into a folder.

python tests/jax_deviceless.py FOLDER

FOLDER/<program>/program.txt is the compiled program, and beside it is what XLA dumps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import gaussian
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import marlin_cupy as mc
from marlin_cupy.integrations.jax import export_checks, partition_specs, stack

P: Any = PartitionSpec
M, K, GROUP, LAYERS, PRODUCTS = 16, 512, 64, 3, 8

#: A GpuTargetConfigProto of XLA. Without the versions it takes CUDA for one that cannot record calls.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


# ---- programs


def unrolled(x: Any, w: Any, bias: Any) -> Any:
    for _ in range(PRODUCTS):
        x = jnp.tanh(mc.matmul(x, w, bias))
    return x


def gradient(x: Any, w: Any, bias: Any) -> Any:
    return jax.grad(lambda x: unrolled(x, w, bias).astype(jnp.float32).sum())(x)


def layers(x: Any, up: Any, down: Any) -> Any:
    for _ in range(LAYERS):
        x = _layer(x, up, down)
    return x


def in_place(x: Any, up: Any, down: Any) -> Any:
    return jax.lax.scan(lambda x, i: (_layer(x, up[i], down[i]), None), x, jnp.arange(LAYERS))[0]


def sliced(x: Any, up: Any, down: Any) -> Any:
    return jax.lax.scan(lambda x, each: (_layer(x, *each), None), x, (up, down))[0]


def _layer(x: Any, up: Any, down: Any) -> Any:
    return x + jnp.tanh(x @ up) @ down


def exported(*arguments: Any) -> Any:
    """``unrolled``, from a file."""
    export = jax.export.export(jax.jit(unrolled), platforms=("cpu", "cuda"), disabled_checks=export_checks)
    return jax.export.deserialize(export(*arguments).serialize()).call


# ---- for one GPU and for four


def main(folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # if there is a GPU after all: kernels are chosen for the one above
    w = mc.quantize(gaussian(K, K, seed=1), "int4", GROUP).to("jax")
    ws = stack([w] * LAYERS)
    one, four = _mesh(1), _mesh(4)

    plain = [_there(each, one, P()) for each in (np.zeros((M, K), np.float16), w, np.zeros(K, np.float16))]
    stacks = [plain[0], *[_there(ws, one, P())] * 2]
    _compile(folder / "unrolled", unrolled, plain)
    _compile(folder / "gradient", gradient, plain)
    _compile(folder / "exported", exported(*plain), plain)
    _compile(folder / "in_place", in_place, stacks)
    _compile(folder / "sliced", sliced, stacks)

    x, columns, rows = _there(np.zeros((M, K), np.float16), four, P()), P(None, "model"), P("model")
    for program, weight in ((layers, w), (in_place, ws)):
        shares = [_there(weight, four, partition_specs(weight, four, each)) for each in (columns, rows)]
        _compile(folder / f"{program.__name__} on four", program, [x, *shares])


def _mesh(count: int) -> Mesh:
    devices = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=H200).devices
    return Mesh(np.array(devices), ("model",))


def _there(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Shapes without values, on devices of the mesh."""
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(
        lambda part, spec: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def _compile(folder: Path, program: Callable[..., Any], arguments: list[Any]) -> None:
    compiled = jax.jit(program).lower(*arguments).compile(compiler_options={"xla_dump_to": str(folder)})
    (folder / "program.txt").write_text(compiled.as_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
