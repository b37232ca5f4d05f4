"""Fitting a plan to a target: every layer's numbers are moved onto what the artefact stores, or refused by name.

A weight's Quant takes the target's scale type; that of embeddings and head another type of the format where the target's own cannot hold them. Inputs
move only where the format says how inputs are quantized; such a format says all, so what it has no place for (outputs, signals inside attention) is
refused. The grain stays as it was asked for: a target never changes a method in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ..core.error import FormatError
from ..core.quantizer import Quant
from ..export import target as find_target
from ..export.able import Numbers
from ..export.able import nearest as nearest_scheme
from ..layers.experts import QStack
from ..layers.linear import QTransposed
from ..layers.quantized import Quantized, Slots
from ..layers.rows import Rows
from . import fused
from .roles import Role, roles


def fitted(model: nn.Module, layers: Mapping[str, type[Quantized]], plan: Mapping[str, Slots], inside: Mapping[str, Mapping[str, Quant]],
           target: str) -> dict[str, Slots]:
    """The plan in the target's numbers.

    layers: name -> the quantized layer that will stand there. plan: name -> Slots. inside: attention module -> signal -> Quant.

    Raises:
        FormatError: with the first tensor that the target cannot hold, and how many more.
    """
    form, kind = find_target(target)
    role, out, refused = roles(model), {}, {}
    says_all = hasattr(form, "fit_input")
    for address in (f"{name}:{signal}" for name, signals in inside.items() for signal in signals) if says_all else ():
        refused[address] = FormatError(f"{target} has no place for a quantized signal inside attention; leave it out, or the target")
    for name, slots in plan.items():
        if layers[name] is QStack:
            refused[name] = FormatError(f"{target} has no place for a stack of experts that we write; keep it full (keep_full({name!r})), or leave "
                                        "out the target: the packed directory holds it")
            continue
        if slots.norm is not None:
            refused[name] = FormatError(f"{target} holds weights, and has no place for the norm that the rules put in front of this layer; leave "
                                        "out the norm, or the target")
            continue
        if slots.transform is not None:
            refused[name] = FormatError(f"{target} holds weights, and has no place for the {type(slots.transform).__name__} transform of this "
                                        "layer's inputs; leave out the transform, or the target")
            continue
        if reason := next(filter(None, (form.why_not_signal(quant, kind) for quant in (slots.input, slots.output) if quant is not None
                                        and hasattr(form, "why_not_signal"))), None):
            refused[name] = FormatError(f"{target} cannot hold this layer's quantized activations: {reason}. Take static ones (w4a8-static, "
                                        "static=True), or a target that leaves them out")
            continue
        weight: Any = model.get_submodule(name).weight
        shape = tuple(weight.T.shape if layers[name] is QTransposed else weight.shape)
        try:
            if says_all and slots.output is not None:
                raise FormatError(f"{target} has no place for a quantized output; leave it out, or the target")
            if several := getattr(slots.weight, "several", ""):
                raise FormatError(f"{target} cannot hold a tensor of shape {shape} under {slots.weight.label}: {several}")  # type: ignore[union-attr]
            body = not role.get(name, set()) & {Role.EMBEDDING, Role.HEAD}
            moved = None if slots.weight is None else fused.fit(slots.weight, shape, partial(_move, form, kind, body))
            entry = form.fit_input(slots.input, kind, moved, shape, layers[name].replaces.__name__) if says_all else slots.input
            out[name] = slots.but(weight=moved, input=entry)
        except FormatError as error:
            refused[name] = error
    if refused:
        first, more = next(iter(refused)), list(refused)[1:]
        also = f"\n  refused as well: {len(more)} more layers ({', '.join(more[:3])}{', ...' if more[3:] else ''})" if more else ""
        lone = first in plan and plan[first].norm is None and plan[first].transform is None
        known = lone and layers[first] is not QStack              # no signal's address, no layer that no scheme would help
        asked = _asked(model, first, plan[first], layers[first], role) if known else None
        raise FormatError(f"{first}: {_instead(str(refused[first]), asked, target)}{also}") from None
    return out


def _asked(model: nn.Module, name: str, slots: Slots, layer: type[Quantized], role: Mapping[str, set[Role]]) -> Numbers:
    """What is said about a layer, as a question to a target."""
    weight: Any = model.get_submodule(name).weight
    shape = tuple(weight.T.shape if layer is QTransposed else weight.shape)
    quant = next((part for part in slots.weight.parts if part), None) if isinstance(slots.weight, Rows) else slots.weight
    return Numbers(quant, slots.input, slots.output, shape, layer.replaces.__name__, not role.get(name, set()) & {Role.EMBEDDING, Role.HEAD})


def _instead(message: str, asked: Numbers | None, target: str) -> str:
    """A refusal with the nearest scheme that the target holds, found by asking."""
    if asked is None:
        return message
    near = nearest_scheme(asked, target)
    said = f"nearest scheme that {target} holds at this shape: {near}" if near else f"{target} holds no scheme of ours here: keep it full"
    return f"{message.partition('; nearest scheme for')[0]}\n  {said}"


def _move(form: Any, kind: str, body: bool, quant: Quant, shape: tuple[int, ...]) -> Quant:
    moved: Quant = form.fit(quant, kind, shape, body)
    return moved
