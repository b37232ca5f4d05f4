"""Role: what a tensor is for, asked of any model in the same words, so that rules need not know names.

    EMBEDDING    tables of tokens and positions, and a vision model's patch projection
    HEAD         the output embeddings of a language model
    CLASSIFIER   the layers on top of a transformers model's body; the last layer of any other model
    LINEAR CONV  every matrix product (experts' stacks too), every convolution
    ROUTER       what sends tokens to experts: the matrix beside them with one row for each
    ATTENTION    the modules whose inner signals have addresses ("@attention:key"); see signals.py

transformers' models are asked (`get_input_embeddings`, `get_output_embeddings`, `base_model_prefix`); other modules are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.attention import attends
from ..layers.experts import Experts, Stack, stacked


class Role(StrEnum):
    """A role, written in rules as its value."""

    EMBEDDING = "@embedding"
    HEAD = "@head"
    CLASSIFIER = "@classifier"
    LINEAR = "@linear"
    CONV = "@conv"
    ATTENTION = "@attention"
    ROUTER = "@router"


def roles(model: nn.Module) -> dict[str, set[Role]]:
    """Module name -> its roles, for the modules that have any.

    >>> sorted(roles(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))["1"])
    [<Role.CLASSIFIER: '@classifier'>, <Role.LINEAR: '@linear'>]
    """
    found: dict[str, set[Role]] = {}
    weighted = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.modules.conv._ConvNd)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[name] = {Role.EMBEDDING}
    for name, module in weighted:
        found[name] = {Role.CONV if isinstance(module, nn.modules.conv._ConvNd) else Role.LINEAR}
    for name in _head(model):
        found.setdefault(name, set()).add(Role.HEAD)
    for name in _patches(model):
        found.setdefault(name, set()).add(Role.EMBEDDING)
    for name in _classifiers(model, weighted):
        found.setdefault(name, set()).add(Role.CLASSIFIER)
    for name, module in model.named_modules():
        if attends(module):
            found.setdefault(name, set()).add(Role.ATTENTION)
        if isinstance(module, Stack):
            found.setdefault(name, set()).add(Role.LINEAR)
    for name in _routers(model):
        found.setdefault(name, set()).add(Role.ROUTER)
    return found


def ask(model: nn.Module, question: str) -> Any:
    """The module that transformers answers with, or None."""
    method = getattr(model, question, None)
    try:
        return method() if method is not None else None
    except NotImplementedError:
        return None


def _head(model: nn.Module) -> list[str]:
    head = ask(model, "get_output_embeddings")
    return [name for name, module in model.named_modules() if head is not None and module is head]


def _routers(model: nn.Module) -> list[str]:
    found, modules = [], dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, Experts) or stacked(module):
            around = name.rpartition(".")[0]
            experts = module.num_experts if isinstance(module, Experts) else len(module.gate_up_proj)
            for beside, part in modules[around].named_children():
                weight = getattr(part, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == experts:
                    found.append(f"{around}.{beside}".lstrip("."))
    return found


def _patches(model: nn.Module) -> list[str]:
    """The convolutions inside a vision model's input embeddings."""
    inputs = ask(model, "get_input_embeddings")
    if inputs is None:
        return []
    inner = {id(module) for module in inputs.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    return [name for name, module in model.named_modules() if id(module) in inner]


def _classifiers(model: nn.Module, weighted: Sequence[tuple[str, nn.Module]]) -> list[str]:
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        head = set(_head(model))
        return [name for name, _ in weighted if not name.startswith(prefix + ".") and name not in head]
    if hasattr(model, "config"):                                  # a bare transformers body ends in hidden states, not in classes
        return []
    return [weighted[-1][0]] if weighted else []
