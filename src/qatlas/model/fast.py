"""Serving a packed model by kernels: a choice with a name, since sums run in another order.

    fast(model)       packed linear layers and experts multiply straight from their codes, wherever a kernel covers them; in place
    routes(model)     layer by layer, which way it goes and why
    exact(model)      back to the exact way: dequantize, then multiply; bit for bit what the trained model computes

With inputs in 8 bits a token (w4a8) the kernel takes the codes that the layer's own input quantizer makes and adds up whole numbers. How far fast and
exact may be apart stands in layers/kernel.py. Codes stay where they lie, in a mapped file too; scales of a type narrower than fp32 are copied to it.

Embeddings look up rows and convolutions dequantize either way. Nothing is silent: what takes no kernel has its reason in `routes`, which
`qatlas generate DIR --fast` prints, and the same reason is the same line.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.error import QuantError
from ..core.noun import Noun
from ..layers.experts import PackedStack
from ..layers.kernel import Kernel, why_not, why_not_int8
from ..layers.packed import Packed, PackedEmbedding, PackedLinear

EXACT, ROWS = "exact", "rows"


@dataclass(frozen=True)
class Route(Noun):
    """How a packed layer computes: way is floats or int8 (a kernel and what it takes), rows (a look-up), or exact. reason: why nothing faster."""

    name: str = ""
    way: str = EXACT
    reason: str = ""


def fast(model: nn.Module) -> Any:
    """Let the packed layers of a model multiply by kernels, in place; returned in eval mode. `routes` tells which do.

    Raises:
        QuantError: a model without packed layers.

    >>> import torch; from qatlas.model.pack import pack; from qatlas.model.rules import quantize
    >>> model = pack(quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), "w4-g32"))
    >>> x = torch.randn(1, 64)
    >>> with torch.no_grad(): bool((fast(model)(x) - exact(model)(x)).abs().max() < 1e-5)
    True
    """
    for layer in _packed(model).values():
        parts = _parts(layer)
        layer.kernel = Kernel(layer, parts) if parts and not why_not(layer, parts) else None
    return model.eval()


def exact(model: nn.Module) -> Any:
    """Take the kernels out again, in place.

    Raises:
        QuantError: a model without packed layers.
    """
    for layer in _packed(model).values():
        layer.kernel = None
    return model


def routes(model: nn.Module) -> list[Route]:
    """How each packed layer computes now.

    Raises:
        QuantError: a model without packed layers.
    """
    return [_route(name, layer) for name, layer in _packed(model).items()]


def told(found: list[Route]) -> list[str]:
    """The routes in a few lines: one for each way and reason, with the first layer that goes it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for route in found:
        groups.setdefault((route.way, route.reason), []).append(route.name)
    counted = Counter({key: len(names) for key, names in groups.items()})
    return [f"{count} layer{'s' * (count > 1)} {SAID[way]}{f', since {reason}' if reason else ''} ({groups[way, reason][0]}"
            f"{', ...' * (count > 1)})" for (way, reason), count in counted.most_common()]


SAID = {"floats": "by kernel, inputs in floats", "int8": "by kernel, inputs in int8", ROWS: "by rows, dequantized when looked up",
        EXACT: "dequantized in each forward"}


def _route(name: str, layer: Any) -> Route:
    parts = _parts(layer)
    if isinstance(layer, PackedEmbedding):
        return Route(name, ROWS)
    if not parts:
        return Route(name, EXACT, f"no kernel computes a {type(layer).__name__}")
    if layer.kernel is None:
        return Route(name, EXACT, why_not(layer, parts) or "fast(model) was not called")
    return Route(name, layer.kernel.way, "" if layer.kernel.integers else why_not_int8(layer) if layer.input_quantizer is not None else "")


def _parts(layer: Any) -> int:
    """How many matrices a kernel would see in a layer; 0 where none computes its operation."""
    return layer.experts if isinstance(layer, PackedStack) else int(isinstance(layer, PackedLinear))


def _packed(model: nn.Module) -> dict[str, Any]:
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Packed)}
    if not found:
        raise QuantError(f"this {type(model).__name__} has no packed layer; pack(model), or load a packed directory, comes first")
    return found
