"""What is minimised: plain functions of tensors, in fp32 whatever comes in.

Each returns a mean, so that losses of unequal batches may be weighted by what they were a mean over (see Task.weight). Distributions are compared as
in Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531:

    kl = T^2 sum_k p_k (log p_k - log q_k),    p = softmax(teacher / T),  q = softmax(student / T)

The factor T^2 keeps the gradient's size while the temperature changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.error import RunError

IGNORE = -100                                                     # the label that is not counted: PyTorch's and transformers' own


def predicted(labels: Tensor) -> Tensor:
    """Which positions of (batch, tokens) predict a counted label: (batch, tokens), the last column always False.

    >>> predicted(torch.tensor([[5, 6, -100]]))
    tensor([[ True, False, False]])
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE
    return mask


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token given those before it, in nats: a mean over labels that are not -100; 0 where there is none.

    logits (batch, tokens, vocabulary); labels (batch, tokens) are the input ids themselves: the shift by one happens here.

    >>> next_token(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
    tensor(1.3863)
    """
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] in nats, a mean over labels that are not -100; 0 where there is none. logits (n, classes), labels (n,).

    >>> cross_entropy(torch.zeros(2, 2), torch.tensor([0, -100]))
    tensor(0.6931)
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Forward Kullback-Leibler divergence of the student from the teacher times temperature^2, in nats, a mean over positions.

    student, teacher (..., classes); mask (...), True where a position counts.

    Raises:
        RunError: another number of classes: the two do not share a vocabulary.

    >>> kl(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    tensor(0.)
    """
    same_classes(student, teacher)
    q = F.log_softmax(student.float() / temperature, -1)
    p = F.log_softmax(teacher.float() / temperature, -1)
    each = (p.exp() * (p - q)).sum(-1) * temperature**2            # (...)
    return average(each, mask)


def soft_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """-sum_k p_k log q_k with p the teacher's and q the student's probabilities, a mean over positions: kl plus the teacher's entropy, with the same
    gradient. Shapes as in `kl`.

    Raises:
        RunError: another number of classes.

    >>> soft_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.6931)
    """
    same_classes(student, teacher)
    each = -(F.softmax(teacher.float(), -1) * F.log_softmax(student.float(), -1)).sum(-1)
    return average(each, mask)


def kl_top(student: Tensor, index: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """`kl` from a teacher of which only the k most probable outcomes are known, and the mass of all the rest as one outcome more:

        sum_k p_k (log p_k - log q_k)  +  p_rest (log p_rest - log q_rest),      q_rest = sum of all other q

    in nats, a mean over positions. It is `kl` less p_rest times the divergence within the rest, hence never more than `kl`, and `kl` itself where k
    is all. There is no temperature: the rest cannot be tempered. fp64 stays fp64.

    student (..., classes): logits. index (..., k): the outcomes. target (..., k + 1): their log-probabilities, the last one is the rest's; they are
    normalised here, since rounding has moved their sum. mask (...), True where a position counts.

    >>> kl_top(torch.zeros(1, 4), torch.tensor([[2]]), torch.tensor([[0.25, 0.75]]).log()).abs() < 1e-6
    tensor(True)
    """
    z = student if student.dtype == torch.float64 else student.float()
    nothing = torch.finfo(z.dtype).min                            # finite: 0 times infinity is NaN
    rest = z.scatter(-1, index, nothing).logsumexp(-1, keepdim=True)                          # (..., 1): of the others, never 1 - sum of the k
    q = F.log_softmax(torch.cat([z.gather(-1, index), rest], -1), -1)
    p = F.log_softmax(target.to(z.dtype).clamp(min=nothing), -1)
    return average((p.exp() * (p - q)).sum(-1), mask)


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference. student, teacher (..., features); mask (...), True where a position counts.

    >>> mse(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(1.)
    """
    return average((student.float() - teacher.float()).square().mean(-1), mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine similarity along the last dimension, a mean over positions. Shapes as in `mse`.

    >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor(1.)
    """
    return average(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def average(each: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of `each` (...) where `mask` (...) is True; 0 where it is True nowhere."""
    if mask is None:
        return each.mean()
    return (each * mask).sum() / mask.sum().clamp(min=1)


def same_classes(student: Tensor, teacher: Tensor) -> None:
    """Raise RunError unless both end in the same number of classes."""
    if student.shape[-1] != teacher.shape[-1]:
        raise RunError(f"the teacher has {teacher.shape[-1]} classes (or tokens), the student {student.shape[-1]}: "
                       "distillation needs one vocabulary; take a teacher of the same family, or train without one")
