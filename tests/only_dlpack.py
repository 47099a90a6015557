"""An array of a library that nobody knows."""

from __future__ import annotations

from typing import Any


class OnlyDlpack:
    """DLPack is all it has."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()
