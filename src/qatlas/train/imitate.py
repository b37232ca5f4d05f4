"""Imitation: a loss that asks a student to be like its teacher inside, not only in what it answers. Each term has a weight; 0 leaves it out.

    logits         cross entropy with the teacher's probabilities; squared difference where the task is a regression
    hidden         what enters the first block and what leaves each                              sum over them of MSE
    scores         attention scores before the softmax, 0 where the mask hides them              sum over layers of MSE
    probabilities  KL(teacher's map || student's), a mean over heads and queries, padding out    sum over layers
    context        probabilities times value                                                     sum over layers of MSE
    projected      what leaves the output projection, before residual and norm                   sum over layers of MSE
    attended       what the feed-forward part reads: after residual and norm                     sum over layers of MSE

The first three are TernaryBERT's (arXiv 2009.12812), `attended` is Teacher Intervention's "output" loss (2302.11812), `projected` that of its figure,
`probabilities` that of the same group's study of large encoders (2211.11014). MSE is a mean over all elements, padding included, as in their code.

The signals are found by name in the student and must be there in the teacher under the same names and with the same shapes: one forward of two rows
through both sees to it before training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.error import QatlasError, RunError, unknown
from ..model import signals
from ..model.blocks import blocks
from ..model.load import TASKS, load
from ..model.roles import ask
from ..model.taps import read
from . import loss
from .evaluate import judged
from .resume import fingerprint
from .task import Batch, Task, device, moved
from .teacher import SelfTeacher, Teacher

HIDDEN = -100.0                                                   # a score at or below is the mask's, not the model's


class Imitation:
    """A loss for `fit`. weights: a number for each term that is wanted; see the head of the file.

    class_mean: the logits' term divided by the number of classes.

    Raises:
        RunError: a term that does not exist; teacher and student of different depth, width, heads or vocabulary.
        RuleError: a student without a signal that is asked for.
    """

    def __init__(self, task: Task, teacher: Teacher | SelfTeacher, student: nn.Module, *, logits: float = 1.0, class_mean: bool = False,
                 **weights: float) -> None:
        for name in weights:
            if name not in TERMS:
                raise RunError(unknown("term of imitation", name, ["logits", *TERMS]))
        one_row(student)
        if not hasattr(teacher, "signals"):
            raise RunError(f"a {type(teacher).__name__} knows logits only; imitation looks inside its teacher: give a Teacher or a SelfTeacher")
        self.source = {"kind": teacher.source, "model": fingerprint(teacher.model)}               # a resume point compares it
        self.task, self.teacher, self.logits, self.class_mean = task, teacher, logits, class_mean
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.addresses = {name: find(student, name) for name in self.weights}
        self.check(student)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        said, theirs = self.teacher.signals(self.task, batch, self.read())
        found, own = self.forward(model, batch, theirs)
        parts = self.terms(batch, found, own, said, theirs)
        weights = {"logits": self.logits, **self.weights}
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def read(self) -> list[str]:
        """The addresses that are read in both models."""
        return [address for addresses in self.addresses.values() for address in addresses]

    def forward(self, model: nn.Module, batch: Batch, theirs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits and signals; `theirs` are the teacher's of the same batch."""
        with read(bare(model), self.read()) as own:
            return self.task.logits(model, batch), dict(own)

    def terms(self, batch: Batch, logits: Tensor, own: dict[str, Tensor], said: Tensor, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> the term before its weight, a scalar. logits, own: the student's; said, theirs: the teacher's."""
        parts = {"logits": self.prediction(batch, logits, said)} if self.logits else {}
        mask = batch.get("attention_mask")
        for name, addresses in self.addresses.items():
            parts[name] = torch.stack([TERMS[name](own[a], theirs[a], mask) for a in addresses]).sum()
        return parts

    def prediction(self, batch: Batch, logits: Tensor, said: Tensor) -> Tensor:
        """The term of the logits."""
        if getattr(self.task, "regression", False):
            return loss.mse(logits, said)
        mask = None
        if logits.dim() == 3:
            mask = loss.predicted(batch["labels"]) if "labels" in batch else batch["attention_mask"].bool() if "attention_mask" in batch else None
        return loss.soft_cross_entropy(logits, said, mask) / (logits.shape[-1] if self.class_mean else 1)

    def check(self, student: nn.Module) -> None:
        """One forward of two rows through both models."""
        if isinstance(self.teacher, Teacher):
            see_alike(self.teacher.model, student, self.task)
            for address in self.read():
                try:
                    signals.find(self.teacher.model, address)
                except QatlasError as error:
                    raise RunError(f"the teacher has no signal that the student is to imitate: {error}") from None
        batch = moved(self.task.probe(), device(student))
        said, theirs = self.teacher.signals(self.task, batch, self.read())
        with judged(student), read(student, self.read()) as own:
            found = self.task.logits(student, batch)
        for name, mine, other in [("logits", found, said), *((a, own[a], theirs[a]) for a in self.read())]:
            if mine.shape != other.shape:
                raise RunError(f"{name} is {tuple(mine.shape)} in the student and {tuple(other.shape)} in the teacher: imitation needs one width, "
                               "one number of heads and one vocabulary. Take a teacher of the same shape, or only the terms that both share")


def find(model: nn.Module, term: str) -> list[str]:
    """The addresses of a term, layer by layer."""
    if term == "hidden":
        names = [name for name, _ in blocks(model)]
        return [f"{names[0]}:input", *(f"{name}:output" for name in names)]
    return [spot.address for spot in signals.find(model, f"@attention:{term}")]


def see_alike(teacher: nn.Module, student: nn.Module, task: Task) -> None:
    """Raise RunError where the two cannot be given the same batch, or are of different depth."""
    theirs, own = len(blocks(teacher)), len(blocks(student))
    if theirs != own:
        raise RunError(f"the teacher has {theirs} blocks, the student {own}: imitation goes block by block. Take a teacher of the same depth")
    rows = [getattr(ask(model, "get_input_embeddings"), "num_embeddings", None) for model in (teacher, student)]
    if None not in rows and rows[0] != rows[1]:
        raise RunError(f"the teacher knows {rows[0]} tokens, the student {rows[1]}: they do not share a vocabulary; take one of the same family")
    takes = inspect.signature(teacher.forward).parameters
    unseen = [name for name in task.probe() if name not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values())]
    if unseen and "pixel_values" not in unseen:
        raise RunError(f"the batches bring {', '.join(unseen)}, which the teacher's forward does not take ({', '.join(takes)}): it would not see "
                       "what the student sees. Take a teacher that does")


def one_row(model: nn.Module) -> None:
    """Raise RunError for an encoder with a decoder: its blocks are two rows, and those of one would be forgotten."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RunError(f"{type(model).__name__} is an encoder with a decoder, and imitation goes along one row of blocks: take a model that is one "
                       "of the two, or a paper that looks at logits only")


def bare(model: nn.Module) -> nn.Module:
    """The model itself, where DDP stands around it: addresses are of its modules."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def teacher_for(student: nn.Module, task: Task, teacher: str | nn.Module | None = None) -> Teacher:
    """A teacher for a model that is still in full precision: a copy of itself, another model, or one loaded from a directory or the Hub.

    Raises:
        RunError: a teacher with another tokenizer; a student that is an encoder with a decoder. CheckpointError: one that cannot be loaded.
    """
    one_row(student)
    if teacher is None:
        return Teacher.of(student)
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    kind = next((kind for kind, auto in TASKS.items() if type(student).__name__.endswith(auto.removeprefix("AutoModel"))), "lm")
    model, tokenizer = load(teacher, kind)
    tokenizers: list[Any] = [getattr(task, "tokenizer", None), tokenizer]
    own, other = (t.get_vocab() if hasattr(t, "get_vocab") else None for t in tokenizers)
    if own is not None and other is not None and own != other:
        differ = sum(other.get(token) != i for token, i in own.items()) + sum(token not in own for token in other)
        raise RunError(f"{teacher} has another tokenizer than the task ({differ} tokens differ): the same ids would mean other words to the teacher. "
                       "Take a teacher of the same family")
    return Teacher(model)


def _mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    return loss.mse(student, teacher)


def _scores(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    return loss.mse(*(x.masked_fill(x <= HIDDEN, 0) for x in (student, teacher)))


def _map(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    p, q = (x.float().clamp(min=1e-8) for x in (teacher, student))                            # (B, H, T, S)
    each = p * (p / q).log()
    if mask is None:
        return each.sum(-1).mean()
    seen = mask.to(each.dtype)
    each = each * seen[:, None, :, None] * seen[:, None, None, :]
    return (each.sum((2, 3)) / seen.sum(-1)[:, None]).mean()


TERMS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "hidden": _mse, "scores": _scores, "probabilities": _map, "context": _mse, "projected": _mse, "attended": _mse}

__all__: Sequence[str] = ["Imitation", "bare", "find", "one_row", "see_alike", "teacher_for"]
