"""The quantized layers of a model: which there are, which there could be, and how they are put in place.

A layer stands in its module's place under the same name and shares its parameters; layers that share a weight share its quantizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import QuantError, RuleError
from ..core.quantizer import Quantizer
from ..layers.conv import QConv1d, QConv2d
from ..layers.embedding import QEmbedding
from ..layers.experts import QStack
from ..layers.linear import QLinear, QTransposed
from ..layers.quantized import Quantized, Slots

LAYERS: tuple[type[Quantized], ...] = (QLinear, QTransposed, QConv1d, QConv2d, QEmbedding, QStack)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Name -> Quantizer, for all of them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def quantized(model: nn.Module) -> dict[str, Quantized]:
    """Name -> trainable quantized layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def reachable(model: nn.Module) -> dict[str, type[Quantized]]:
    """Module name -> the quantized layer that can stand in its place. A subclass or a module with a forward of its own (hooks of
    accelerate's device maps), or one whose weight is computed (weight_norm), is not reachable."""
    found = {}
    for name, module in model.named_modules():
        for layer in LAYERS:
            plain = type(module).forward is layer.replaces.forward and "forward" not in module.__dict__ and "weight" in module._parameters
            if isinstance(module, layer.replaces) and plain:
                found[name] = layer
    return found


def check_tied(model: nn.Module, plan: dict[str, Slots]) -> None:
    """Refuse what layers that share one weight cannot be given.

    Raises:
        RuleError: different numbers, or a frozen store.
    """
    owners: dict[int, list[str]] = {}
    for name in reachable(model):
        weight = getattr(model.get_submodule(name), "weight", None)
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    for names in owners.values():
        all_said = [plan.get(name, Slots()) for name in names]
        said = {(slots.weight, slots.transform, slots.adapter) if slots.weight is not None else None for slots in all_said}
        if len(said) > 1:                                         # one quantizer serves them all, so they must show it the same tensor
            raise RuleError(f"{' and '.join(names)} share one weight but the rules give them different numbers; "
                            "give both the same Quant, transform and adapter, or untie them")
        if len(names) > 1 and any(slots.frozen is not None for slots in all_said):
            raise RuleError(f"{' and '.join(names)} share one weight, which cannot be frozen for each by itself; untie them, or keep them full")


def replace(model: nn.Module, plan: dict[str, Slots], peak: dict[str, Tensor]) -> None:
    """Put the quantized form of each layer of the plan in its place. peak: layer -> the largest of each of its inputs' features.

    Raises:
        QuantError: numbers that cannot work, with the layer's name.
    """
    layers, made = reachable(model), {}
    shared: dict[int, Any] = {}
    for name, slots in plan.items():
        module = model.get_submodule(name)
        try:
            made[name] = layers[name].of(module, slots, peak.get(name))
        except QuantError as error:
            raise QuantError(f"{name}: {error}") from None
        first = shared.setdefault(id(module.weight), made[name])
        made[name].weight_quantizer = first.weight_quantizer      # tied weights share one quantizer
    for name, layer in made.items():
        old = model.get_submodule(name)
        for parent in model.modules():
            for child, part in parent._modules.items():
                if part is old:
                    parent._modules[child] = layer


@torch.no_grad()
def untie(model: nn.Module) -> nn.Module:
    """Give the output embeddings a copy of their own, so that they and the input embeddings may get different numbers."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return model
