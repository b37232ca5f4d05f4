"""Twins: two batch norms in one place, for two networks that share their weights, one in low and one in full precision."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Twin(nn.Module):
    """Two batch norms in one place: `low` for the low-bit network, `high` for full precision. at: which one is asked, low or high."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.high, self.low, self.at = norm, copy.deepcopy(norm), "low"

    def forward(self, x: Tensor) -> Tensor:
        return (self.low if self.at == "low" else self.high)(x)  # type: ignore[no-any-return]


def pair(model: nn.Module) -> list[Twin]:
    """Put a Twin in the place of each batch norm; a norm that was trained is the start of both."""
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(parent, Twin):
                found.append(Twin(child))
                setattr(parent, name, found[-1])
    return found


def part(model: nn.Module) -> None:
    """Put the low-bit norm of each Twin into its place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Twin):
                setattr(parent, name, child.low)
