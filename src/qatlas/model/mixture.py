"""Mixtures of experts: a model's stacked experts opened into layers that rules reach (layers/experts.py), and closed again where none did.

`quantize` opens what can be opened before it reads the rules, under the same names: "model.layers.0.mlp.experts.gate_up_proj" is a layer then. What
no rule gave numbers to is put back as it was. A saved model names its layers, so what is loaded is opened where the file says so. Experts of another
form stay one module: rules find nothing there, and coverage lists their matrices as unreached, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ..layers.experts import STACKS, Experts, stacked, why_not
from ..layers.packed import Packed
from ..layers.quantized import Quantized


def open_all(model: nn.Module) -> Callable[[], None]:
    """Open every module of stacked experts that can be; what closes those without a quantized stack again is returned."""
    return _open(model, [name for name, module in model.named_modules() if name and stacked(module) and why_not(module) is None])


def open_named(model: nn.Module, layers: Iterable[str]) -> Callable[[], None]:
    """Open the experts whose stacks are among these names of layers; what takes it back is returned."""
    around = {name.rpartition(".")[0] for name in layers if name.rpartition(".")[2] in STACKS}
    return _open(model, [name for name, module in model.named_modules() if name in around and stacked(module) and why_not(module) is None])


def closed(model: nn.Module) -> dict[str, str]:
    """Name -> why it cannot be opened, for each module of stacked experts."""
    return {name: reason for name, module in model.named_modules() if stacked(module) and (reason := why_not(module))}


def _open(model: nn.Module, names: list[str]) -> Callable[[], None]:
    before = {name: model.get_submodule(name) for name in names}
    for name, module in before.items():
        model.set_submodule(name, Experts(module))

    def close() -> None:
        for name, module in before.items():
            if not any(isinstance(part, Quantized | Packed) for part in model.get_submodule(name).modules()):
                model.set_submodule(name, module)

    return close
