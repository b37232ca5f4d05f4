"""How fast a saved language model runs here, beside itself in other forms.

    fp32, bf16     its weights dequantized by us into these types, its inputs not quantized: what it would cost without quantization
    exact          packed; each forward dequantizes: bit for bit the trained model
    fast           packed; kernels multiply with the codes (model/fast.py)
    llama.cpp      its GGUF, where one holds the model exactly and xllamacpp is installed; llama.cpp's own clock

Each is a process of its own, and all stand side by side: round after round each measures once, in an order that rotates, so whatever slows the
machine slows all. Told are medians. A contender that is absent or fails stands in the table with its reason. The limit of decoding is what memory
allows: a token reads every weight once; the speed of memory is measured here, by adding up what no cache holds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.error import CheckpointError, QatlasError, RunError
from ..export.gguf import llamacpp
from ..keep import export
from ..model.exportable import holders
from ..model.load import load
from .process import WAYS

ENGINE = "llama.cpp"
ALL = (*WAYS, ENGINE)
WHOLE = ("gguf:f32", "gguf:f16", "gguf:bf16")                     # types that hold anything, and codes as floats


@dataclass
class Contender:
    """One form of the model: seconds of each round (prefill, decode), and what is said of it. absent: why it did not run."""

    name: str
    load: float = 0.0
    bytes: int = 0
    file: int = 0
    peak: int = 0
    routes: list[str] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    absent: str = ""

    def told(self, prompt: int, tokens: int, bandwidth: float) -> dict[str, Any]:
        """A row: tokens a second (medians), MiB, seconds."""
        if self.absent or not self.rounds:
            return {"name": self.name, "absent": self.absent or "no round was measured"}
        prefill, decode = (statistics.median(each) for each in zip(*self.rounds, strict=True))
        return {"name": self.name, "load": self.load, "file": self.file, "peak": self.peak, "prefill": prompt / prefill, "decode": tokens / decode,
                "limit": bandwidth / self.bytes if self.bytes else None, "routes": self.routes}


def bench(directory: str | Path, *, ways: Sequence[str] = ALL, prompt: int = 128, tokens: int = 32, repeats: int = 5, threads: int = 1,
          say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure a saved packed language model: {"rows": ..., "setting": ...}, and of each contender its rounds.

    Raises:
        CheckpointError: what is no packed language model. RunError: numbers below one, an unknown way.
    """
    if min(prompt, tokens, repeats, threads) < 1:
        raise RunError(f"prompt={prompt}, tokens={tokens}, repeats={repeats}, threads={threads}: each is at least 1")
    if wrong := sorted(set(ways) - set(ALL)):
        raise RunError(f"there is no way {wrong[0]!r} to run a model; the ways are {', '.join(ALL)}")
    _packed(directory)
    torch.set_num_threads(threads)
    bandwidth, found, live = memory_speed(), {way: Contender(way) for way in ways}, {}
    with tempfile.TemporaryDirectory() as aside:
        try:
            for way, one in found.items():
                say(f"{way}: loading")
                live[way] = _begun(one, Path(directory), threads, Path(aside))
            for number in range(repeats + 1):                     # the first warms, and is not told
                names = [way for way in found if live[way] is not None]
                for way in names[number % max(len(names), 1):] + names[: number % max(len(names), 1)]:
                    _round(found[way], live[way], {"prompt": prompt, "tokens": tokens, "seed": number}, number > 0)
                say(f"round {number} of {repeats}")
        finally:
            for process in live.values():
                if isinstance(process, subprocess.Popen):
                    process.kill()
                    process.communicate()
    rows = [one.told(prompt, tokens, bandwidth) for one in found.values()]
    return {"directory": str(directory), "rows": rows, "rounds": {way: one.rounds for way, one in found.items()},
            "setting": {"prompt": prompt, "tokens": tokens, "repeats": repeats, "threads": threads, "bandwidth": bandwidth}}


def memory_speed(size: int = 2**27, times: int = 5) -> float:
    """Bytes a second, read on torch's threads: the fastest of a few sums over `size` bytes."""
    held, best = torch.ones(size // 8, dtype=torch.int64), float("inf")
    for _ in range(times):
        began = time.perf_counter()
        held.sum()
        best = min(best, time.perf_counter() - began)
    return size / best


def _packed(directory: str | Path) -> None:
    model, _ = load(directory)
    if not getattr(model, "can_generate", lambda: False)() or getattr(model.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{directory} holds a {type(model).__name__}; bench measures language models that continue a text")
    from ..model.fast import routes

    try:
        routes(model)
    except QatlasError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _begun(one: Contender, directory: Path, threads: int, aside: Path) -> Any:
    """A live process, or the request by which llama.cpp is asked; None where it is absent."""
    if one.name == ENGINE:
        try:
            path, target = _gguf(directory, aside)
            one.routes = [target]
            one.file = one.bytes = path.stat().st_size
            return path, threads
        except (QatlasError, OSError) as error:
            one.absent = str(error).splitlines()[0][:160]
            return None
    one.file = sum(path.stat().st_size for path in directory.glob("model*.safetensors"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen([sys.executable, "-m", "qatlas.bench.process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=env)
    answer = _asked(one, child, {"directory": str(directory), "way": one.name, "threads": threads})
    if answer is None:
        return None
    one.load, one.bytes, one.routes = answer["load"], answer["bytes"], answer["routes"]
    return child


def _asked(one: Contender, child: Any, request: dict[str, Any]) -> dict[str, Any] | None:
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        said = [line.strip() for line in child.communicate()[1].splitlines() if line.strip()]
        one.absent = (said or [f"its process ended with {child.returncode}"])[-1][:160]
        return None


def _round(one: Contender, live: Any, request: dict[str, Any], counts: bool) -> None:
    if one.absent:
        return
    if one.name == ENGINE:
        try:
            path, threads = live
            answer: Any = llamacpp.clocked(path, threads, request["prompt"], request["tokens"], request["seed"])
        except QatlasError as error:
            one.absent = str(error).splitlines()[0][:160]
            return
        one.load = answer["load"]
    else:
        answer = _asked(one, live, request)
    if answer is not None:
        one.peak = max(one.peak, answer["peak"])
        one.rounds.extend([(answer["prefill"], answer["decode"])] if counts else [])


def _gguf(directory: Path, aside: Path) -> tuple[Path, str]:
    """The model as a GGUF file that holds it exactly, and its target."""
    if not llamacpp.available():
        raise RunError('not installed: pip install "qatlas[llamacpp]"')
    model, _ = load(directory)
    targets = [target for target in holders(model) if target.startswith("gguf:") and target not in WHOLE]
    if not targets:
        raise RunError("no GGUF type holds these numbers; train with --target gguf:q4_0 (or another) to run there")
    written = aside / "gguf"
    written.mkdir()
    for file in directory.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja", ".safetensors"):
            (written / file.name).symlink_to(file.resolve())
    target = min(targets, key=_width)
    return export(written, target, model), target


def _width(target: str) -> tuple[int, bool]:
    """The fewest bits first; of the ternary types TQ2_0, the faster one."""
    return max(int(next(filter(str.isdigit, target))), 2), target == "gguf:tq1_0"
