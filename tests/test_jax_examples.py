"""The examples for JAX run, on the CPU, and find what they expect."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
COMMANDS = [["jax_linear.py"], ["jax_linear.py", "--devices", "4"]]
if importlib.util.find_spec("torch"):
    COMMANDS.append(["four_libraries.py"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_example_runs(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(FOLDER / command[0]), *command[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("correct\n")
