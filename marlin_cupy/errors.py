"""The errors that a caller can act on: each message says what was given and what would work."""

from __future__ import annotations


class DeviceError(ValueError):
    """Arrays are on different devices, or an operation needs a device that is not there."""


class MissingDependencyError(ImportError):
    """An optional package is needed and not installed; the message says which extra brings it."""


class UnsupportedError(ValueError):
    """No kernel serves this problem; the message lists every kernel with its reason."""


class FileFormatError(ValueError):
    """A file is not a marlin_cupy weight, or is damaged, edited or newer than this version."""


class CompileError(RuntimeError):
    """NVRTC rejected a kernel, or its log reports a build that would be slow."""
