"""Which tests run where: tests marked ``gpu`` run when ``-m`` asks for them, and then a GPU has to be there.

Kernels are compiled into a folder that is deleted at the end. MARLIN_CUPY_TEST_CACHE names one to keep instead: most of
the time of the GPU tests is NVRTC's, and the next run then has it all.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import warnings
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from marlin_cupy.device import gpu, gpu_count, import_cupy
from marlin_cupy.jit.cache import BUNDLE_VARIABLE, CACHE_VARIABLE
from marlin_cupy.jit.launch import Function

# Before JAX is imported: it must leave GPU memory to the other libraries, and have several devices on the CPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
if gpu_count() == 0:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or its plugin for CUDA says at length what it misses

hypothesis.settings.register_profile("suite", derandomize=True, database=None, deadline=None, max_examples=60)
hypothesis.settings.load_profile("suite")

_CACHE = pytest.StashKey[str]()

#: What is about libraries that are not there: the test extra comes without PyTorch.
_ABOUT = {
    "torch": ["test_torch.py", "test_gpu_torch_compile.py"],
    "flax": ["test_flax.py"],
    "orbax": ["test_orbax.py"],
    "equinox": ["test_equinox.py"],
}
collect_ignore = [file for name, files in _ABOUT.items() if not importlib.util.find_spec(name) for file in files]


def _compiles_for_absent_gpus() -> bool:
    """Whether JAX has its plugin for CUDA, and is recent enough to do that with it."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    major, minor, *_ = importlib.metadata.version("jax").split(".")
    return (int(major), int(minor)) >= (0, 10)


if not _compiles_for_absent_gpus():
    collect_ignore.append("test_jax_compiled.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; runs only when -m asks for it (pytest -m gpu).")
    config.addinivalue_line("markers", "hopper: about a kernel for sm_90a; left out on other GPUs.")
    config.addinivalue_line("markers", "two_gpus: needs two GPUs; left out where there are fewer.")
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the environment
        kept = os.environ.get("MARLIN_CUPY_TEST_CACHE")
        os.environ[CACHE_VARIABLE] = kept or tempfile.mkdtemp(prefix="marlin_cupy-tests-")
        if not kept:
            config.stash[_CACHE] = os.environ[CACHE_VARIABLE]
        os.environ.pop(BUNDLE_VARIABLE, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.hookimpl(trylast=True)  # after pytest has applied -m itself
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=on_gpu)
    elif on_gpu and gpu_count() == 0:
        raise pytest.UsageError(
            f"-m {config.option.markexpr!r} selects {len(on_gpu)} GPU tests and this machine has no usable CUDA GPU."
        )
    elif on_gpu:
        here = {"hopper": gpu().arch == "sm_90a", "two_gpus": gpu_count() > 1}
        elsewhere = [item for item in items if any(item.get_closest_marker(name) for name in here if not here[name])]
        items[:] = [item for item in items if item not in elsewhere]
        config.hook.pytest_deselected(items=elsewhere)


@pytest.fixture(autouse=True)
def _first_gpu(request: pytest.FixtureRequest) -> None:
    """Is the current one when a test begins; with several of them JAX leaves another one current."""
    if request.node.get_closest_marker("gpu"):
        import_cupy("a test").cuda.Device(0).use()


@pytest.fixture(scope="module")
def jax() -> ModuleType:
    """JAX with a GPU, for tests that are marked so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own start
        import jax

        assert jax.devices("gpu"), "JAX sees no GPU: install jax[cuda13] or jax[cuda12]"
    return jax


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of all launches in the test, in order: "dependent" or "plain"."""
    found: list[str] = []
    original = Function.launch

    def spy(self: Function, *arguments: Any) -> None:
        found.append("dependent" if arguments[4:5] == (True,) else "plain")
        original(self, *arguments)

    monkeypatch.setattr(Function, "launch", spy)
    return found
