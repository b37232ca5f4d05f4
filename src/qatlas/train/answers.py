"""Answers: what a teacher said, on disk, found again by the sample that it was asked about.

A directory of shards, each a safetensors file that describes itself:

    keys    (n, 32) uint8           sha256 of a sample
    counts  (n,) int64              positions that it has: 1 for a class, the predicted tokens for a text
    sums    (n,) int64              crc32 of its part of values and index
    values  (positions, width)      fp32: all logits; or fp16: log-probabilities of the kept outcomes, then that of all the rest together
    index   (positions, kept) int32 which outcomes were kept; absent where all were
    header  "qatlas": JSON          format, fingerprint of the teacher, its classes, how many were kept, the precision that it computed in

A shard is written aside, synced, then renamed: it is there whole or not at all. Reading maps the files and takes the rows that are asked for; the
length of a file is checked when it is opened, the crc32 of a row when it is read, and nothing is unpickled. One process fills at a time (a lock on
the directory, which a killed process gives back); whoever waited finds what the other has written. Reading needs no lock and no right to write.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.error import CheckpointError, RunError
from .data import digest
from .resume import brief, sync

FORMAT = 1
NAMES = ("keys", "counts", "sums", "values")


@dataclass(frozen=True)
class Facts:
    """What all shards of one cache agree in. kept == classes: all logits were kept."""

    teacher: str
    classes: int
    kept: int
    precision: str


@dataclass(frozen=True)
class Answer:
    """What was said of one sample: values (positions, width), index (positions, kept) or None; as in a shard."""

    values: Tensor
    index: Tensor | None

    @property
    def crc(self) -> int:
        """crc32 of the bytes."""
        parts = [part.contiguous().numpy().tobytes() for part in (self.values, self.index) if part is not None]
        return zlib.crc32(b"".join(parts))


class Answers:
    """The answers in a directory, which may be empty or not there yet.

    Raises:
        CheckpointError: a directory of something else, a shard that is truncated or changed, shards of different caches.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.facts: Facts | None = None
        self._places: dict[bytes, tuple[Any, str, int, int, int]] = {}          # key -> file, its name, first position, positions, crc32
        self._open: set[str] = set()
        self._pending: dict[bytes, Answer] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._places.keys() | self._pending.keys())

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._pending

    def __getitem__(self, key: bytes) -> Answer:
        if key in self._pending:
            return self._pending[key]
        file, name, first, n, crc = self._places[key]
        index = file.get_slice("index")[first : first + n] if "index" in file.keys() else None                     # noqa: SIM118
        found = Answer(file.get_slice("values")[first : first + n], index)
        if found.crc != crc:
            raise broken(self.directory / name, "its bytes are not those that were written")
        return found

    @property
    def waiting(self) -> int:
        """Bytes that were added and are not on disk."""
        return sum(part.numel() * part.element_size() for a in self._pending.values() for part in (a.values, a.index) if part is not None)

    def refresh(self) -> None:
        """Open the shards that are not open yet."""
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is a file; a teacher's answers lie in a directory of their own")
        names = sorted(path.name for path in self.directory.glob("*") if not path.name.startswith("."))
        foreign = [name for name in names if not (name.startswith("part-") and name.endswith(".safetensors"))]
        if foreign:
            raise CheckpointError(f"{self.directory} holds {brief(foreign[0])}, no part of a teacher's answers; give them a directory of their own")
        for name in names:
            if name not in self._open:
                self._read(name)

    def add(self, facts: Facts, key: bytes, answer: Answer) -> None:
        """Take an answer in; `write` brings it to disk.

        Raises:
            CheckpointError: an answer of another kind than those that are there.
        """
        self._agree(facts, "the teacher's new answer")
        self._pending[key] = answer

    def write(self) -> None:
        """Put what was added on disk, as one shard.

        Raises:
            RunError: the disk refuses.
        """
        if not self._pending or self.facts is None:
            return
        answers = list(self._pending.values())
        tensors = {"keys": torch.from_numpy(np.frombuffer(b"".join(self._pending), np.uint8).reshape(-1, 32).copy()),
                   "counts": torch.tensor([len(a.values) for a in answers]), "sums": torch.tensor([a.crc for a in answers]),
                   "values": torch.cat([a.values for a in answers])}
        if answers[0].index is not None:
            tensors["index"] = torch.cat([a.index for a in answers if a.index is not None])
        name = f"part-{len(self._open):05d}-{digest(self._pending)[:8]}.safetensors"
        aside = self.directory / f".{name}"
        try:
            save_file(tensors, aside, {"qatlas": json.dumps({"format": FORMAT, **asdict(self.facts)})})
            sync(aside)
            os.replace(aside, self.directory / name)
            sync(self.directory)
        except (OSError, SafetensorError) as error:
            raise RunError(f"the teacher's answers cannot be written to {self.directory}: {error}") from None
        self._pending = {}
        self._read(name)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Alone in the directory: waits for whoever fills it, then knows what is there, and removes what a killed one has left half written.

        Raises:
            RunError: the directory cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / ".lock").open("w")
        except OSError as error:
            raise RunError(f"the teacher's answers cannot be written to {self.directory}: {error}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for half in self.directory.glob(".part-*"):
                half.unlink()
            self.refresh()
            yield

    def _agree(self, facts: Facts, where: str) -> None:
        if self.facts is not None and facts != self.facts:
            here, there = asdict(facts), asdict(self.facts)
            said = "; ".join(f"{name}: {brief(here[name])}, the others {brief(there[name])}" for name in here if here[name] != there[name])
            raise CheckpointError(f"{where} is not of one kind with the answers in {self.directory}: {said}; give each a directory of its own")
        self.facts = facts

    def _read(self, name: str) -> None:
        """Open one shard and note where its rows are."""
        path = self.directory / name
        try:
            file: Any = safe_open(path, framework="pt")
            said = json.loads((file.metadata() or {})["qatlas"])
            form = said.pop("format")
            facts = Facts(**said)
            keys, counts, sums = (file.get_tensor(part) for part in NAMES[:3])
            shape = {part: tuple(file.get_slice(part).get_shape()) for part in ("values", "index") if part in file.keys()}   # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise broken(path, str(error)) from None
        if form != FORMAT:
            raise CheckpointError(f"{path} is of format {form}, this qatlas reads {FORMAT}; give a new directory")
        whole, positions = facts.kept == facts.classes, int(counts.sum())
        wanted = {"values": (positions, facts.classes)} if whole else {"values": (positions, facts.kept + 1), "index": (positions, facts.kept)}
        if shape != wanted or keys.shape != (len(counts), 32) or keys.dtype != torch.uint8 or len(sums) != len(counts):
            raise broken(path, "its shapes contradict each other")
        self._agree(facts, str(path))
        firsts = (counts.cumsum(0) - counts).tolist()
        for key, *place in zip(keys.numpy(), firsts, counts.tolist(), sums.tolist(), strict=True):
            self._places.setdefault(key.tobytes(), (file, name, *place))
        self._open.add(name)


def broken(path: Path, why: str) -> CheckpointError:
    """The error of a shard that cannot be used."""
    return CheckpointError(f"{path} is truncated, changed or no part of a teacher's answers ({why}); remove it, and what it held is asked again")
