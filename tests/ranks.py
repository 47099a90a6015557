"""Two JAX processes on this machine, see jax_ranks.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import marlin_cupy as mc


def run_ranks(folder: Path, platforms: str) -> None:
    """With JAX's ``platforms``, of whose first each has one device. Logs go into ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("jax_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1]), "JAX_PLATFORMS": platforms}
    environment.pop("XLA_FLAGS", None)
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, str(script), str(rank), str(port)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 300
        codes = [rank.wait(max(1, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(said)
    assert all("correct" in each.splitlines() for each in said)  # JAX may go on to say how it ended
