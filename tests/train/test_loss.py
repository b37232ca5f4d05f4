"""Losses against torch's own formulas."""

import pytest
import torch
import torch.nn.functional as F

from qatlas.core.error import RunError
from qatlas.train import loss

G = torch.Generator().manual_seed(0)
LOGITS, OTHER = torch.randn(3, 7, 11, generator=G), torch.randn(3, 7, 11, generator=G)
LABELS = torch.randint(0, 11, (3, 7), generator=G)


def test_next_token_shifts_and_ignores():
    labels = LABELS.clone()
    labels[0, 3:], labels[1, :2] = -100, -100
    expected = F.cross_entropy(LOGITS[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(loss.next_token(LOGITS, labels), expected)
    assert int(loss.predicted(labels).sum()) == int((labels[:, 1:] != -100).sum())
    assert float(loss.next_token(LOGITS, torch.full_like(labels, -100))) == 0.0


def test_next_token_is_that_of_transformers():
    from tiny import llama

    ids = torch.randint(0, 32, (2, 9), generator=G)
    answer = llama()(input_ids=ids, labels=ids)
    torch.testing.assert_close(loss.next_token(answer.logits, ids), answer.loss)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl(temperature):
    q, p = F.log_softmax(LOGITS / temperature, -1), F.log_softmax(OTHER / temperature, -1)
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(loss.kl(LOGITS, OTHER, temperature), expected.mean())
    mask = LABELS > 4
    torch.testing.assert_close(loss.kl(LOGITS, OTHER, temperature, mask), expected[mask].mean())
    assert float(loss.kl(LOGITS, LOGITS, temperature)) == 0.0


def test_kl_gradient_is_its_closed_form():
    student = LOGITS.double().requires_grad_()
    loss.kl(student, OTHER.double(), 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (OTHER.double() / 3).softmax(-1)) / 21
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-7, rtol=1e-5)


def split(teacher, k):
    """The k most probable outcomes of logits, their log-probabilities and that of the rest."""
    p = teacher.log_softmax(-1)
    top, index = p.topk(k, -1)
    return index, torch.cat([top, p.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)], -1)


def test_kl_of_all_outcomes_is_kl():
    torch.testing.assert_close(loss.kl_top(LOGITS, *split(OTHER, 11)), loss.kl(LOGITS, OTHER))
    mask = LABELS > 4
    torch.testing.assert_close(loss.kl_top(LOGITS, *split(OTHER, 11), mask), loss.kl(LOGITS, OTHER, 1.0, mask))
    torch.testing.assert_close(loss.kl_top(LOGITS, *split(OTHER, 10)), loss.kl(LOGITS, OTHER))        # a rest of one outcome is that outcome


@pytest.mark.parametrize("k", [1, 4])
def test_kl_of_the_top_lacks_only_the_divergence_within_the_rest(k):
    index, target = split(OTHER, k)
    gone = torch.full_like(LOGITS, 0.0).scatter(-1, index, -1e9)
    p, q = F.log_softmax(OTHER + gone, -1), F.log_softmax(LOGITS + gone, -1)
    within = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    expected = loss.kl(LOGITS, OTHER) - (target[..., -1].exp() * within).mean()
    torch.testing.assert_close(loss.kl_top(LOGITS, index, target), expected)
    assert float(expected) < float(loss.kl(LOGITS, OTHER)) - 1e-3


def test_kl_of_the_top_has_the_gradient_of_its_closed_form():
    index, target = split(OTHER.double(), 3)
    student = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss.kl_top(z, index, target), student)
    loss.kl_top(student, index, target).backward()
    q = student.detach().softmax(-1)
    rest = 1 - q.gather(-1, index).sum(-1, keepdim=True)
    others = q * (1 - target[..., -1:].exp() / rest)
    expected = others.scatter(-1, index, q.gather(-1, index) - target[..., :-1].exp()) / 21
    torch.testing.assert_close(student.grad, expected)


def test_kl_of_the_top_stays_finite_where_there_is_no_rest():
    index, target = torch.tensor([[0]]), torch.tensor([[0.0, -65504.0]]).half()
    sure = torch.tensor([[90.0, -90.0, -90.0]], requires_grad=True)                # 1 - q is 0 in fp32, the sum of the others is not
    value = loss.kl_top(sure, index, target)
    value.backward()
    assert float(value.detach()) == 0.0 and bool(sure.grad.isfinite().all())
    wrong = torch.tensor([[-90.0, 90.0, 0.0]], requires_grad=True)
    loss.kl_top(wrong, index, target).backward()
    torch.testing.assert_close(wrong.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_mse_and_cosine():
    torch.testing.assert_close(loss.mse(LOGITS, OTHER), F.mse_loss(LOGITS, OTHER))
    torch.testing.assert_close(loss.cosine(LOGITS, OTHER), (1 - F.cosine_similarity(LOGITS, OTHER, dim=-1)).mean())
    mask = LABELS > 4
    torch.testing.assert_close(loss.mse(LOGITS, OTHER, mask), F.mse_loss(LOGITS[mask], OTHER[mask]))


def test_losses_compute_in_fp32():
    assert loss.kl(LOGITS.bfloat16(), OTHER.bfloat16()).dtype == torch.float32
    assert loss.next_token(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def test_another_vocabulary_is_refused():
    with pytest.raises(RunError, match="teacher has 12 classes.*student 11"):
        loss.kl(LOGITS, torch.zeros(3, 7, 12))
