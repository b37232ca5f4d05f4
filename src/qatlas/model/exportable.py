"""can_export: for every tensor yes, or no with the reason and the nearest scheme that can.

    can_export(model, "gguf:q4_0")            a packed model, by its values; one in training, by what its Quants say: whatever they give will fit
    can_export("w4-g64", "gguf:q4_0")         a scheme, or a list of rules, of matrices of some shape: what `quantize(model, rules, target=...)` takes

Every answer is the target's own: its `why_not`, its `fit`, and for a packed model its `plan`, which has the last word, since it is what the writer
asks. See export.able for how the nearest scheme is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.error import QatlasError, QuantError
from ..core.quantizer import Quant
from ..export import able, targets
from ..export import target as find_target
from ..export.able import Numbers
from ..layers.packed import Packed, PackedEmbedding
from ..layers.quantized import Layer, Quantized
from ..layers.rows import Rows
from . import inner
from .pack import checkpoint
from .roles import Role, roles
from .rules import Rule, of_scheme


@dataclass(frozen=True)
class Answer:
    """Of one tensor, or of one rule, or (name "") of the whole model. reason: None where the target holds it. scheme: the nearest that it holds at
    this shape; targets: those of all formats that hold these numbers, if one trains for them."""

    name: str
    shape: tuple[int, ...] = ()
    reason: str | None = None
    scheme: str | None = None
    targets: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether the target holds it."""
        return self.reason is None

    def __str__(self) -> str:
        if self.held:
            return f"{self.name or 'the model'}: yes"
        instead = f"; nearest scheme that it holds: {self.scheme}" if self.scheme else ""
        others = f"; targets that hold these numbers: {', '.join(self.targets)}" if self.targets else ""
        return f"{self.name or 'the model'}: no, {self.reason}{instead}{others}"


def can_export(what: nn.Module | str | Sequence[Rule], target: str, shape: tuple[int, ...] = (4096, 4096)) -> list[Answer]:
    """Whether a target holds a quantized model, or what rules would make.

    what: a quantized model, in training or packed; a scheme; a list of rules. shape: of the matrices, where there are only rules.

    Raises:
        FormatError: a target that does not exist. QuantError: a model without quantized layers.

    >>> print(*can_export("w1.58", "gguf:tq2_0"))
    *: yes
    >>> print(can_export("w3-g64", "onnx:int2", (8, 64))[0].held, can_export("w4-g64", "gguf:tq2_0")[0].scheme)
    True w1.58-g256
    """
    find_target(target)
    if isinstance(what, nn.Module):
        return _of_model(what, target)
    rules = of_scheme(what) if isinstance(what, str) else what
    found = []
    for rule in rules:
        said = {slot: quant for slot, quant in rule.said().items() if isinstance(quant, Quant)}
        if said:
            numbers = Numbers(said.get("weight"), said.get("input"), said.get("output"), shape)
            found.append(_answer(rule.where, numbers, able.refusal(numbers, target), target))
    return found


def holders(model: nn.Module) -> list[str]:
    """The targets that hold the numbers of every layer of a model, if one trains for them."""
    asked = {numbers for name, layer in _layers(model).items() for numbers in _numbers(model, name, layer)}
    return [name for name in targets() if all(able.refusal(numbers, name) is None for numbers in asked)
            and all(answer.held for answer in _signals(model, name))]


def _of_model(model: nn.Module, target: str) -> list[Answer]:
    layers = _layers(model)
    if not layers:
        raise QuantError(f"this {type(model).__name__} has no quantized layer; quantize(model, rules) comes first")
    found = _signals(model, target)
    for name, layer in layers.items():
        asked = _numbers(model, name, layer)
        reasons = [_refused(layer, numbers, target) for numbers in asked]
        at = next((i for i, reason in enumerate(reasons) if reason), 0)
        found.append(_answer(f"{name}.weight", asked[at], reasons[at], target))
    packed = all(isinstance(layer, Packed) or layer.slots.weight is None for layer in layers.values())
    return _last_word(model, found, target) if packed else found


def _last_word(model: nn.Module, found: list[Answer], target: str) -> list[Answer]:
    """What the writer itself says of the whole."""
    form, kind = find_target(target)
    try:
        form.plan(checkpoint(model), kind) if hasattr(form, "plan") else None
    except QatlasError as error:
        return found if any(not answer.held for answer in found) else [*found, Answer("", reason=str(error))]
    return [Answer(answer.name, answer.shape) for answer in found] if hasattr(form, "plan") else found


def _refused(layer: Any, numbers: Numbers, target: str) -> str | None:
    form, kind = find_target(target)
    if layer.norm is not None:
        return "a norm stands in front of the layer, which no exported weight contains"
    if layer.transform is not None:
        return "its inputs are transformed in front of the product, which no exported weight contains"
    if (reason := able.refusal(numbers, target)) is not None or numbers.weight is None:
        return reason
    if isinstance(layer, Packed):
        q = layer.qtensor()
        reason = form.why_not(q, kind, tuple(q.shape))
    else:
        reason = able.unmoved(numbers, target)
    free = not numbers.body and able.refusal(dataclasses.replace(numbers, body=True), target) is not None
    return None if free else reason                               # embeddings and heads may take another type of the format


def _answer(name: str, numbers: Numbers, reason: str | None, target: str) -> Answer:
    if reason is None:
        return Answer(name, numbers.shape)
    return Answer(name, numbers.shape, reason, able.nearest(numbers, target), tuple(able.holders(numbers)))


def _layers(model: nn.Module) -> dict[str, Any]:
    """Name -> quantized layer, each once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}


def _signals(model: nn.Module, target: str) -> list[Answer]:
    """Of each quantized signal inside attention. A format that says nothing of activations leaves them out."""
    form, kind = find_target(target)
    found = []
    for address, quantizer in inner.installed(model).items():
        reason = form.why_not_signal(quantizer.quant, kind) if hasattr(form, "why_not_signal") else None
        if hasattr(form, "fit_input"):
            reason = "it has no place for a quantized signal inside attention"
        found.append(Answer(address, (), reason))
    return found


def _numbers(model: nn.Module, name: str, layer: Any) -> list[Numbers]:
    """What is said about a layer: one, or one for each part of its rows."""
    weight, head = layer.slots.weight, getattr(model, "get_output_embeddings", lambda: None)()
    shape = tuple(layer.store.shape if isinstance(layer, Packed) else layer.matrix().shape)
    outside = isinstance(layer, PackedEmbedding) or layer is head or bool(roles(model).get(name, set()) & {Role.EMBEDDING, Role.HEAD})
    module = layer.replaces.__name__ if isinstance(layer, Quantized) else type(layer).__name__.removeprefix("Packed")
    parts = weight.parts if isinstance(weight, Rows) else (weight,)
    shape = (shape[0] // len(parts), *shape[1:])
    return [Numbers(part, layer.slots.input, layer.slots.output, shape, module, not outside) for part in parts]
