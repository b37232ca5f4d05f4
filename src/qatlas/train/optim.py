"""Optimizers as values: frozen specs that build a torch optimizer with one group for each role.

    weights     matrices, kernels, embeddings          decay
    norms       norms and biases                       no decay
    scales      scales, zeros, offsets of quantizers   no decay, a learning rate of their own where asked

Decay would pull a scale to zero, where it means nothing: a scale is a unit, not a size. Which parameters are trained is said by globs on their
names; a glob that fits none is an error, what no glob fits is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..core.error import RuleError, nearest
from ..core.noun import Noun
from .ranks import whole

STEPS = frozenset({"scale", "zero", "offset"})
ROLES = ("weights", "norms", "scales")


@dataclass(frozen=True)
class Optimizer(Noun):
    """What optimizers share: lr, decay of weights, and the learning rate of scales, one of
    scale_lr (None: lr), or scale_share, in units of each scale's own mean size at that step. Adam moves every number by its learning rate, however
    small the number is: the step of an 8-bit grid is a hundredth of its weights, and with their rate it would be lost within a few steps."""

    lr: float = 1e-4
    weight_decay: float = 0.0
    scale_lr: float | None = None
    scale_share: float | None = None

    def build(self, model: nn.Module, names: Mapping[nn.Parameter, str]) -> torch.optim.Optimizer:
        """A torch optimizer over `names` (parameter -> name, see `trained`), groups with `role` and `base_lr`."""
        return self.make(groups(model, names, self.lr, self.weight_decay, self.scale_lr, self.scale_share))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer over finished groups."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled decay (Loshchilov and Hutter, 2017, arXiv 1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]), eps=self.eps)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    lr: float = 1e-2
    momentum: float = 0.9
    nesterov: bool = False

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class BertAdam(Optimizer):
    """Adam as BERT's authors had it: no bias correction, so the first steps are larger by up to (1 - b1) / sqrt(1 - b2) = 3.2; decoupled decay; the
    gradient of each parameter cut to norm `clip` by itself (give `fit` clip=None). Source: google-research/bert, optimization.py."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    clip: float = 1.0

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Uncorrected(groups, {"lr": self.lr, "betas": self.betas, "eps": self.eps, "clip": self.clip})


class Uncorrected(torch.optim.Optimizer):
    """w <- w - lr (m / (sqrt(v) + eps) + decay w), m and v running means of the gradient and its square from zero. What has no gradient rests."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                nn.utils.clip_grad_norm_([p], group["clip"])
                m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, v.sqrt().add_(group["eps"]), value=-lr)


def trained(model: nn.Module, train: str | Sequence[str]) -> dict[nn.Parameter, str]:
    """The parameters that a glob or some globs fit -> their first names. Tied parameters are found under each of their names.

    Raises:
        RuleError: a glob that fits nothing, with the nearest names.

    >>> list(trained(nn.Linear(2, 2), "*bias").values())
    ['bias']
    """
    patterns = [train] if isinstance(train, str) else list(train)
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            close = nearest(pattern, [name for name, _ in named]) or [name for name, _ in named[:3]]
            raise RuleError(f"train={pattern!r} fits no parameter.\n  nearest names: {', '.join(close)}\n"
                            "  A pattern that fits nothing would leave parameters frozen unseen; take it out or mend the name.")
    wanted = {id(p) for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return {p: name for name, p in model.named_parameters() if id(p) in wanted}


def role(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """weights, norms or scales."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in STEPS and (hasattr(module, "quant") or hasattr(module, "qtensor")):         # a Quantizer or a packed layer, not a norm's gain
        return "scales"
    return "norms" if parameter.dim() < 2 else "weights"


def groups(model: nn.Module, names: Mapping[nn.Parameter, str], lr: float, weight_decay: float,
           scale_lr: float | None = None, scale_share: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups by role, in the order of ROLES; empty ones are left out. With scale_share each scale is its own group, marked `relative`."""
    members: dict[str, list[nn.Parameter]] = {name: [] for name in ROLES}
    for parameter, name in names.items():
        members[role(model, name, parameter)].append(parameter)
    rate = {"weights": lr, "norms": lr, "scales": lr if scale_lr is None else scale_lr}
    decay = {"weights": weight_decay, "norms": 0.0, "scales": 0.0}
    shares = [{"params": [p], "role": "scales", "lr": scale_share, "base_lr": scale_share, "weight_decay": 0.0, "relative": True,
               "unit": unit(model, names[p])} for p in (members.pop("scales") if scale_share is not None else ())]
    return [
        {"params": found, "role": kind, "lr": rate[kind], "base_lr": rate[kind], "weight_decay": decay[kind]}
        for kind, found in members.items() if found
    ] + shares


def unit(model: nn.Module, name: str) -> torch.Tensor:
    """What a scale, zero or offset is measured in: an offset moves in steps, a zero in codes, which are 1."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return torch.ones(1) if leaf == "zero" else module.scale if isinstance(module.scale, nn.Parameter) else model.get_parameter(name)


@torch.no_grad()
def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """The learning rates of a step: each group's own times the schedule's factor; a relative one times the mean size of its scale."""
    for group in optimizer.param_groups:
        size = float(whole(group["unit"]).abs().mean()) if group.get("relative") else 1.0
        group["lr"] = group["base_lr"] * factor * size


@contextmanager
def only(optimizer: torch.optim.Optimizer, roles: tuple[str, ...] | None) -> Iterator[None]:
    """Inside, the optimizer sees the gradients of groups of these roles only; None is all."""
    hidden = [(p, p.grad) for g in optimizer.param_groups if roles is not None and g["role"] not in roles for p in g["params"]]
    for parameter, _ in hidden:
        parameter.grad = None
    yield
    for parameter, grad in hidden:
        parameter.grad = grad
