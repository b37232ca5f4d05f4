"""Tasks with one label a row: sentences and images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.error import DataError, RunError
from . import data, loss
from .resume import described
from .run import Run
from .task import Batch, Task, labels, output

Augment = Callable[[list[str], np.random.Generator], Sequence[str]]
SENTENCES = (("text",), ("sentence1", "sentence2"), ("question", "sentence"), ("premise", "hypothesis"), ("sentence",))


class Labelled(Task):
    """Loss and score of (batch, classes) logits against `labels` (batch,): classes, or numbers where `regression`."""

    regression = False

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.logits(model, batch)
        if self.regression:
            return loss.mse(logits.reshape(len(logits), -1), labels(batch).reshape(len(logits), -1))
        return loss.cross_entropy(logits, labels(batch))

    def divergence(self, student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
        """Of a regression the mean squared difference, since one number is no distribution.

        Raises:
            RunError: a temperature for a regression.
        """
        if not self.regression:
            return super().divergence(student, teacher, temperature, mask)
        if temperature != 1:
            raise RunError(f"temperature={temperature:g}: the number of a regression has none; take temperature=1")
        return loss.mse(student, teacher, mask)

    def score(self, model: nn.Module) -> dict[str, float]:
        """`accuracy` (0 to 1), `matthews` and `loss`; for a regression `pearson`, `spearman` and `loss`."""
        found = [(logits.float().cpu(), batch["labels"].cpu()) for logits, batch in self.predictions(model)]
        logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
        if self.regression:
            x, y = logits.flatten().double(), labels.flatten().double()
            return {"pearson": pearson(x, y), "spearman": pearson(ranks(x), ranks(y)), "loss": float((x - y).square().mean())}
        chosen, mean = logits.argmax(-1), float(loss.cross_entropy(logits, labels))
        return {"accuracy": float((chosen == labels).double().mean()), "matthews": matthews(chosen, labels), "loss": mean}


class Classification(Labelled):
    """One or two sentences -> a class, or a number where the labels are fractions or `regression` says so.

    source: an address of `data.table`, or a `data.Table`. columns: the sentences' columns; by default the first that fits of text; sentence1,
    sentence2; question, sentence; premise, hypothesis; sentence. The labels' column is `label`.
    names: of the classes, in the order of their numbers, for labels that are words; where they do not name all, the words are sorted. What was taken
    stands in `names`.
    augment: (the sentences of a row, a random generator) -> as many other sentences, for training rows only: a pure function, so that a step's batch
    stays a pure function of (seed, step). TinyBERT's replacement of words is one.

    Raises:
        DataError: no rows, columns missing, labels that are missing or -1 (GLUE's hidden test labels).
    """

    def __init__(self, source: str | data.Table, tokenizer: Any, *, columns: Sequence[str] = (), names: Sequence[str] = (),
                 regression: bool | None = None, length: int = 128, batch: int = 16, held_out: str | None = None, augment: Augment | None = None,
                 target: str | None = None, extra_rules: Sequence[Any] = (), run: Run | None = None) -> None:
        super().__init__(batch, target, extra_rules, run)
        found = source if isinstance(source, data.Table) else data.table(source, held_out, [*columns, "label"])
        sentences = columns or next((c for c in SENTENCES if set(c) <= set(found.train)), ())
        if not sentences:
            raise DataError(f"no column of sentences: found {', '.join(found.train)}; name them in columns=, "
                            "or call them text, sentence, or sentence1 and sentence2")
        self.names = _words((found.train, found.held_out), names)
        number = {name: i for i, name in enumerate(self.names)}
        parts = [(part, [number[v] for v in part["label"]] if number else _labels(part)) for part in (found.train, found.held_out)]
        fractions = any(isinstance(v, float) and v != int(v) for v in parts[0][1])
        self.regression = fractions if regression is None else regression
        self.tokenizer, self.length, self.augment = tokenizer, length, augment
        self.sentences = [[[str(s) for s in part[name]] for name in sentences] for part, _ in parts]
        self.labels = [torch.tensor(v, dtype=torch.float32 if self.regression else torch.long) for _, v in parts]
        self.classes = 1 if self.regression else len(self.names) or int(max(v.max() for v in self.labels)) + 1
        self.rows, self.held_rows = map(len, self.labels)
        more = ([self.names] if self.names else []) + ([] if augment is None else [described(augment)])
        self._mark(sentences, length, self.regression, found.fingerprint, *more)

    def take(self, index: np.ndarray, step: int | None) -> Batch:
        part = 0 if step is not None else 1
        chosen = [[column[i] for i in index] for column in self.sentences[part]]
        if self.augment is not None and step is not None:
            chosen = self._augmented(chosen, step)
        rows = self.tokenizer(*chosen, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        return {**rows, "labels": self.labels[part][torch.from_numpy(index)]}

    def _augmented(self, columns: list[list[str]], step: int) -> list[list[str]]:
        assert self.augment is not None
        rows = [list(self.augment(list(row), np.random.default_rng([self.run.seed, step, i, 3]))) for i, row in enumerate(zip(*columns, strict=True))]
        wrong = next((row for row in rows if len(row) != len(columns)), None)
        if wrong is not None:
            raise DataError(f"augment gave {len(wrong)} sentences for a row of {len(columns)}; give as many back as came in")
        return [list(column) for column in zip(*rows, strict=True)]


class Images(Labelled):
    """Images -> a class.

    source: an address of `data.table`: .npz with x, y or x_train, y_train, x_test, y_test (uint8; (n, h, w) or (n, h, w, c)), or rows with a column
    `jpeg` or `image` (encoded images) and `label`. mean, std: of each channel on the scale 0 to 1; by default those of the training part.
    mirror, shift: augmentation: half of the images mirrored, all moved by up to so many pixels; a function of (seed, step).

    Raises:
        DataError: no rows, no labels, images of unequal size. RunError: encoded images without Pillow.
    """

    def __init__(self, source: str, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, mirror: bool = False,
                 shift: int = 0, batch: int = 64, held_out: str | None = None,
                 target: str | None = None, extra_rules: Sequence[Any] = (), run: Run | None = None) -> None:
        super().__init__(batch, target, extra_rules, run)
        found = data.table(source, held_out)
        self.mirror, self.shift = mirror, shift
        self.images = [_pixels(source, part) for part in (found.train, found.held_out)]                          # (n, c, h, w) uint8
        self.labels = [torch.tensor(np.asarray(_labels(part)), dtype=torch.long) for part in (found.train, found.held_out)]
        for x, y in zip(self.images, self.labels, strict=True):
            if len(x) != len(y) or len(x) == 0:
                raise DataError(f"{source} has {len(x)} images and {len(y)} labels")
        self.classes = int(max(v.max() for v in self.labels)) + 1
        sample = self.images[0].float() / 255 if mean is None or std is None else None
        self.mean = torch.tensor(mean) if mean is not None else sample.mean((0, 2, 3))  # type: ignore[union-attr]
        self.std = torch.tensor(std) if std is not None else sample.std((0, 2, 3)).clamp(min=1e-6)  # type: ignore[union-attr]
        self.rows, self.held_rows = map(len, self.labels)
        raw = [part.numpy().tobytes() for part in (*self.images, *self.labels)]
        self._mark(mirror, shift, self.mean.tolist(), self.std.tolist(), data.digest(raw))

    def take(self, index: np.ndarray, step: int | None) -> Batch:
        part = 0 if step is not None else 1
        at = torch.from_numpy(index)
        x = (self.images[part][at].float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]          # (batch, c, h, w)
        return {"pixel_values": x if step is None else self._augmented(x, step), "labels": self.labels[part][at]}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return output(model(batch["pixel_values"]))

    def _augmented(self, x: Tensor, step: int) -> Tensor:
        draw = np.random.default_rng([self.run.seed, step, 1])
        if self.mirror:
            x = torch.where(torch.from_numpy(draw.random(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x)
        if self.shift:
            moves = draw.integers(-self.shift, self.shift + 1, (len(x), 2))
            wide = nn.functional.pad(x, [self.shift] * 4)
            h, w = x.shape[-2:]
            corners = (moves + self.shift).tolist()
            x = torch.stack([image[:, top : top + h, left : left + w] for image, (top, left) in zip(wide, corners, strict=True)])
        return x


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors; 0 where one is constant.

    >>> pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    1.0
    """
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return round(float(x @ y) / scale, 12) if scale > 0 else 0.0


def ranks(x: Tensor) -> Tensor:
    """The ranks of a vector, from 0; equal values share their mean rank.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0]))
    tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() + 1) / 2)[group]


def matthews(chosen: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of classes (Gorodkin's form for several); 0 where one side is constant.

    >>> matthews(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]))
    1.0
    """
    n = int(max(chosen.max(), labels.max())) + 1
    x, y = nn.functional.one_hot(chosen, n).double(), nn.functional.one_hot(labels, n).double()
    x, y = x - x.mean(0), y - y.mean(0)
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return round(float((x * y).sum()) / scale, 12) if scale > 0 else 0.0


def _words(parts: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[str, ...]:
    """The classes of labels that are words, in the order of their numbers; none where labels are numbers, or one word only."""
    found = {value if isinstance(value, str) and value.strip() else None for part in parts for value in part.get("label", ())}
    words = sorted(word for word in found if word is not None)
    if None in found or len(words) < 2:
        return ()
    numbers = [word for word in words if word.strip().lstrip("+-").replace(".", "", 1).isdigit()]
    if numbers:
        other = next((word for word in words if word not in numbers), numbers[-1])
        raise DataError(f"labels are words and numbers at once, for instance {other!r} and {numbers[0]!r}; give either")
    return tuple(names) if found <= set(names) else tuple(words)


def _labels(rows: dict[str, Any]) -> list[Any]:
    found = rows.get("label", rows.get("y"))
    if found is None:
        raise DataError(f"no labels: found the columns {', '.join(rows)}; the labels' column is called label (in .npz: y)")
    values = found.tolist() if isinstance(found, np.ndarray) else list(found)
    if not values:
        raise DataError("the labels are empty")
    wrong = [v for v in values if not isinstance(v, int | float) or (v == -1 and not isinstance(v, float))]
    if wrong:
        raise DataError(f"a label is {wrong[0]!r}: labels are classes from 0, or numbers (-1 marks hidden labels of a test split: give another)")
    return values


def _pixels(source: str, rows: dict[str, Any]) -> Tensor:
    if "x" in rows:
        pixels = np.asarray(rows["x"])
    else:
        column = next((name for name in ("jpeg", "image", "img") if name in rows), None)
        if column is None:
            raise DataError(f"{source} has no images: found {', '.join(rows)}; "
                            "wanted x and y, or x_train, y_train, x_test, y_test (.npz), or rows with jpeg or image, and label")
        decoded = [_decoded(value) for value in rows[column]]
        if len({image.shape for image in decoded}) > 1:
            sizes = ", ".join(map(str, sorted({image.shape for image in decoded})))
            raise DataError(f"{source} holds images of several sizes: {sizes}; resize them first")
        pixels = np.stack(decoded) if decoded else np.zeros((0, 1, 1, 1), np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise DataError(f"{source} holds images as {pixels.dtype} of shape {pixels.shape}; wanted uint8, (n, h, w) or (n, h, w, c)")
    x = torch.from_numpy(pixels)
    return x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()


def _decoded(value: Any) -> np.ndarray:
    raw = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(raw, bytes):
        return np.asarray(raw.convert("RGB"))                     # an image that `datasets` has decoded
    try:
        from PIL import Image
    except ImportError:
        raise RunError("encoded images need Pillow: pip install 'qatlas[vision]'") from None
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
