"""Sentences and images with labels."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qatlas.core.error import DataError
from qatlas.train import data
from qatlas.train.evaluate import evaluate
from qatlas.train.fit import fit
from qatlas.train.labelled import Classification, Images, matthews, pearson, ranks
from qatlas.train.optim import AdamW
from qatlas.train.run import Run

QUIET = Run(progress=False)


def tokenizer(*columns, padding, truncation, max_length, return_tensors):
    rows = [[ord(c) % 32 for c in " ".join(parts)][:max_length] for parts in zip(*columns, strict=True)]
    n = max(map(len, rows))
    ids, seen = [row + [0] * (n - len(row)) for row in rows], [[1] * len(row) + [0] * (n - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}


class Bag(nn.Module):
    """Mean of embeddings, then a linear layer."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, classes)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


def table(labels, **columns):
    rows = {**columns, "label": labels}
    return data.Table(rows, {name: values[:8] for name, values in rows.items()})


def test_sentences_are_learned():
    subject = Classification(table([0, 1] * 20, sentence=["good fine", "bad poor"] * 20), tokenizer, run=QUIET)
    assert subject.classes == 2 and not subject.regression
    model = Bag(2)
    fit(model, subject, steps=30, optimizer=AdamW(3e-2))
    assert evaluate(model, subject)["accuracy"] == 1.0 and evaluate(model, subject)["matthews"] == 1.0


def test_numbers_are_regressed():
    subject = Classification(table([0.5, -1.5] * 20, sentence1=["good", "bad"] * 20, sentence2=["fine", "poor"] * 20), tokenizer, run=QUIET)
    assert subject.regression and subject.classes == 1
    model = Bag(1)
    fit(model, subject, steps=30, optimizer=AdamW(3e-2))
    assert evaluate(model, subject)["pearson"] > 0.99


@pytest.mark.parametrize("rows, said", [
    ({"train": {"sentence": ["a"], "label": [-1]}}, "label is -1"), ({"train": {"sentence": ["a"], "label": ["x"]}}, "label is 'x'"),
    ({"train": {"body": ["a"], "label": [1]}}, "found body, label"), ({"train": {"sentence": ["a"]}}, "no labels"),
    ({"train": {"sentence": ["a"] * 2, "label": ["x", "1"]}}, "words and numbers at once, for instance 'x' and '1'"),
    ({"train": {"sentence": ["a"] * 2, "label": ["x", None]}}, "label is 'x'"),
    ({"train": {"sentence": [], "label": []}}, "labels are empty"), ({"train": {"sentence": ["a"], "label": [None]}}, "label is None")])
def test_constructors_fail_early(rows, said):
    with pytest.raises(DataError, match=said):
        Classification(data.Table(rows["train"], rows["train"]), tokenizer)


@pytest.mark.parametrize("names, taken", [((), ("bad", "good")), (("good", "bad"), ("good", "bad")), (("good", "fine"), ("bad", "good"))])
def test_words_are_classes_and_say_which(tmp_path, names, taken):
    """Sorted, unless the model has names for all of them."""
    (tmp_path / "a.csv").write_text("sentence,label\n" + "a day,good\nthe day,bad\n" * 30)
    subject = Classification(str(tmp_path / "a.csv"), tokenizer, names=names, run=QUIET)
    assert subject.names == taken and subject.classes == 2 and not subject.regression
    for labels, sentences in zip(subject.labels, subject.sentences, strict=True):
        assert [taken[label] for label in labels.tolist()] == [{"a day": "good", "the day": "bad"}[sentence] for sentence in sentences[0]]
    assert Classification(table([0, 1] * 30, sentence=["a day", "the day"] * 30), tokenizer, run=QUIET).names == ()


def pictures(n=64, size=8, channels=3):
    y = np.arange(n) % 2
    x = np.random.default_rng(0).integers(0, 60, (n, size, size, channels)).astype(np.uint8)
    x[y == 1, :, : size // 2] += 150
    return x, y


def test_images_are_normalised_and_learned(tmp_path):
    x, y = pictures()
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    subject = Images(str(tmp_path / "a.npz"), batch=16, run=QUIET)
    assert subject.rows == 64 and subject.held_rows == 10 and subject.classes == 2
    whole = torch.cat([subject.batch(step)["pixel_values"] for step in range(4)])      # one epoch
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    fit(model, subject, steps=20, optimizer=AdamW(1e-2))
    assert evaluate(model, subject)["accuracy"] == 1.0


def test_augmentation_is_a_function_of_the_step(tmp_path):
    x, y = pictures(channels=1)
    np.savez(tmp_path / "a.npz", x=x[..., 0], y=y)
    one, two = (Images(str(tmp_path / "a.npz"), mirror=True, shift=2, batch=16, run=QUIET) for _ in "12")
    assert torch.equal(one.batch(3)["pixel_values"], two.batch(3)["pixel_values"]) and one.batch(3)["pixel_values"].shape == (16, 1, 8, 8)
    plain = Images(str(tmp_path / "a.npz"), batch=16, run=QUIET)
    assert not torch.equal(one.batch(3)["pixel_values"], plain.batch(3)["pixel_values"])
    assert torch.equal(next(one.held_out())["pixel_values"], next(plain.held_out())["pixel_values"])
    assert one.fingerprint != plain.fingerprint


def test_encoded_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    import pyarrow as pa
    import pyarrow.parquet as pq

    def png(pixels):
        file = io.BytesIO()
        image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    x, y = pictures(20)
    pq.write_table(pa.table({"jpeg": [png(p) for p in x], "label": y}), tmp_path / "a.parquet")
    subject = Images(str(tmp_path / "a.parquet"), mean=(0, 0, 0), std=(1, 1, 1), batch=4)
    assert sorted(map(bytes, (subject.images[0].permute(0, 2, 3, 1).numpy()))) == sorted(map(bytes, np.delete(x, held(x, subject), 0)))
    pq.write_table(pa.table({"jpeg": [png(x[0]), png(x[1][:4])], "label": [0, 1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="several sizes|holds"):
        Images(str(tmp_path / "b.parquet"), held_out=str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"picture": [png(x[0])] * 3, "label": [0, 1, 0]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="found picture, label"):
        Images(str(tmp_path / "c.parquet"))


def held(x, subject):
    """Which rows of x were held out."""
    rows = {bytes(p) for p in subject.images[1].permute(0, 2, 3, 1).numpy()}
    return [i for i, p in enumerate(x) if bytes(p) in rows]


def test_wrong_pixels(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3), np.float32), y=np.zeros(4, int))
    with pytest.raises(DataError, match="float32 of shape"):
        Images(str(tmp_path / "a.npz"))


def test_scores():
    x = torch.tensor([1.0, 5.0, 5.0, 2.0])
    assert ranks(x).tolist() == [0.0, 2.5, 2.5, 1.0]
    y = torch.tensor([0.3, 2.0, 1.0, 0.1])
    assert pearson(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    a, b = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 1])
    tp, tn, fp, fn = 2, 2, 1, 0
    assert matthews(a, b) == pytest.approx((tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5)
    assert pearson(x, torch.ones(4)) == 0.0


@pytest.mark.skipif("QATLAS_DATA" not in os.environ, reason="real data: set QATLAS_DATA")
def test_real_data():
    root = Path(os.environ["QATLAS_DATA"])
    glue = Classification(str(root / "glue/rte_dev.parquet"), tokenizer, batch=4)
    assert glue.rows + glue.held_rows == 277 and glue.classes == 2 and len(glue.sentences[0]) == 2
    assert Classification(str(root / "glue/qnli_dev.parquet"), tokenizer, batch=4).classes == 2
    mnist = Images(str(root / "mnist/mnist.npz"), batch=4)
    assert (mnist.rows, mnist.held_rows, mnist.classes) == (60_000, 10_000, 10) and mnist.batch(0)["pixel_values"].shape == (4, 1, 28, 28)
    photo = Images(str(root / "pacs64/photo.parquet"), batch=4)
    assert photo.classes == 7 and photo.batch(0)["pixel_values"].shape == (4, 3, 64, 64)


def test_augmentation_is_a_function_of_seed_and_step_and_leaves_the_held_out_part_alone():
    from sentences import Letters

    def swapped(sentences, draw):
        words = sentences[0].split()
        draw.shuffle(words)
        return [" ".join(words)]

    rows = {"text": ["a b c d e f", "g h i j k l"], "label": [0, 1]}

    def made(**more):
        return Classification(data.Table(rows, rows), Letters(), batch=2, run=Run(progress=False), **more)

    plain, task = made(), made(augment=swapped)
    one, again, later = task.batch(0)["input_ids"], task.batch(0)["input_ids"], task.batch(1)["input_ids"]
    assert torch.equal(one, again) and not torch.equal(one, plain.batch(0)["input_ids"])
    assert not torch.equal(one.sort(0).values, later.sort(0).values)
    assert torch.equal(next(task.held_out())["input_ids"], next(plain.held_out())["input_ids"])
    assert task.fingerprint != plain.fingerprint
    with pytest.raises(DataError, match="2 sentences for a row of 1"):
        made(augment=lambda sentences, draw: [*sentences, "more"]).batch(0)
