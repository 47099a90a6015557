"""JAX arrays: products on a GPU are left to ``compilers``; DLPack hands values over to whatever else needs them."""

from __future__ import annotations

from typing import Any

import jax
import numpy

from marlin_cupy.device import CPU, Device, cuda, import_cupy
from marlin_cupy.errors import DeviceError, UnsupportedError
from marlin_cupy.frameworks.framework import Framework

#: Classes that are pytrees.
_MET: set[type] = set()


class JaxFramework(Framework):
    """Immutable arrays on one device."""

    name = "jax"
    takes_apart = True

    def meet(self, kind: Any) -> None:
        """Register it as a pytree."""
        if kind in _MET:
            return
        _MET.add(kind)
        jax.tree_util.register_pytree_with_keys(
            kind,
            lambda w: ([(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in w.tree.items()], w.whole),
            kind.of_tree,
            lambda w: (tuple(w.tree.values()), w.whole),
        )

    def follows(self, x: Any, packed: Any, bias: Any | None) -> bool:
        """All products with a weight in JAX, traced or not, and whatever is traced or on a GPU."""
        return (
            isinstance(packed, jax.Array)
            or isinstance(x, jax.core.Tracer)
            or isinstance(bias, jax.core.Tracer)
            or self.device(x) != CPU  # JAX gives memory of x to others unless it launches what reads it
        )

    def device(self, array: Any) -> Device:
        """CPU or the CUDA GPU; UnsupportedError for traced arrays, DeviceError for sharded and other ones."""
        if isinstance(array, jax.core.Tracer):
            raise UnsupportedError(
                "a JAX array is traced by jax.jit, grad or vmap, where arrays have no values yet, and this needs them; "
                "do it outside the transformed function (matmul of JAX arrays works inside)."
            )
        devices = list(array.devices())
        if len(devices) != 1:
            raise DeviceError(f"a JAX array is spread over {len(devices)} devices; arrays on one device can be used.")
        device = devices[0]
        if device.platform == "cpu":
            return CPU
        if device.platform != "gpu":
            raise DeviceError(f"a JAX array is on platform {device.platform}; arrays on cpu and gpu can be used.")
        return cuda(device.local_hardware_id)

    def refuse_writing(self, array: Any, role: str) -> None:
        """Always."""
        raise TypeError(f"{role} is a jax array, and those are immutable; use what the function returns instead.")

    def to_native(self, array: Any) -> Any:
        """A NumPy or CuPy array over the array's memory, read-only by JAX's contract."""
        if self.device(array) == CPU:
            return numpy.asarray(array)
        return import_cupy("a JAX array on a GPU").from_dlpack(array)

    def settle(self, native: Any) -> None:
        """Wait for CuPy's current stream, since JAX reuses memory in the order of its own."""
        if not isinstance(native, numpy.ndarray):
            with native.device:
                import_cupy("a JAX array on a GPU").cuda.get_current_stream().synchronize()

    def from_native(self, native: Any) -> Any:
        """A JAX array over a CuPy array's memory; a NumPy array is copied to JAX's CPU, or default device if none."""
        if isinstance(native, numpy.ndarray):
            return jax.device_put(native, _cpu())
        with native.device:  # whose current stream JAX is to wait for
            return jax.dlpack.from_dlpack(native)


def _cpu() -> Any:
    """None where JAX was told to leave the CPU alone, as with JAX_PLATFORMS=cuda."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


FRAMEWORK = JaxFramework()
