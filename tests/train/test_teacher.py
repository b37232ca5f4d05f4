"""Teachers are frozen; the self-teacher is the student without its quantizers."""

import pytest
import torch
from tiny import llama, quantized, task

from qatlas.core.error import RunError
from qatlas.train import loss
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.teacher import Distil, SelfTeacher, Teacher, full_precision


@pytest.mark.parametrize("keep", ["each", "buffer", "recompute"])
def test_the_self_teacher_is_the_same_weights_in_full_precision(keep):
    plain, model, subject = llama(), quantized(llama(), "w2", keep=keep).train(), task()
    batch = subject.batch(0)
    before = subject.logits(model, batch)
    said = SelfTeacher(model)(subject, batch)
    assert torch.equal(said, subject.logits(plain.eval(), batch)) and not said.requires_grad
    assert not torch.equal(said, before) and model.training
    assert torch.equal(subject.logits(model, batch), before)


def test_quantizers_come_back_as_they_were_even_after_an_error():
    model = quantized(llama(), "w2a8")
    found = [m for m in model.modules() if type(m).__name__ == "Quantizer"]
    found[0].on = False
    with pytest.raises(ZeroDivisionError), full_precision(model):
        assert not any(q.on for q in found)
        1 / 0  # noqa: B018
    assert [q.on for q in found] == [False] + [True] * (len(found) - 1)


def test_a_teacher_stays_as_it_is():
    student, subject = quantized(llama(dropout=0.5), "w2").train(), task()
    teacher = Teacher.of(student)
    assert student.training and next(student.parameters()).requires_grad
    first = teacher(subject, subject.batch(0))
    fit(student, subject, steps=3, optimizer=AdamW(1e-2), loss=Distil(subject, teacher))
    assert torch.equal(first, teacher(subject, subject.batch(0)))


def test_distillation_brings_the_student_to_the_teacher():
    subject, teacher = task(), Teacher(llama(seed=1))
    student = quantized(llama(seed=2), "w4")
    history = fit(student, subject, steps=60, optimizer=AdamW(1e-2), loss=Distil(subject, teacher, temperature=2.0))
    assert history.loss[-1] < 0.5 * history.loss[0]


def test_distil_mixes_both_losses():
    subject, student, teacher = task(), llama().eval(), Teacher(llama(seed=1))
    batch = subject.batch(0)
    logits, target = subject.logits(student, batch), teacher(subject, batch)
    soft, hard = loss.kl(logits, target, 2.0, loss.predicted(batch["labels"])), subject.loss(student, batch)
    torch.testing.assert_close(Distil(subject, teacher, temperature=2.0, share=0.3)(student, batch), 0.3 * soft + 0.7 * hard)


def test_another_vocabulary_is_refused():
    subject, teacher = task(), Teacher(llama())
    teacher.model.resize_token_embeddings(40)
    with pytest.raises(RunError, match="teacher has 40 classes"):
        fit(llama(), subject, steps=1, loss=Distil(subject, teacher))
