"""Weights drawn anew: a model as its class would build it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.error import RunError


@torch.no_grad()
def renew(model: nn.Module, seed: int) -> None:
    """Draw all weights anew, in place: those of a second model of the same class and configuration, built under this seed.

    Raises:
        RunError: a model without a configuration to build another from.
    """
    if not isinstance(model, PreTrainedModel):
        raise RunError(f"scratch=True draws weights as the model's class does, from its configuration; {type(model).__name__} is not a model of "
                       "transformers. Build it anew yourself, and train with scratch=False")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: Any = type(model)(copy.deepcopy(model.config))
    model.load_state_dict(fresh.state_dict())
