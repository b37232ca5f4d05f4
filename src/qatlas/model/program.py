"""Program: a quantized model as torch.export has it, in full precision, for formats that compile the computation (ExecuTorch).

    program(model) -> export.checkpoint.Graph, whose `model` is a `Traced`

What is traced is what model.graph shows to ONNX: each packed layer with its dequantized weight as a plain parameter, each quantizer of activations as
one node `qatlas::Quantize`. The exporter puts the trained codes in the place of the weights, and what the format has in the place of the marks.

The program takes one row: the ids of a sentence, with as many tokens as it has, between 2 and TOKENS (a compiled program plans its memory for the
longest), or one image of the size that the model's own inputs have. There is no mask, since a row has nothing to hide, and no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import FormatError
from ..export.checkpoint import Graph, Traced
from .graph import Whole, names, plain, quiet
from .probe import images, inputs

TOKENS = 512                                                      # of the longest sentence, where the model does not end before


def program(model: nn.Module, batch: dict[str, Tensor] | None = None, tokens: int = TOKENS) -> Graph:
    """The computation of a quantized model, trainable or packed; the model stays as it is.

    Args:
        batch: inputs by name; without it the first of a transformers model's own kind of inputs is made. One row of it is taken.
        tokens: the most tokens of a sentence.

    Raises:
        QuantError: a model without quantized layers. FormatError: torch cannot trace the model.
    """
    batch = {name: x[:1] for name, x in (first(model) if batch is None else batch).items()}
    shown, signals = plain(model)
    whole = Whole(shown, tuple(batch)).eval()
    most = min(tokens, _longest(model))
    opened = {"given": tuple(None if x.is_floating_point() else {1: torch.export.Dim("tokens", min=2, max=most)} for x in batch.values())}
    with torch.no_grad(), quiet():
        whole(*batch.values())                                    # attention compares itself with the model's own here, which no trace can
        try:
            found = torch.export.export(whole, tuple(batch.values()), dynamic_shapes=opened)
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            raise FormatError(f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {said[0]}") from error
    return Graph(Traced(found.module(check_guards=False), tuple(batch.values()), opened, names(whole)), signals)


def first(model: Any) -> dict[str, Tensor]:
    """The one input that a row cannot do without."""
    given = inputs(model)
    name = getattr(model, "main_input_name", None)
    if name == "pixel_values":
        return {name: torch.zeros(1, *images(model))}
    name = name if name in given else next(iter(given))
    return {name: given[name]}


def _longest(model: Any) -> int:
    """How many tokens the model has positions for."""
    config = getattr(model, "config", None)
    return int(next((n for name in ("max_position_embeddings", "n_positions") if isinstance(n := getattr(config, name, None), int)), TOKENS))
