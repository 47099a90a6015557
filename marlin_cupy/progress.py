"""A progress bar on standard error where rich is installed, lines of text where it is not."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator

Step = Callable[[str], None]


@contextlib.contextmanager
def bar(title: str, total: int, show: bool = True) -> Iterator[Step]:
    """A function to be called when one of ``total`` things begins, with a few words on it."""
    if not show:
        yield lambda words: None
        return
    try:
        console = importlib.import_module("rich.console").Console(stderr=True)
        rich = importlib.import_module("rich.progress")
    except ImportError:
        yield lambda words: print(f"{title}: {words}", file=sys.stderr)
        return
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        begun = 0

        def step(words: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, description=f"{title}: {words}")
            begun += 1

        yield step
