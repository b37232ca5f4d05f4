"""Error compensation: round a weight column by column, and let the columns that are left take up what rounding did to the output.

Elias Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, after Optimal Brain Surgeon. With inputs x and H = 2/n sum x x^T, an error e of the
weight costs e H e^T of the layer's output. Some of what rounding column j costs can be made good in the columns behind it:

    U = upper Cholesky factor of (H + damp mean(diag H) I)^-1
    e = (w_j - q_j) / U_jj,     w_k <- w_k - e U_jk   for k > j

`Hessian` gathers H, `factor` gives U, `compensate` does the rounding with any `snap`, elementwise or not. What comes back is the weight as it was
when its turn came, whose rounding is the result: a quantizer with the same places gives the same codes. With H a multiple of I nothing is moved.

w^2 / U_jj^2 is what rounding w to zero would cost, columns before it being fixed: the saliency of SparseGPT and PB-LLM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .error import QuantError


class Hessian:
    """2/n sum of x x^T over sequences, (in, in), in double precision: rounding is felt in the inverse."""

    def __init__(self, width: int) -> None:
        self.total, self.count = torch.zeros(width, width, dtype=torch.float64), 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x (sequences, tokens, in), or one sequence (tokens, in)."""
        flat = x.detach().reshape(-1, x.shape[-1]).double().cpu()
        self.total += 2 * flat.T @ flat
        self.count += x.shape[0] if x.dim() > 2 else 1

    @property
    def value(self) -> Tensor:
        """H.

        Raises:
            QuantError: nothing was added.
        """
        if not self.count:
            raise QuantError("a layer saw no input, so there is no Hessian: it is never called on these batches; keep it in full precision")
        return self.total / self.count


def factor(h: Tensor, damp: float = 0.01) -> Tensor:
    """U, (in, in), upper, in double precision. A column that no input reaches counts as one by itself; its weight should be zero.

    >>> factor(torch.eye(2) * 4, damp=0.0).diagonal()
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    h = h.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(damp * h.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise QuantError(f"a Hessian of {len(h)} inputs is not positive definite; give more batches, or more damp than {damp:g}")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


@torch.no_grad()
def compensate(w: Tensor, u: Tensor, snap: Callable[[int, Tensor], Tensor], *, block: int = 128) -> Tensor:
    """The weight (out, in) as each column was when its turn came.

    u: of `factor`. snap: number and content of a column, (out,) -> its rounded values. block: columns whose effect on the rest is summed up first.

    >>> u = factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damp=0.0)
    >>> compensate(torch.tensor([[0.4, 0.4]]), u, lambda j, column: column.round())
    tensor([[0.4000, 0.6000]])
    """
    if u.shape != (w.shape[1], w.shape[1]):
        raise QuantError(f"a factor of shape {tuple(u.shape)} does not belong to a weight of shape {tuple(w.shape)}")
    left, turned = w.double().clone(), torch.empty_like(w)
    u = u.to(left.device)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.zeros_like(left[:, first:last])
        for j in range(first, last):
            column = left[:, j].to(w.dtype)
            turned[:, j] = column
            error = (left[:, j] - snap(j, column).double()) / u[j, j]
            left[:, j:last] -= error[:, None] * u[j, j:last]
            errors[:, j - first] = error
        left[:, last:] -= errors @ u[first:last, last:]
    return turned
