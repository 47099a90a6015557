"""Dependent launches without a GPU: which launch may be one, what the driver is given, who marks a write."""

from __future__ import annotations

import copy
import ctypes
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import FORMATS, GPUS, gaussian, product_of, rows

import marlin_cupy as mc
from marlin_cupy import kernels, packing, ready, tensor, writes
from marlin_cupy.jit import launch
from marlin_cupy.kernels import Plan, sm90_stream
from marlin_cupy.spec import Spec
from marlin_cupy.writes import Writes

H200 = GPUS["sm_90a"]
STREAM, OTHER = 0x700, 0x800


# ---- the driver's structures, as its documentation declares them


class LaunchAttributeValue(ctypes.Union):
    _fields_ = (("pad", ctypes.c_char * 64), ("allowed", ctypes.c_int), ("aligns", ctypes.c_uint64))


class LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", LaunchAttributeValue))


class LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((f"{of}{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


def test_structures_are_as_large_as_the_drivers() -> None:
    assert launch._CONFIG.size == ctypes.sizeof(LaunchConfig) == 56
    assert launch._ATTRIBUTE.size == ctypes.sizeof(LaunchAttribute) == 72


# ---- launches


class FakeGpu:
    """Driver and runtime; logs ("plain" or "dependent", stream, shared bytes)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int]] = []
        self.captures: dict[int, tuple[int, int]] = {}
        self.device, self.code = 0, 0
        self.before_launch = lambda: None
        driver = SimpleNamespace(ctxGetCurrent=lambda: 0xC0 + self.device, launchKernel=self.plain)
        runtime = SimpleNamespace(getDevice=lambda: self.device, setDevice=self.set_device)
        self.function = launch.Function.__new__(launch.Function)
        self.function.__dict__.update(_runtime=runtime, device=0, shared_bytes=1000)
        launch_ex = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(self.dependent)
        launch_ex.argtypes = None
        self.function._set(0xF00, 0xC0, driver, launch_ex)

    def set_device(self, device: int) -> None:
        self.device = device

    def plain(self, function: int, *arguments: int) -> None:
        assert (function, self.device) == (0xF00, 0)
        assert arguments[:6] == (132, 1, 1, 256, 1, 1)
        shared_bytes, stream, parameters, extra = arguments[6:]
        assert parameters
        assert extra == 0
        self.before_launch()
        self.log.append(("plain", stream, shared_bytes))

    def dependent(self, config: int, function: int, parameters: int, extra: None) -> int:
        assert (function, self.device, extra) == (0xF00, 0, None)
        assert parameters
        found = LaunchConfig.from_address(config)
        assert (found.gridx, found.gridy, found.gridz, found.blockx, found.blocky, found.blockz) == (
            132,
            1,
            1,
            256,
            1,
            1,
        )
        assert found.attribute_count == 1
        attribute = LaunchAttribute.from_address(found.attributes)
        assert (attribute.id, attribute.value.allowed) == (6, 1)
        self.before_launch()
        self.log.append(("dependent", found.stream or 0, found.shared_bytes))
        return self.code

    def launch(self, record: Writes, stream: int = STREAM) -> str:
        """How a launch that may be dependent was made."""
        self.function.launch_dependent(record, 132, 256, stream, launch.ArgumentBlock(96), 2000)
        kind, on, shared_bytes = self.log[-1]
        assert (on, shared_bytes) == (stream, 2000 if kind == "dependent" else 1000)
        return kind


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    found = FakeGpu()
    monkeypatch.setattr(launch, "capture_of", lambda stream: found.captures.get(stream, (0, 0)))
    return found


def test_the_first_launch_after_a_write_is_plain_on_every_stream(fake: FakeGpu) -> None:
    record = Writes()
    for _ in range(2):
        assert [fake.launch(record) for _ in range(3)] == ["plain", "dependent", "dependent"]
        assert [fake.launch(record, OTHER) for _ in range(2)] == ["plain", "dependent"]
        assert [fake.launch(record, 0) for _ in range(2)] == ["plain", "dependent"]
        record.mark()


def test_while_a_weight_is_written_every_launch_is_plain(fake: FakeGpu) -> None:
    record = Writes()
    fake.launch(record)
    with record.writing():
        assert [fake.launch(record) for _ in range(3)] == ["plain"] * 3
        with record.writing():  # another thread writes another weight
            pass
        record.mark()
        assert [fake.launch(record) for _ in range(2)] == ["plain"] * 2
    assert [fake.launch(record) for _ in range(2)] == ["plain", "dependent"]


def test_a_write_that_fails_is_a_write(fake: FakeGpu) -> None:
    record = Writes()
    fake.launch(record)
    with pytest.raises(RuntimeError), record.writing():
        raise RuntimeError
    assert [fake.launch(record) for _ in range(2)] == ["plain", "dependent"]


def test_a_write_during_a_plain_launch_counts(fake: FakeGpu) -> None:
    record = Writes()
    fake.before_launch = record.mark
    assert [fake.launch(record) for _ in range(3)] == ["plain"] * 3
    fake.before_launch = lambda: None
    assert [fake.launch(record) for _ in range(2)] == ["plain", "dependent"]


def test_a_stream_is_settled_after_its_plain_launch_and_not_before(fake: FakeGpu) -> None:
    """Another thread that launches on the stream at the same time must not be dependent and come first."""
    record = Writes()
    seen: list[str] = []

    def meanwhile() -> None:
        fake.before_launch = lambda: None
        seen.append(fake.launch(record))

    fake.before_launch = meanwhile
    fake.launch(record)
    assert seen == ["plain"]


def test_a_launch_that_fails_settles_nothing(fake: FakeGpu) -> None:
    record = Writes()

    def fail() -> None:
        raise RuntimeError

    fake.before_launch = fail
    with pytest.raises(RuntimeError):
        fake.launch(record)
    fake.before_launch = lambda: None
    assert fake.launch(record) == "plain"


def test_a_captured_launch_settles_its_capture_alone(fake: FakeGpu) -> None:
    record = Writes()
    fake.captures[STREAM] = 1, 77
    assert [fake.launch(record) for _ in range(3)] == ["plain", "dependent", "dependent"]
    assert fake.launch(record, OTHER) == "plain"
    fake.captures[STREAM] = 1, 78  # the next capture on that stream
    assert [fake.launch(record) for _ in range(2)] == ["plain", "dependent"]
    del fake.captures[STREAM]  # eager: nothing has run there so far
    assert [fake.launch(record) for _ in range(2)] == ["plain", "dependent"]
    record.mark()
    fake.captures[STREAM] = 1, 78
    assert fake.launch(record) == "plain"


def test_what_cannot_be_told_is_plain(fake: FakeGpu) -> None:
    record = Writes()
    for status in ((-1, 0), (2, 0)):  # no answer; an invalidated capture
        fake.captures[STREAM] = status
        assert [fake.launch(record) for _ in range(2)] == ["plain", "plain"]


def test_threads_have_default_streams_of_their_own(fake: FakeGpu) -> None:
    record = Writes()
    per_thread = 2
    assert [fake.launch(record, per_thread) for _ in range(2)] == ["plain", "dependent"]
    kinds: list[str] = []
    thread = threading.Thread(target=lambda: kinds.extend(fake.launch(record, per_thread) for _ in range(2)))
    thread.start()
    thread.join()
    assert kinds == ["plain", "dependent"]


def test_another_current_device_is_restored(fake: FakeGpu) -> None:
    record = Writes()
    fake.device = 3
    assert [fake.launch(record) for _ in range(2)] == ["plain", "dependent"]
    assert fake.device == 3


def test_a_refused_launch_names_the_drivers_error(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Writes()
    fake.launch(record)
    fake.code = 1
    monkeypatch.setattr(launch, "_error_name", lambda code: f"CUDA_ERROR_INVALID_VALUE ({code})")
    with pytest.raises(mc.DeviceError, match=r"CUDA_ERROR_INVALID_VALUE \(1\)\.$"):
        fake.launch(record)


def test_one_record_per_gpu_for_all_threads() -> None:
    found: list[Writes] = []
    threads = [threading.Thread(target=lambda: found.append(writes.of_gpu(-7))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert writes.of_gpu(-8) is not found[0]


# ---- who marks a write


def test_a_fresh_tensor_is_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Writes()
    monkeypatch.setattr(writes, "Writes", lambda: record)
    before = record.past
    w = mc.quantize(gaussian(128, 64, seed=1))
    assert w.placed.writes is record
    assert record.past is not before
    for make in (copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), lambda w: w.to("numpy")):
        before = record.past
        other = make(w)
        assert record.past is not before
        assert other.spec == w.spec
        np.testing.assert_array_equal(other.packed, w.packed)
    assert copy.copy(w).packed is w.packed
    assert not np.shares_memory(copy.deepcopy(w).packed, w.packed)


def test_update_is_a_write_from_its_first_byte_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    w = mc.quantize(gaussian(128, 64, seed=1))
    original = packing.encode

    def encode(*arguments: Any, **parts: Any) -> None:
        w.placed.writes.past.add(STREAM)
        assert STREAM not in w.placed.writes.past
        original(*arguments, **parts)

    monkeypatch.setattr(tensor, "encode", encode)
    w.placed.writes.past.add(STREAM)
    w.update_(gaussian(128, 64, seed=2))
    assert STREAM not in w.placed.writes.past
    w.placed.writes.past.add(STREAM)
    assert STREAM in w.placed.writes.past
    with pytest.raises(ValueError, match="shape"):
        w.update_(gaussian(64, 64, seed=2))  # writes nothing
    assert STREAM in w.placed.writes.past
    w.mark_written()
    assert STREAM not in w.placed.writes.past


# ---- the switch


class FakePlan(Plan):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def multiply(self, framework: Any, x: Any, w: Any, bias: Any, out: Any, dependent: bool) -> Any:
        assert w.packed is not None
        self.seen.append(dependent)
        return x


def test_the_switch_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, plan = mc.quantize(gaussian(128, 128, seed=1)), rows((5, 128), seed=2, dtype="float16"), FakePlan()
    monkeypatch.setattr(kernels.GEMM, "ready", lambda problem: plan)
    ready.product.cache_clear()
    mc.matmul(x, w)
    mc.matmul(x, w, dependent=False)
    mc.matmul(x, w, dependent=True)
    _ = x @ w
    ready.product.cache_clear()
    assert plan.seen == [True, False, True, True]


def test_shared_memory_keeps_the_next_kernel_off_the_sm_where_the_layer_is_large() -> None:
    for name in FORMATS:
        for K, N in ((4096, 4096), (8192, 8192), (8192, 57344)):
            for m in (8, 16):
                layout = Spec(name, (K, N), 128, "float16").layout
                for config in sm90_stream.configs(m, layout, H200):
                    taken = sm90_stream.dependent_shared_bytes(config, layout, H200)
                    assert config.shared_bytes(layout) <= taken <= config.most_shared_bytes(H200)
                    assert taken <= H200.shared_per_block
                    left = H200.shared_per_sm - config.blocks_per_sm * (taken + 1024)
                    assert left >= 0
                    assert (N == 4096 and name != "int8") or left < 1024 * config.blocks_per_sm


def test_the_explanation_says_that_launches_are_dependent() -> None:
    problem = product_of(1, "float16", Spec("int4", (4096, 4096), 128, "float16"), H200)
    streams = sm90_stream.KERNEL.candidates(problem)[0].configuration
    assert streams.dependent
    assert "dependent launch" in str(streams)
    function: Any = None
    assert isinstance(streams, sm90_stream.Streams)
    assert str(sm90_stream.StreamPlan(function, streams, problem)) == str(streams)  # which explain and tune tell
