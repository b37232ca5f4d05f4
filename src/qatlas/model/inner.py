"""Quantizers inside attention, from rules into the model, into a file and back.

A rule reaches them by address, "*.self_attn:key" or "@attention:probabilities", slot `signal`. They stand in the attention module as its children
(`self_attn.key_quantizer`), so that calibration, describe, a teacher with quantizers off and a checkpoint find them like any other; and the model is
switched to our attention for good, with a configuration of its own.

On disk they are `signals` of quantization_config: {address: {"quant", "state": name -> shape}}, and their state under their module's name. A packed
model computes with them, bit for bit as before; exported weights do not contain them, as they do not contain the quantizers of inputs.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from ..core.error import CheckpointError, QuantError, RuleError
from ..core.noun import from_json
from ..core.quantizer import Quant, Quantizer
from ..layers import attention
from ..layers.cache import SIDES
from .serving import serve
from .signals import SHOWN, attentions, find, keep


def fitted(name: str, said: Mapping[str, Any]) -> dict[str, Quant]:
    """What the rules say of one attention module: signal -> Quant, fit for its place; full precision left out.

    Raises:
        QuantError: numbers that cannot work there, with the address.
    """
    out = {}
    for signal in attention.SLOTS:
        if isinstance(quant := said.get(signal), Quant):
            try:
                out[signal] = attention.fitted(signal, quant)
            except QuantError as error:
                raise QuantError(f"{name}:{error}") from None
    return out


def lacking(model: nn.Module, address: str) -> RuleError:
    """Why a rule with this address reaches no quantizer."""
    try:
        first = find(model, address)[0]
    except RuleError as error:
        return error
    return RuleError(f"{address!r}: {first.address} can be read and overridden, but has no quantizer. Rules reach the input and output of layers, "
                     f"and {', '.join(attention.QUANTIZED)} inside attention")


def install(model: nn.Module, plan: Mapping[str, Mapping[str, Quant]]) -> None:
    """Put quantizers into attention: module name -> signal -> Quant, as `fitted` gives them."""
    for name, quants in plan.items():
        attention.attach(model.get_submodule(name), dict(quants))
    if plan:
        keep(model)
        serve(model)


def whole(model: nn.Module, plan: Mapping[str, Mapping[str, Quant]], full: Container[str]) -> None:
    """See that no attention would go on storing full precision where the plan quantizes keys or values.

    Raises:
        RuleError: a module that stores keys and values outside of AttentionInterface, and that no rule keeps full.
    """
    storing = any(side in quants for quants in plan.values() for side in SIDES)
    for name, module in model.named_modules() if storing else ():
        if attention.remembers(module) and not attention.attends(module) and name not in full:
            raise RuleError(f"{name}: {type(module).__name__} stores keys and values and does not go through transformers' AttentionInterface, so "
                            f"they cannot be quantized as the rules say; keep_full({name!r}) leaves this module as it is")


def installed(model: nn.Module) -> dict[str, Quantizer]:
    """Address -> Quantizer, for all that stand inside attention."""
    return {f"{name}:{signal}": q for name, module in model.named_modules() for signal, q in attention.attached(module).items()}


def metas(model: nn.Module) -> dict[str, Any]:
    """Address -> JSON of each quantizer inside attention: its Quant, and the shapes of what it holds."""
    return {address: {"quant": q.quant.to_json(), "state": {name: list(t.shape) for name, t in q.state_dict().items()}}
            for address, q in installed(model).items()}


def blank(model: nn.Module, found: Mapping[str, Any]) -> dict[str, Quantizer]:
    """Address -> an empty Quantizer for each meta; the model stays as it is.

    Raises:
        CheckpointError: a module that the model lacks or that has no attention, a meta that makes no quantizer.
    """
    around, out = attentions(model), {}
    for address, meta in found.items():
        name, _, signal = address.partition(":")
        if name not in around or signal not in attention.SLOTS:
            raise CheckpointError(f"the file has a quantizer at {address!r}, which {type(model).__name__} lacks; modules with attention: "
                                  f"{', '.join(list(around)[:SHOWN]) or 'none'}. The file belongs to another model or another version of it")
        try:
            with torch.device("cpu"):
                out[address] = from_json(meta["quant"]).build()
                out[address].load_state_dict({key: torch.ones(shape) for key, shape in meta["state"].items()})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, QuantError) as error:
            raise CheckpointError(f"the description of the quantizer at {address!r} cannot be read ({type(error).__name__}: {error}); "
                                  "config.json was edited, or written by another version of qatlas") from None
    return out


def expected(quantizers: Mapping[str, Quantizer]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that quantizers at these addresses hold in a model's state."""
    return {f"{address.replace(':', '.')}_quantizer.{name}": tuple(t.shape)
            for address, q in quantizers.items() for name, t in q.state_dict().items()}


def put(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
    """Set the quantizers of `blank` into the model."""
    for address, quantizer in quantizers.items():
        name, _, signal = address.partition(":")
        module = model.get_submodule(name)
        device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        setattr(module, f"{signal}_quantizer", quantizer.to(device).train(model.training))
    if quantizers:
        keep(model)
        serve(model)
