"""Imitation: its terms by hand, and every pair of models that cannot imitate each other refused in words."""

import pytest
import torch
from sentences import SIZE, Letters, bert, gpt2, images, sentences, vit
from tiny import llama as tiny_llama
from tiny import task as text
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from qatlas.core.error import DataError, RuleError, RunError
from qatlas.model.taps import read
from qatlas.papers.ternarybert import ternarybert
from qatlas.train import data
from qatlas.train.cached import CachedTeacher
from qatlas.train.evaluate import judged
from qatlas.train.fit import fit
from qatlas.train.imitate import TERMS, Imitation, find, teacher_for
from qatlas.train.labelled import Classification
from qatlas.train.run import Run
from qatlas.train.teacher import SelfTeacher, Teacher


def test_terms_by_hand():
    student, task = bert(seed=1), sentences()
    teacher = Teacher(bert(seed=2))
    loss = Imitation(task, teacher, student, **dict.fromkeys(TERMS, 1.0))
    batch = task.batch(0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    mask = batch["attention_mask"].bool()
    assert not mask.all(), "the batch has padding"
    with torch.no_grad():
        a, b = (model(**inputs, output_hidden_states=True, output_attentions=False) for model in (student, teacher.model))
        said, theirs = teacher.signals(task, batch, loss.read())
        terms = loss.terms(batch, *loss.forward(student, batch, theirs), said, theirs)
        own = []
        for model in (student, teacher.model):
            with read(model, [*(f"*.self:{name}" for name in ("probabilities", "scores", "context")), "*.attention.output:output",
                              "*.attention.output.dense:output"]) as s:
                model(**inputs)
            own.append(dict(s))
    mse = nn.functional.mse_loss
    torch.testing.assert_close(terms["hidden"], sum(mse(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True)))
    torch.testing.assert_close(terms["logits"], nn.functional.cross_entropy(a.logits, b.logits.softmax(-1)))

    def over(suffix, how):
        return sum(how(own[0][name], own[1][name]) for name in own[0] if name.endswith(suffix))

    torch.testing.assert_close(terms["context"], over(":context", mse))
    torch.testing.assert_close(terms["projected"], over("dense:output", mse))
    torch.testing.assert_close(terms["attended"], over("attention.output:output", mse))
    seen = mask[:, None, None, :]
    torch.testing.assert_close(terms["scores"], over(":scores", lambda x, y: mse(x * seen.where(seen, 0), y * seen.where(seen, 0))))
    rows = []
    for i, n in enumerate(mask.sum(1).tolist()):
        parts = [(own[1][name][i, :, :n, :n], own[0][name][i, :, :n, :n]) for name in own[0] if name.endswith(":probabilities")]
        rows.append(sum((p * (p / q).log()).sum((1, 2)).mean() / n for p, q in parts))
    torch.testing.assert_close(terms["probabilities"], torch.stack(rows).mean(), rtol=1e-4, atol=1e-6)


def test_weights_and_the_mean_over_classes():
    student, task = bert(seed=1), sentences()
    teacher, batch = Teacher(bert(seed=2)), sentences().batch(0)
    one = Imitation(task, teacher, student, logits=1.0)
    third = Imitation(task, teacher, student, logits=1.0, class_mean=True)
    both = Imitation(task, teacher, student, logits=2.0, hidden=0.5)
    hidden = Imitation(task, teacher, student, logits=0.0, hidden=1.0)
    with judged(student):
        torch.testing.assert_close(one(student, batch) / 3, third(student, batch))
        torch.testing.assert_close(both(student, batch), 2 * one(student, batch) + 0.5 * hidden(student, batch))
    with pytest.raises(RunError, match="attention.*scores|scores"):
        Imitation(task, teacher, student, score=1.0)


def test_a_regression_compares_the_numbers():
    student, task = bert(seed=1, num_labels=1), sentences(labels=(0.5, 1.5, 2.0, 0.1, 1.0, 3.0))
    teacher = Teacher(bert(seed=2, num_labels=1))
    batch = task.batch(0)
    with judged(student):
        x = {name: value for name, value in batch.items() if name != "labels"}
        apart = (student(**x).logits - teacher.model(**x).logits).square().mean()
        torch.testing.assert_close(Imitation(task, teacher, student)(student, batch), apart)


def test_in_a_decoder_what_the_mask_hides_counts_nothing():
    student, task = tiny_llama(1), text()
    loss = Imitation(task, Teacher(tiny_llama(2)), student, scores=1.0)
    value = loss(student, task.batch(0))
    assert value.isfinite() and value < 100
    assert find(student, "hidden") == ["model.layers.0:input", "model.layers.0:output", "model.layers.1:output"]


class Deaf(nn.Module):
    """A teacher that takes no mask."""

    def __init__(self):
        super().__init__()
        self.inner = bert()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids):
        return self.inner(input_ids)


@pytest.mark.parametrize(("teacher", "says"), [
    (lambda: bert(layers=3), "3 blocks, the student 2"),
    (lambda: bert(hidden_size=32), r"16.*32|32.*16"),
    (lambda: bert(num_attention_heads=4), "number of heads"),
    (lambda: bert(vocab_size=40), "40 tokens, the student 32"),
    (lambda: bert(num_labels=5), r"logits is \(2, 3\) in the student and \(2, 5\) in the teacher"),
    (Deaf, "attention_mask, which the teacher's forward does not take"),
    (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SIZE, vocab_size=32, num_labels=3)), "(?s)teacher has no signal.*deberta"),
], ids=["depth", "width", "heads", "vocabulary", "classes", "mask", "signals"])
def test_teachers_that_do_not_fit_are_refused_before_anything_moves(teacher, says):
    model = bert()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RunError, match=says):
        Imitation(sentences(), Teacher(teacher().eval()), model, hidden=1.0, scores=1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_student_without_attention_to_look_into_is_refused(tmp_path):
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 1], layer_type="basic", num_labels=3))
    with pytest.raises(RuleError, match="attention"):
        ternarybert(resnet, images(tmp_path), steps=1)


def test_a_teacher_from_a_directory_and_its_tokenizer(tmp_path):
    teacher = bert(seed=3)
    teacher.save_pretrained(tmp_path / "one")
    loaded = teacher_for(bert(), sentences(), str(tmp_path / "one"))
    assert torch.equal(loaded.model.classifier.weight, teacher.classifier.weight)
    model = ternarybert(bert(), sentences(), teacher=str(tmp_path / "one"), steps=2)
    assert model.config.num_labels == 3
    assert teacher_for(bert(), sentences(), teacher).model is teacher


def test_another_tokenizer_is_refused(tmp_path, monkeypatch):
    from qatlas.train import imitate

    monkeypatch.setattr(imitate, "load", lambda *_: (bert(), Letters(["extra"])))
    with pytest.raises(RunError, match="another tokenizer than the task .1 tokens differ."):
        teacher_for(bert(), sentences(), "somewhere")


def test_a_cached_teacher_cannot_be_looked_into(tmp_path):
    with pytest.raises(RunError, match="CachedTeacher knows logits only"):
        Imitation(sentences(), CachedTeacher(tmp_path), bert(), hidden=1.0)


class Unlabelled(Classification):
    """Batches without labels."""

    def take(self, index, step):
        return {name: value for name, value in super().take(index, step).items() if name != "labels"}


def test_a_task_without_labels_can_be_imitated_and_not_learned():
    rows = {"text": ["the cat", "a dog", "it rained"], "label": [0, 1, 2]}
    task = Unlabelled(data.Table(rows, rows), Letters(), batch=2, run=Run(progress=False))
    ternarybert(bert(), task, steps=2)
    with pytest.raises(DataError, match="only input_ids, attention_mask; give data with labels"):
        fit(bert(), task, steps=1)


def test_the_student_as_its_own_teacher_and_other_kinds(tmp_path):
    for model, task in ((vit(), images(tmp_path)), (gpt2(), text())):
        loss = Imitation(task, SelfTeacher(model), model, hidden=1.0, scores=1.0, attended=1.0)
        assert loss(model, task.batch(0)).isfinite()


def test_an_encoder_with_a_decoder_is_refused_before_anything_moves():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(**sizes, vocab_size=32, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64))
    kinds = [type(module) for module in bart.modules()]
    for train in (lambda: ternarybert(bart, text(), steps=1), lambda: Imitation(text(), Teacher.of(bart), bart, hidden=1.0)):
        with pytest.raises(RunError, match="encoder with a decoder"):
            train()
    assert [type(module) for module in bart.modules()] == kinds


def test_a_model_with_a_part_called_module_is_not_taken_for_ddp():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module, self.extra, self.config = inner, nn.Linear(1, 1), inner.config

        def get_input_embeddings(self):
            return self.module.get_input_embeddings()

        def forward(self, **batch):
            return self.module(**batch)

    student, task = Wrapped(bert(seed=1)), sentences()
    loss = Imitation(task, Teacher(Wrapped(bert(seed=2))), student, hidden=1.0)
    assert loss.addresses["hidden"][0] == "module.bert.encoder.layer.0:input"
    assert loss(student, task.batch(0)).isfinite()
