"""Task: what is learned, from what, and how it is judged.

A task is random access: `batch(step)` is a pure function of (seed, step). Item k of the endless stream is row p_e[k mod n] of epoch e = k div n,
where p_e is a permutation seeded by (seed, e). So a resumed run needs no loader state, every rank can slice the same global batch, and two papers
see the same data.

    LanguageModelling   text cut into windows                      perplexity
    Chat                conversations; the loss hears only answers perplexity of the answers
    Classification      one or two sentences -> class or number    accuracy, Matthews | Pearson, Spearman
    Images              images -> class                            accuracy

What all papers share rides on the task: the target of export, the user's rules, and the run (seed, precision, where to save). Constructors fail
early.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.error import DataError
from . import data, loss
from .calibrate import calibrate
from .run import Run

Batch = dict[str, Tensor]


class Task:
    """Batches, loss and score. Subclasses give `take`, `logits`, `loss`, `score` and fill `rows` and `held_rows` (numbers of items).

    batch_size: rows of one optimizer step, over all ranks and micro-batches.
    target: an export target such as "gguf:q4_0", through which `quantize` fits every Quant.
    extra_rules: the user's rules, which stand before a paper's.
    run: seed, precision, where resume points go.
    title: what a progress line says of a fit. whole: whether a fit trains the whole model, so that its score says something (a block's does not).
    """

    rows: int
    held_rows: int
    fingerprint: str
    begin = 0
    title = "fit"
    whole = True

    def __init__(self, batch: int, target: str | None, extra_rules: Sequence[Any], run: Run | None) -> None:
        if batch < 1:
            raise DataError(f"a batch needs at least one row, not {batch}")
        self.batch_size, self.target, self.extra_rules = batch, target, tuple(extra_rules)
        self.run = Run() if run is None else run

    def batch(self, step: int) -> Batch:
        """The global batch of an optimizer step: name -> (batch_size, ...). A pure function of (run.seed, step)."""
        step += self.begin
        first = step * self.batch_size
        place = [divmod(item, self.rows) for item in range(first, first + self.batch_size)]
        index = [shuffled(self.run.seed, epoch, self.rows)[i] for epoch, i in place]
        return self.take(np.array(index), step)

    def later(self, steps: int) -> Task:
        """The same task whose step 0 is the step `steps` of this one: the second fit of a run goes on in the data where the first ended."""
        task = copy.copy(self)
        task.begin += steps
        task.fingerprint = data.digest([f"{self.fingerprint}+{steps}".encode()]) if steps else self.fingerprint
        return task

    def held_out(self) -> Iterator[Batch]:
        """The held-out rows in order, in batches; the last may be smaller."""
        for first in range(0, self.held_rows, self.batch_size):
            yield self.take(np.arange(first, min(first + self.batch_size, self.held_rows)), None)

    def probe(self) -> Batch:
        """The inputs of two rows, without labels: for one forward that shows which layers are called."""
        return {name: value[:2] for name, value in self.batch(0).items() if name != "labels"}

    def calibration(self, n: int = 8) -> list[Batch]:
        """The first n training batches."""
        return [self.batch(step) for step in range(n)]

    def calibrate(self, model: nn.Module, n: int = 8) -> int:
        """Initialise the activation quantizers of `model` on `calibration(n)`; their number."""
        return calibrate(model, self, n)

    def take(self, index: np.ndarray, step: int | None) -> Batch:
        """Rows by number: of the training part, or, where step is None, of the held-out part. `step` seeds an augmentation."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says of a batch: (batch, tokens, vocabulary) or (batch, classes)."""
        return output(model(**{name: value for name, value in batch.items() if name != "labels"}))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the task: a scalar, a mean over `weight(batch)` items."""
        raise NotImplementedError

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
        """How far the student's logits are from the teacher's: what distillation minimises. mask (...), True where a position counts."""
        return loss.kl(student, teacher, temperature, mask)

    def weight(self, batch: Batch) -> int:
        """Over how many items `loss` is a mean: what makes micro-batches add up to the whole. By default rows."""
        return len(next(iter(batch.values())))

    def score(self, model: nn.Module) -> dict[str, float]:
        """Judge the model on the held-out part. Call it through `evaluate`, which sets and restores the mode."""
        raise NotImplementedError

    def predictions(self, model: nn.Module) -> Iterator[tuple[Tensor, Batch]]:
        """Logits and batch, for each held-out batch, on the model's device."""
        for batch in self.held_out():
            batch = moved(batch, device(model))
            yield self.logits(model, batch), batch

    def _mark(self, *parts: Any) -> None:
        """Set the fingerprint: of the kind and all that decides its batches."""
        self.fingerprint = data.digest([repr((type(self).__name__, self.batch_size, self.run.seed, *parts)).encode()])


class LanguageModelling(Task):
    """The next token of plain text, in windows of `length` tokens that do not overlap.

    text: an address of `data.text`, or a `data.Text`. tokenizer: a transformers tokenizer, or any callable text -> ids.

    Raises:
        DataError: a text shorter than one window.

    >>> task = LanguageModelling(data.Text("abcdefgh" * 9, "abcdefgh" * 9), lambda text: [ord(c) - 97 for c in text], length=8, batch=2)
    >>> task.batch(0)["input_ids"].shape
    torch.Size([2, 8])
    """

    def __init__(self, text: str | data.Text, tokenizer: Any, *, length: int = 256, batch: int = 8, held_out: str | None = None,
                 target: str | None = None, extra_rules: Sequence[Any] = (), run: Run | None = None) -> None:
        super().__init__(batch, target, extra_rules, run)
        source = text if isinstance(text, data.Text) else data.text(text, held_out)
        self.length, self.tokenizer = length, tokenizer
        if length < 2:
            raise DataError(f"a window of {length} tokens predicts nothing; take length=2 or more")
        self.windows = [_windows(encode(tokenizer, part), length, name) for part, name in ((source.train, "training"), (source.held_out, "held-out"))]
        self.rows, self.held_rows = map(len, self.windows)
        self._mark(length, data.digest(w.tobytes() for w in self.windows))

    def take(self, index: np.ndarray, step: int | None) -> Batch:
        ids = torch.from_numpy(self.windows[0 if step is not None else 1][index])        # (batch, length)
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss.next_token(self.logits(model, batch), labels(batch))

    def weight(self, batch: Batch) -> int:
        return int(loss.predicted(batch["labels"]).sum()) if "labels" in batch else super().weight(batch)

    def score(self, model: nn.Module) -> dict[str, float]:
        """`loss` in nats a token, `perplexity` = exp(loss), `tokens` that were predicted."""
        total, tokens = 0.0, 0
        for logits, batch in self.predictions(model):
            n = self.weight(batch)
            total, tokens = total + float(loss.next_token(logits, batch["labels"])) * n, tokens + n
        mean = total / max(tokens, 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": tokens}


def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n rows in an epoch, (n,)."""
    return _order(seed, epoch, n)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def output(answer: Any) -> Tensor:
    """The logits in what a model returned: transformers' `.logits`, or the tensor itself."""
    return getattr(answer, "logits", answer)


def labels(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: a batch without.
    """
    if "labels" not in batch:
        raise DataError(f"this loss compares with labels, and the batches hold only {', '.join(batch)}; give data with labels, or a loss that asks a "
                        "teacher instead (Distil, Imitation)")
    return batch["labels"]


def device(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def moved(batch: Batch, where: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(where, non_blocking=True) for name, value in batch.items()}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Text -> ids without special tokens of the tokenizer's own."""
    if not hasattr(tokenizer, "encode"):
        return list(tokenizer(text))
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _windows(ids: Iterable[int], length: int, name: str) -> np.ndarray:
    flat = np.asarray(ids, dtype=np.int64)
    n = len(flat) // length
    if n == 0:
        raise DataError(f"the {name} text has {len(flat)} tokens, fewer than one window of {length}; give more text or a smaller length")
    return flat[: n * length].reshape(n, length)
