"""ExecuTorch itself, as a reader and an engine, in a process of its own. A file that its runtime dislikes can end the process that asked, and its
reader believes the lengths that a file states. There the memory of reading is bounded, here the time. A .pte is a flatbuffer: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.error import FormatError, foreign

NAME = "ExecuTorch"
CHILD = Path(__file__).with_name("process.py")
SECONDS = 600
MISSING = ("ExecuTorch is not installed: pip install 'qatlas[executorch]'; where pip does not come to an end over its requirements: "
           "pip install --no-deps executorch, then pip install flatbuffers torchao and what else it misses")


def lacks() -> str | None:
    """The sentence for the missing package, or None."""
    there = find_spec("executorch") is not None and find_spec("executorch.exir") is not None     # a folder of that name is a package, too
    return None if there and find_spec("flatbuffers") is not None else MISSING


def why_not(path: str | Path) -> str | None:
    """It runs all that we write; without it `read` has failed before."""
    return lacks()


def constants(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a program of ours, and what it says of itself.

    Raises:
        FormatError: no file, a damaged or a foreign one, or the package is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = _child(path, {"read": str(path), "to": folder})
        with foreign(f"{path} is no whole program of ours"):
            return load_file(Path(folder) / "weights.safetensors"), said


def run(path: str | Path, asked: list[Tensor]) -> list[Tensor]:
    """The first output of the program for each input.

    Raises:
        FormatError: a program that ExecuTorch cannot load or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_file({str(i): x.contiguous() for i, x in enumerate(asked)}, Path(folder) / "inputs.safetensors")
        _child(path, {"ask": str(path), "to": folder})
        found = load_file(Path(folder) / "outputs.safetensors")
    return [found[str(i)] for i in range(len(asked))]


def _child(path: str | Path, request: dict[str, str]) -> dict[str, Any]:
    if (missing := lacks()) is not None:
        raise FormatError(missing)
    if not Path(path).is_file():                                  # nor is a pipe, at which a reader would wait
        raise FormatError(f"there is no ExecuTorch program {path}")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run([sys.executable, str(CHILD)], input=json.dumps(request), capture_output=True, text=True, timeout=SECONDS, env=env,
                              check=False)
    except subprocess.TimeoutExpired:
        raise FormatError(f"ExecuTorch did not come to an end with {path} in {SECONDS} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E ", "F ", "[")) or "Error" in line][-4:]
        raise FormatError(f"ExecuTorch did not take {path} (exit {done.returncode}); it says:\n  " + "\n  ".join(line[:200] for line in said))
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise FormatError(f"{path} is no whole program that qatlas wrote, or it was given inputs that it does not take: {answer['error']}")
    return answer
