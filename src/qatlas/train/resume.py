"""Resume points: a run that was killed goes on as if it had not been.

A run is a row of numbered phases (each `fit`, each `reconstruct`). A phase in progress keeps its newest resume point, a finished one its model:

    out/state/phase-01/done/             model, tactics.safetensors     state.json
    out/state/phase-02/step-00000400/    model, optimizer, rng, tactics state.json

A point is written into `.writing`, each file and the directory synced, then renamed: it is there whole or not at all, and the one before it is
removed only afterwards. On resume finished phases are replayed from their models (a paper's function simply runs again: its verbs find what they
had done), and the phase in progress goes on from its point. Batches are functions of the step (see task), so weights, optimizer, random states and
the tactics' own state are all there is; what follows is bit-identical on the same machine with the same number of threads.

state.json holds the phase's signature: all arguments, the data's fingerprint and a hash of the model that it started from. A point is used only where
the signature is the same, the files have the length and the sha256 that state.json says, and all names and shapes fit; otherwise a CheckpointError,
before anything was changed. Nothing is unpickled: safetensors and JSON only. A state kept for resuming is as large as the model, its moments and
one copy while writing; so points are written by the clock, never more than a twentieth of the time (or every n steps where asked).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.error import CheckpointError
from ..core.noun import Noun
from ..core.quantizer import Quantizer
from .ranks import cut, written

Tensors = dict[str, Tensor]
FORMAT = 1
PLAIN = (bool, int, float, str, tuple, list, dict, Noun, type(None))
SHARE = 20                                                        # writing takes at most one part in so many of the time
SAMPLE = 2**20                                                    # elements of one tensor that the model's hash reads


@dataclass
class Point:
    """What lies in one resume point: tensors of each file by name, and the plain part."""

    step: int = 0
    finished: bool = False
    plain: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensors] = field(default_factory=dict)


class Phase:
    """One numbered phase of a run: reads and writes its resume points. directory None: nothing is ever written.

    every: steps between points, or None for every `seconds`, by the clock.
    """

    def __init__(self, directory: Path | None, number: int, signature: dict[str, Any], every: int | None, seconds: float) -> None:
        self.directory, self.number, self.every, self.seconds = directory, number, every, seconds
        self.signature = json.loads(json.dumps(signature))
        self._last, self._cost = time.monotonic(), 0.0

    def read(self) -> Point | None:
        """The finished model, else the newest point, else None.

        Raises:
            CheckpointError: truncated, of another run, or not readable.
        """
        if self.directory is None or not self.directory.is_dir():
            return None
        steps = sorted(self.directory.glob("step-*"))
        done = self.directory / "done"
        return self._read(done, True) if done.is_dir() else self._read(steps[-1], False) if steps else None

    def due(self, step: int) -> bool:
        """Whether a point shall be written after `step` steps."""
        if self.directory is None:
            return False
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self._last >= max(self.seconds, SHARE * self._cost)

    def write(self, point: Point) -> None:
        """Write a point beside the last good one, put it in place, then remove the older ones."""
        if self.directory is None:
            return
        began = time.monotonic()
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = self.directory / ".writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        files = {}
        for name, tensors in point.tensors.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, aside / name)
            files[name] = {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)}
            sync(aside / name)
        state = {"format": FORMAT, "step": point.step, "signature": self.signature, "files": files, **point.plain}
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        sync(aside / "state.json")
        sync(aside)
        place = self.directory / ("done" if point.finished else f"step-{point.step:08d}")
        shutil.rmtree(place, ignore_errors=True)                  # only where a finished phase is run again without its point
        os.replace(aside, place)
        sync(self.directory)
        for older in self.directory.glob("step-*"):
            if older != place:
                shutil.rmtree(older)
        self._last, self._cost = time.monotonic(), time.monotonic() - began

    def _read(self, place: Path, finished: bool) -> Point:
        try:
            state = json.loads((place / "state.json").read_text(encoding="utf-8"))
            form, step, signature, files = (state.pop(name) for name in ("format", "step", "signature", "files"))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{place} holds no readable state.json ({error}); remove {place} to start this phase anew") from None
        if form != FORMAT:
            raise CheckpointError(f"{place} is of format {form}, this qatlas reads {FORMAT}; resume with the version that wrote it, or start anew")
        different = sorted(key for key in {*signature, *self.signature} if signature.get(key) != self.signature.get(key))
        if different:
            said = "; ".join(f"{key}: {brief(signature.get(key))} there, {brief(self.signature.get(key))} here" for key in different)
            raise CheckpointError(f"{place} belongs to another run: {said}. Resume with the same arguments, or take another output directory")
        tensors = {}
        for name, entry in files.items():
            path = place / Path(name).name
            if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is missing, truncated or changed: its length or sha256 is not what state.json says; "
                                      f"remove {place} to start this phase anew")
            tensors[name] = load_file(path)
        return Point(step, finished, state, tensors)


def brief(value: Any) -> str:
    """A value in at most sixty characters."""
    said = repr(value)
    return said if len(said) <= 60 else said[:57] + "..."


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make the disk know a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def state_of(model: nn.Module) -> Tensors:
    """The model's state, tied tensors once. Under FSDP2 whole on the first process only, and to be called on all."""
    seen: set[tuple[Any, ...]] = set()
    out = {}
    for name, t in model.state_dict(keep_vars=True).items():
        key = (id(t),) if hasattr(t, "full_tensor") else (t.data_ptr(), t.shape, t.stride(), t.dtype)
        if t.numel() == 0 or key not in seen:
            seen.add(key)
            out[name] = written(t.detach())
    return out


def load_state(model: nn.Module, tensors: Tensors) -> None:
    """Put a state of `state_of` back.

    Raises:
        CheckpointError: names or shapes that do not fit, named; the model is as it was.
    """
    mine = state_of(model)
    open_ends = tuple(f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, Quantizer) and m.scale is None)
    wrong = [f"{name} is missing" for name in mine if name not in tensors]
    wrong += [f"{name} is not in the model" for name in tensors if name not in mine and not (open_ends and name.startswith(open_ends))]
    shapes = [(name, tuple(tensors[name].shape), tuple(t.shape)) for name, t in mine.items() if name in tensors]
    wrong += [f"{name} is {there}, not {here}" for name, there, here in shapes if there != here]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the saved state does not fit the model: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(tensors, strict=False)


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's state by parameter name: tensors (under FSDP2 as in `state_of`), and what is plain."""
    tensors, plain = {}, {}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}::{key}"] = written(value)
            else:
                plain[f"{name}::{key}"] = value
    return tensors, plain


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Tensors, plain: dict[str, Any]) -> None:
    """Put a state of `optimizer_state` back. Raises CheckpointError where a name or a shape does not fit."""
    places = {name: parameter for parameter, name in names.items()}
    state: dict[Any, dict[str, Any]] = {}
    for full, value in {**plain, **tensors}.items():
        name, _, key = full.rpartition("::")
        if name not in places:
            raise CheckpointError(f"the saved optimizer knows a parameter {name!r} that is not trained here")
        parameter = places[name]
        if isinstance(value, Tensor) and value.dim() > 0:
            value = cut(value.to(parameter.device), parameter)
        state.setdefault(parameter, {})[key] = value
    optimizer.state.update(state)


def random_state() -> Tensors:
    """The random states of torch, Python and NumPy as tensors of bytes."""
    kind, keys, *rest = np.random.get_state()
    out = {"torch": torch.get_rng_state(), "python": _bytes(random.getstate()), "numpy": _bytes([kind, np.asarray(keys).tolist(), *rest])}
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def load_random(state: Tensors) -> None:
    """Put a state of `random_state` back."""
    version, internal, gauss = _value(state["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = _value(state["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].clone())                   # torch reads from the beginning of the memory, whatever the view
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _value(state: Tensor) -> Any:
    return json.loads(bytes(state.tolist()).rstrip(b"\0"))        # zeros behind it: another process's was longer


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's names, shapes and values, in hex. Of a large tensor a fixed sample counts; of quantizers what they are, names and
    shapes, since their starts are measured and may differ in the last bit between machines.

    >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
    False
    """
    found = hashlib.sha256()
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    soft = tuple(f"{name}." for name in quantizers)
    for name, quantizer in quantizers.items():
        found.update(f"{name} {quantizer.quant}".encode())
    for name, t in state_of(model).items():
        found.update(f"{name} {tuple(t.shape)}".encode())
        if not (soft and name.startswith(soft)):
            flat = t.detach().reshape(-1)
            sample = flat[:: -(-flat.numel() // SAMPLE) or 1].contiguous().cpu()
            found.update(sample.view(torch.uint8).numpy().tobytes() if sample.dim() and sample.numel() else b"")
    return found.hexdigest()


def described(value: Any) -> Any:
    """Anything that may be an argument, as plain JSON: what the signature of a phase compares.

    >>> described(nn.Linear.forward), described((1, None))
    ('torch.nn.modules.linear.Linear.forward', [1, None])
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Noun):
        return value.to_json()
    if isinstance(value, functools.partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [described(item) for item in value]
    if isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        owner = getattr(value, "__self__", None)
        name = f"{value.__module__}.{value.__qualname__}"
        return name if owner is None or isinstance(owner, type) else [name, described(owner)]
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if isinstance(value, Tensor | nn.Module):
        return kind
    public = {key: item for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    return {"is": kind, **{key: described(item) for key, item in public.items() if isinstance(item, PLAIN)}}
