"""Coverage that cannot lie: which tensor got which numbers, and which quantizer really ran.

Names alone lie: `nn.TransformerEncoderLayer` in eval mode calls none of its submodules, `MultiheadAttention.out_proj` is never called at all, and
experts of a form that cannot be opened (mixture.py) are no layer that a rule could replace. So `describe` runs one probe forward in train mode and
one in eval mode, counts the calls of every quantizer, and lists every matrix of the model. A quantizer that never ran, and a matrix that no rule
can reach, is an error unless a rule named it (`keep_full("*.experts.*")`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.error import RuleError
from ..core.quantizer import Quant
from ..layers.packed import Packed
from ..layers.quantized import Quantized
from ..layers.rows import Rows
from . import inner, mixture
from .probe import forward, undisturbed
from .quantized import quantizers, reachable
from .roles import roles


@dataclass
class Row:
    """One matrix: its module, roles, shape, numbers, and how often its quantizers ran in (train, eval)."""

    name: str
    layer: str
    role: str
    shape: tuple[int, ...]
    weight: str
    input: str
    bits: float
    calls: tuple[int, int] = (0, 0)
    tied: str = ""


@dataclass
class Signal:
    """One quantizer inside attention: its address, numbers, and how often it ran in (train, eval)."""

    address: str
    quant: str
    calls: tuple[int, int] = (0, 0)


@dataclass
class Coverage:
    """The table of matrices, and that of `signals` inside attention. `silent`: quantizers that did not run in both modes; `unreached`: matrices that
    no rule can reach and none named; `closed`: the experts among them, and why these cannot be opened."""

    rows: list[Row] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Mean bits a weight, over all matrices (codes only); a weight that two layers share counts once."""
        own = [(row, torch.Size(row.shape).numel()) for row in self.rows if not row.tied]
        return sum(row.bits * n for row, n in own) / max(sum(n for _, n in own), 1)

    def check(self) -> Coverage:
        """Raise if anything is silent or unreached.

        Raises:
            RuleError: with the names and what to write.
        """
        if self.silent:
            raise RuleError(f"{len(self.silent)} quantizers never ran in the probe forward, for instance {', '.join(self.silent[:3])}. The model "
                            "goes round these layers (a fused path?); keep them full by a rule, or use an implementation that calls them")
        if self.unreached:
            why = next((f" ({self.closed[name]})" for name in (each.rpartition(".")[0] for each in self.unreached) if name in self.closed), "")
            raise RuleError(f"{len(self.unreached)} matrices are reached by no rule, for instance {', '.join(self.unreached[:3])}{why}. "
                            f"Say so aloud: keep_full({self.unreached[0]!r}), or a glob")
        return self

    def table(self) -> list[dict[str, Any]]:
        """Rows as plain dicts, for records and reports."""
        return [vars(row) | {"shape": list(row.shape), "calls": list(row.calls)} for row in self.rows]

    def inside(self) -> list[dict[str, Any]]:
        """The signals inside attention, as plain dicts."""
        return [vars(signal) | {"calls": list(signal.calls)} for signal in self.signals]


def describe(model: nn.Module, batch: Any = None) -> Coverage:
    """Which tensor has which numbers; with a batch, which quantizers ran in train and in eval. The model is left as it was.

    >>> from qatlas.model.rules import quantize
    >>> cover = describe(quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), "w4"), torch.zeros(1, 64))
    >>> [(row.name, row.weight, row.calls) for row in cover.rows]
    [('0', 'Uniform 4b', (1, 1)), ('1', 'full', (0, 0))]
    """
    calls = _calls(model, batch) if batch is not None else None
    role, full = roles(model), set(getattr(model, "qatlas_full", ()))
    cover = Coverage()
    owned: set[int] = set()
    first: dict[int, str] = {}                                    # a weight -> the layer that has it first
    for name, module in model.named_modules():
        if isinstance(module, Quantized | Packed):
            own = tuple(f"{name}.{slot}_quantizer" for slot in ("weight", "input", "output"))
            names = [n for n in calls or {} if n.startswith(own)]
            count = (0, 0) if calls is None or not names else (min(calls[n][0] for n in names), min(calls[n][1] for n in names))
            shape = tuple(module.weight.shape) if isinstance(module, Quantized) else tuple(module.store.shape)
            bits = module.store.bits if isinstance(module, Packed) else module.slots.weight.bits if module.slots.weight else 32
            cover.rows.append(Row(name, type(module).__name__, _roles(role, name), shape, _say(module.slots.weight), _say(module.slots.input),
                                  float(bits), count,
                                  _tied(first, name, module)))
            owned |= {id(p) for p in module.parameters()}
        elif name in reachable(model) and name in full:
            cover.rows.append(Row(name, type(module).__name__, _roles(role, name), tuple(module.weight.shape), "full", "full", 32.0,
                                  tied=_tied(first, name, module)))
            owned |= {id(p) for p in module.parameters()}
    for address, quantizer in inner.installed(model).items():
        train, evaluation = (calls or {}).get(address.replace(":", ".") + "_quantizer", (0, 0))
        cover.signals.append(Signal(address, _say(quantizer.quant), (train, evaluation)))
        owned |= {id(p) for p in quantizer.parameters()}
    cover.silent = [name for name, n in (calls or {}).items() if 0 in n and not _shared(model, name)]
    cover.unreached = [name for name, p in model.named_parameters() if p.dim() > 1 and p.numel() > max(p.shape) and id(p) not in owned
                       and not any(name == f or name.startswith(f + ".") for f in full if f) and "embed" not in name.rpartition(".")[2]]
    cover.closed = {} if not cover.unreached else mixture.closed(model)
    return cover


def _tied(first: dict[int, str], name: str, module: Any) -> str:
    """The layer before this one that has the same weight, or an empty string."""
    before = first.setdefault(id(module.store if isinstance(module, Packed) else module.weight), name)
    return "" if before == name else before


def _calls(model: nn.Module, batch: Any) -> dict[str, list[int]]:
    """Quantizer name -> calls in train, in eval."""
    calls = {name: [0, 0] for name in quantizers(model)}
    mode = 0

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name][mode] += 1
        return hook

    hooks = [q.register_forward_hook(count(name)) for name, q in quantizers(model).items()]
    try:
        with undisturbed(model), torch.no_grad():
            forward(model.train(), batch)
            mode = 1
            forward(model.eval(), batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _shared(model: nn.Module, name: str) -> bool:
    """A packed layer's weight quantizer does not run; only trainable layers' must."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Packed) and name.endswith("weight_quantizer")


def _roles(role: dict[str, set], name: str) -> str:
    return " ".join(sorted(r.value for r in role.get(name, ())))


def _say(quant: Quant | Rows | None) -> str:
    return "full" if quant is None else quant.label
