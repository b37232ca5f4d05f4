"""Rows of a fused projection, by address: "*.c_attn[q]", "[k]" and "[v]" are the rows of GPT-2's one matrix for query, key and value.

    quantize(model, [Rule("*.c_attn[v]", weight=w8), Rule("*", weight=w4)])          # the first rule that speaks of a part wins, as ever

Only `weight` has rows: input and output are one tensor for all three. Only matrices whose rows are known to lie one below the other in equal parts
have these addresses: the Conv1D `c_attn` of self-attention. Other fused matrices (Phi-3's qkv_proj, GPT-NeoX's interleaved heads) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.quantizer import Quant
from ..layers.rows import Rows
from .signals import attentions

PARTS = ("q", "k", "v")
FORM = re.compile(r"(.*)\[([qkv])\]", re.DOTALL)


def parse(where: str) -> tuple[str, str]:
    """A rule's glob, and the part of the rows that it names, or nothing.

    >>> parse("*.c_attn[q]"), parse("model.layers.[01]")
    (('*.c_attn', 'q'), ('model.layers.[01]', ''))
    """
    match = FORM.fullmatch(where)
    return (match[1], match[2]) if match else (where, "")


def sliceable(model: nn.Module) -> set[str]:
    """The names of the matrices whose rows have addresses."""
    found = set()
    for one in attentions(model).values():
        module = None if one.fused is None else model.get_submodule(one.fused)
        if isinstance(module, Conv1D) and one.fused.endswith("c_attn") and module.weight.shape[1] == 3 * module.weight.shape[0]:  # type: ignore
            found.add(str(one.fused))
    return found


def lacking(model: nn.Module, where: str) -> str:
    """Why a rule for rows reaches none."""
    there = ", ".join(sorted(sliceable(model))[:3]) or "none in this model"
    return f"{where!r} matches no matrix whose rows have addresses; matrices with [q], [k] and [v]: {there}"


def spread(said: dict[str, Any], part: str) -> dict[str, Any]:
    """What a rule says of a sliceable matrix, its weight part by part."""
    if "weight" not in said:
        return said
    rest = {slot: value for slot, value in said.items() if slot != "weight"}
    return rest | {f"weight[{one}]": said["weight"] for one in ((part,) if part else PARTS)} | {"rows": bool(part)}


def gathered(said: dict[str, Any]) -> dict[str, Any]:
    """The parts as one weight again: Rows where a rule that counts spoke of a part, else what was said of the whole. Equal Quants of three parts are
    not one Quant of the whole: per tensor, they have three scales."""
    if "rows" not in said:
        return said
    parts = tuple(said.get(f"weight[{one}]") for one in PARTS)
    return said | {"weight": Rows(parts) if said["rows"] and any(parts) else parts[0]}


def fit(weight: Quant | Rows, shape: tuple[int, ...], move: Callable[[Quant, tuple[int, ...]], Quant]) -> Quant | Rows:
    """A weight's Quant moved by `move(quant, shape)`, part by part where it has parts."""
    if not isinstance(weight, Rows):
        return move(weight, shape)
    part = (shape[0] // len(weight.parts), *shape[1:])
    return Rows(tuple(None if quant is None else move(quant, part) for quant in weight.parts))
