"""Record: what ran, so that anyone can run it again. It is a plain dataclass that goes to record.json; figures and the report see nothing else.

`scores` holds the metrics of each stage by name, in the order in which they were taken: "full precision", "untrained" (quantized, before the first
step), "trained", "packed". `sizes` holds bytes by the same names where there are any, and of each export by its target. `sums` holds the sha256 of
the files that the run wrote: a file that was changed afterwards is seen by `qatlas verify`.

`Watch` is the tactic through which a run records itself: the score before the first step, and the held-out curve. It draws no random numbers and
changes nothing: a watched run is bit-identical to an unwatched one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .core.error import CheckpointError
from .core.quantizer import Quantizer, working
from .layers.rows import RowsQuantizer
from .model.probe import undisturbed
from .model.quantized import quantized
from .train.evaluate import evaluate
from .train.resume import sha256
from .train.tactic import Loop, Tactic

LIBRARIES = ("qatlas", "torch", "transformers", "accelerate", "datasets", "safetensors", "gguf", "compressed-tensors", "torchao", "xllamacpp",
             "numpy")


@dataclass
class Record:
    """Everything about one run. Paths are as the user gave them; times in seconds, sizes and memory in bytes.

    history: one dict of lists a fit (see train.tactic.History). curve: (step, metrics) of held-out scores along the way. coverage: rows of
    model.coverage; signals: its quantizers inside attention. errors: layer -> relative error of its weight, |w - hard|^2 / |w|^2, before and
    after training. rounded: layer -> (scales that the last rounding to the stored type moved, all scales, the largest relative move), for layers
    whose scales are not stored in fp32 as they are. samples: stage -> text. proofs: what was compared with what, and how it came out. memory: the
    largest up to the end of each stage. job: what all papers share (see job.Job). sums: file, relative to the directory, -> sha256.
    """

    paper: str
    arguments: dict[str, Any]
    command: str
    model: str = ""
    data: str = ""
    fingerprint: str = ""
    target: str | None = None
    seed: int = 0
    rules: list[Any] = field(default_factory=list)
    coverage: list[dict[str, Any]] = field(default_factory=list)
    signals: list[dict[str, Any]] = field(default_factory=list)
    bits: float = 32.0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, list[float]]] = field(default_factory=list)
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    rounded: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    peak_memory: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def seal(self, out: Path, *files: Path) -> None:
        """Note where it ran, and the sums of what was written."""
        self.versions, self.machine, self.peak_memory = versions(), machine(), peak_memory()
        self.sums |= {path.relative_to(out).as_posix(): sha256(path) for path in files}

    def write(self, out: Path) -> Path:
        """out/record.json, written aside and renamed."""
        path, aside = out / "record.json", out / "record.json.part"
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str), encoding="utf-8")
        os.replace(aside, path)
        return path

    @classmethod
    def read(cls, out: str | Path) -> Record:
        """The record of a run's directory.

        Raises:
            CheckpointError: no record, or one that is not ours.
        """
        path = Path(out) / "record.json"
        if not path.is_file():
            raise CheckpointError(f"{out} holds no record.json, so it is not the directory of a qatlas run; found: {listing(Path(out))}")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a record of this qatlas: {error}") from None


class Watch(Tactic):
    """Record the score before the first step, and every `every` steps of the whole run (0: never). A fit of a part of the model is not judged; where
    a run begins with one, "untrained" is not told: the whole model is never quantized and untrained."""

    pieces = True

    def __init__(self, record: Record, every: int = 0) -> None:
        self._record, self.every, self._before = record, every, 0

    @classmethod
    def idle(cls) -> Watch:
        """One that judges after every step: it must not move a bit either."""
        return cls(Record("", {}, ""), every=1)

    def start(self, loop: Loop) -> None:
        self._before = sum(len(history.loss) for history in loop.task.run.histories)          # steps of the fits before this one
        if "untrained" not in self._record.scores and loop.task.whole and not self._before:
            self._record.errors = {name: (error, error) for name, error in weight_errors(loop.model).items()}
            self._record.scores["untrained"] = self._score(loop)

    def after(self, loop: Loop) -> None:
        step = self._before + loop.step + 1
        if self.every and step % self.every == 0 and loop.task.whole and loop.step + 1 < loop.steps:
            self._record.curve.append((step, self._score(loop)))

    def state_dict(self) -> dict[str, Any]:
        kept = self._record
        return {"scores": kept.scores, "curve": kept.curve, "errors": kept.errors, "times": kept.times, "memory": kept.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._record, name, value)

    def _score(self, loop: Loop) -> dict[str, float]:
        with undisturbed(loop.model):
            return evaluate(loop.model, loop.task)


@torch.no_grad()
def weight_errors(model: nn.Module) -> dict[str, float]:
    """Layer -> |w - hard|^2 / |w|^2, for the trainable quantized layers."""
    found = {}
    for name, layer in quantized(model).items():
        if layer.weight_quantizer is not None:
            latent = layer.latent()
            off, whole = (latent - layer.hard()).square().sum(), latent.square().sum()
            found[name] = float(off / whole.clamp(min=1e-30))
    return found


@torch.no_grad()
def moved_scales(model: nn.Module) -> dict[str, tuple[int, int, float]]:
    """Layer -> (moved, all, largest relative move): how many of a trainable layer's scales, learned or measured in fp32, are other numbers in the
    type in which they are stored. Codes are taken from the stored ones, in training too, so no weight moves with them."""
    found: dict[str, tuple[int, int, float]] = {}
    for name, layer in quantized(model).items():
        whole = layer.weight_quantizer
        parts: list[Any] = [] if whole is None else [(whole, layer.source())]
        if isinstance(whole, RowsQuantizer):
            parts = list(zip(whole.parts, layer.source().chunk(len(whole.parts)), strict=True))
        for part, x in parts:
            if not isinstance(part, Quantizer) or (part.quant.scale.dtype == "float32" and part.quant.scale.nested is None):
                continue
            before = part.place(part.quant.grain.view(working(x.detach()))).s
            off = (part.quant.scale.cast(before) - before).abs() / before.abs().clamp(min=torch.finfo(torch.float32).tiny)
            moved, count, most = found.get(name, (0, 0, 0.0))
            found[name] = (moved + int((off > 0).sum()), count + off.numel(), max(most, float(off.max())))
    return found


def versions() -> dict[str, str]:
    """Library -> version, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What it ran on, without names of hosts or people."""
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def peak_memory() -> int:
    """The largest so far, in bytes: what torch asked of the GPU where there is one, else the process's resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def listing(directory: Path) -> str:
    """The first names in a directory, for messages."""
    if not directory.is_dir():
        return "no such directory"
    names = sorted(path.name for path in directory.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
