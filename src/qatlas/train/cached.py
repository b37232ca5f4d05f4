"""A teacher cached on disk: asked once for each sample, then read.

    fill      before training: the live teacher answers the batches of the steps to come, each different sample once; what is there already is not
              asked again. A killed filling goes on where its last shard ends. The live teacher may then leave the memory
    read      during training: each row of a batch is looked up; a row that is not there is an error, never another answer

A sample is known by its content: the sha256 of its inputs without padding, and of which of its positions are predicted. So order, seed, batch size
and padding do not matter, one directory may serve several tasks, and an augmented image is a sample of its own (augmentation is a function of seed
and step: the same run finds its images again, and another seed asks for more).

What is kept: where a model has no more than k outcomes, its logits themselves in fp32 (classes, small vocabularies, the number of a regression); the
loss is then the live one, up to what padding does to the last bits. Of more outcomes the k most probable and the mass of the rest, as
log-probabilities in fp16: 4 + 2 bytes each, 386 bytes a token for k = 64. The loss is then `loss.kl_top`, which is the live divergence less the part
that tells the outcomes of the rest from each other.

Filling comes before training, and not on the way, so that what the student learns from never depends on where a run was killed, and the teacher is
gone while the student trains. All ranks may ask to fill: one does, the others wait and read (see answers). The teacher computes in the run's
precision, as a live one would.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ..core.error import CheckpointError, RunError
from . import loss
from .answers import Answer, Answers, Facts
from .data import digest
from .resume import brief, fingerprint
from .run import bar
from .task import Batch, Task, moved
from .teacher import AnyTeacher, SelfTeacher, Teacher

SHARD = 2**26                                                     # a shard is written when it has so many bytes,
SECONDS = 60.0                                                    # or after so many seconds
LEAST = torch.finfo(torch.float16).min                            # the logarithm of no mass at all, in fp16


def cached(directory: str | Path | None, teacher: Teacher | SelfTeacher, task: Task, steps: int, k: int = 64) -> AnyTeacher:
    """The teacher's answers to the first `steps` batches of a task, from disk; what is missing there is asked first.

    directory None: the teacher itself. A planned run writes nothing and keeps the live one: filling and training cost together what it costs.

    Raises:
        CheckpointError: a cache of another teacher, k or precision, or one that cannot be read.
    """
    if directory is None or task.run.plan is not None:
        return teacher
    found = CachedTeacher(directory, teacher, k)
    found.fill(task, steps)
    found.teacher = None                                          # its memory is wanted for the training
    return found


class CachedTeacher:
    """What a teacher said, on disk. teacher: the live one, which `fill` asks; k: how many outcomes are kept.

    Raises:
        CheckpointError: a cache of another teacher or k, or one that cannot be read; the directory is as it was.
    """

    def __init__(self, directory: str | Path, teacher: Teacher | SelfTeacher | None = None, k: int = 64) -> None:
        if k < 1:
            raise RunError(f"k={k}: a teacher's answer needs at least one outcome")
        self.directory, self.teacher, self.k = Path(directory), teacher, k
        self.answers = Answers(directory)
        self._said = None if teacher is None else fingerprint(teacher.model)
        there = self.answers.facts
        if there is not None:
            if self._said not in (None, there.teacher):
                raise self._foreign(f"of another teacher ({brief(there.teacher[:12])}, this one is {brief(str(self._said)[:12])})")
            if there.kept != min(k, there.classes):
                raise self._foreign(f"of the {there.kept} most probable outcomes of {there.classes}, not of k={k}")

    @property
    def source(self) -> Any:
        """What a resume point says of the teacher."""
        there = self.answers.facts
        return None if there is None else {"teacher": there.teacher, "kept": there.kept, "precision": there.precision}

    def divergence(self, task: Task, batch: Batch, logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
        """How far the student's logits are from what the teacher said of the batch. mask (batch, tokens): the positions that count.

        Raises:
            CheckpointError: a sample that the teacher was not asked about. RunError: another number of classes; a temperature, where the rest of
            the outcomes is known by its mass only.
        """
        there, names = self.answers.facts, keys(batch, mask)
        missing = sum(name not in self.answers for name in names)
        if missing or there is None:
            raise CheckpointError(f"{missing} of {len(names)} samples of this batch are not in {self.directory}, which holds {len(self.answers)}: "
                                  "other data, another tokenizer, length, seed of an augmentation, or more steps. "
                                  "Fill it with the live teacher first: CachedTeacher(directory, teacher).fill(task, steps)")
        loss.same_classes(logits, torch.empty(there.classes, device="meta"))
        found = [self.answers[name] for name in names]
        values = torch.cat([answer.values for answer in found]).to(logits.device)                                   # (positions, width)
        chosen = logits if mask is None else logits[mask]                                                           # (positions, classes)
        counted = torch.ones(len(values), dtype=torch.bool, device=logits.device)                                   # of none the mean is 0
        if there.kept == there.classes:
            return task.divergence(chosen, values, temperature, counted)
        if temperature != 1:
            raise RunError(f"temperature={temperature:g}: {self.directory} holds {there.kept} of {there.classes} outcomes, and the mass of the rest "
                           "cannot be tempered; take temperature=1, or a live teacher")
        index = torch.cat([answer.index for answer in found if answer.index is not None]).to(logits.device)
        return loss.kl_top(chosen, index.long(), values, counted)

    def fill(self, task: Task, steps: int) -> None:
        """Ask the live teacher about each sample of the first `steps` batches that is not there yet.

        Raises:
            CheckpointError: answers of another precision. RunError: no live teacher, or one that says NaN; a directory that cannot be written.
        """
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU")           # PartialState, unlike Accelerator, does not read it, and would see one process
        where = PartialState(cpu=cpu).device                      # all ranks meet here: they cannot while one waits for another's filling
        there = self.answers.facts
        if there is not None and there.precision != task.run.precision:
            raise self._foreign(f"of a teacher that computed in precision {there.precision!r}, this run has {task.run.precision!r}")
        first = next((step for step in range(steps) if self._missing(task.batch(step))), None)
        if first is None:
            return
        if self.teacher is None:
            raise RunError(f"{self.directory} lacks samples of step {first}, and there is no live teacher to ask; give CachedTeacher one")
        with self.answers.filling(), bar("teacher", steps, task.run.progress, first) as advance:
            began = time.monotonic()
            for step in range(first, steps):
                self._ask(task, task.batch(step), self.teacher, where)
                if self.answers.waiting >= SHARD or time.monotonic() - began >= SECONDS:
                    self.answers.write()                          # between batches: a filling that goes on asks as one that was never killed
                    began = time.monotonic()
                advance(f"{len(self.answers)} samples")
            self.answers.write()

    def _missing(self, batch: Batch) -> dict[bytes, int]:
        """Key and row of each sample that is not there, once."""
        return {name: row for row, name in enumerate(keys(batch, predicted(batch))) if name not in self.answers}

    def _ask(self, task: Task, batch: Batch, teacher: Teacher | SelfTeacher, where: torch.device) -> None:
        missing, run = self._missing(batch), task.run
        names, size = list(missing), run.micro or max(len(missing), 1)
        for at in range(0, len(names), size):
            rows = torch.tensor([missing[name] for name in names[at : at + size]])
            part = moved({name: value[rows] for name, value in batch.items()}, where)
            with torch.autocast(where.type, torch.bfloat16, enabled=run.precision == "bf16"):
                logits = teacher(task, part)
            mask = predicted(part)
            for i, name in enumerate(names[at : at + size]):
                said = logits[i][None] if mask is None else logits[i][mask[i]]                                      # (positions, classes)
                if bool(said.isnan().any()):
                    raise RunError(f"the teacher says NaN of a sample of {type(task).__name__}; nothing can be learned from it")
                classes = said.shape[-1]
                self.answers.add(Facts(str(self._said), classes, min(self.k, classes), run.precision), name, kept(said, self.k))

    def _foreign(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.directory} holds answers {what}; give another directory, or the teacher and settings that filled it")


def kept(logits: Tensor, k: int) -> Answer:
    """What is kept of logits (positions, classes): all, where there are no more than k; else the k most probable and the rest's mass.

    >>> kept(torch.tensor([[0.0, 0.0, -100.0, 0.0, 0.0]]), 2).values
    tensor([[-1.3867, -1.3867, -0.6934]], dtype=torch.float16)
    """
    if logits.shape[-1] <= k:
        return Answer(logits.float().cpu(), None)
    p = F.log_softmax(logits.float(), -1)
    top, index = p.topk(k, -1)                                                                                      # (positions, k)
    rest = p.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)                                             # (positions, 1)
    return Answer(torch.cat([top, rest], -1).clamp(min=LEAST).half().cpu(), index.int().cpu())


def predicted(batch: Batch) -> Tensor | None:
    """The positions that count, (batch, tokens), where each token has a label; None where each row has one."""
    return loss.predicted(batch["labels"]) if batch["labels"].dim() == 2 else None


def keys(batch: Batch, mask: Tensor | None = None) -> Sequence[bytes]:
    """What a sample is known by, for each row: sha256 of its inputs between the first and the last position that is no padding, and of its part of
    `mask` (batch, tokens).

    >>> short, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0]])
    >>> keys({"ids": short, "attention_mask": short > 0}) == keys({"ids": padded, "attention_mask": padded > 0})
    True
    """
    inputs = {name: value.cpu() for name, value in sorted(batch.items()) if name != "labels"}
    if mask is not None:
        inputs["predicted"] = mask.cpu()
    seen = inputs.get("attention_mask")
    found = []
    for row in range(len(next(iter(inputs.values())))):
        span = slice(None)
        if seen is not None and seen.dim() == 2:
            real = seen[row].nonzero().flatten().tolist() or [0]
            span = slice(real[0], real[-1] + 1)
        parts: list[bytes] = []
        for name, value in inputs.items():
            aligned = seen is not None and value.shape[:2] == seen.shape[:2]
            sample = value[row][span] if aligned else value[row]
            raw = sample.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts += [name.encode(), repr((str(value.dtype), tuple(sample.shape))).encode(), raw]
        found.append(bytes.fromhex(digest(parts)))
    return found
