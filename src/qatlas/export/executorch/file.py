"""Writing and reading a .pte. Everything that the target cannot hold is refused before the program is compiled, all of it by name; the file appears
under its name only when it is whole and its constants are the trained ones; one that exists is not overwritten.

A program has no names for its constants. So it has a second method, `qatlas`, a constant: JSON that says the target, which tensors the computation
does not use, and for each tensor the sha256 of its bytes, which is the name under which XNNPACK keeps a constant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.error import FormatError
from ...core.qtensor import QTensor
from ..checkpoint import Checkpoint, Traced, appearing, vacant
from . import process, runtime
from .fitting import NAME, SCHEMES, known, why_not, why_not_input
from .lower import laid, program, silent, stored

SHOWN = 4                                                         # names of one kind that an error lists


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The type of each tensor in the file: one of XNNPACK's, or fp32. Asked before training, when there is no graph yet.

    Raises:
        FormatError: a tensor that the target cannot hold, or a missing package, which would otherwise be found when all is trained.
    """
    known(target)
    faults = {name: why_not(t, target) for name, t in checkpoint.tensors.items() if not isinstance(t, Tensor)}
    faults |= dict.fromkeys(checkpoint.signals, "no signal but a layer's input has a place in XNNPACK's products")
    for name, t in checkpoint.tensors.items():
        if not isinstance(t, Tensor) and name.removesuffix(".weight") not in checkpoint.inputs:
            faults[name] = faults[name] or why_not_input(None)
    axes = {name.removesuffix(".weight"): len(t.shape) for name, t in checkpoint.tensors.items() if not isinstance(t, Tensor)}
    _refuse(faults | {f"{layer}:input": why_not_input(quant, axes.get(layer, 2)) for layer, quant in checkpoint.inputs.items()}, target)
    if (missing := runtime.lacks()) is not None:
        raise FormatError(missing)
    return {name: str(stored(*laid(t, target))["type"]) if isinstance(t, QTensor) else "fp32" for name, t in checkpoint.tensors.items()}


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as an ExecuTorch program for XNNPACK.

    Args:
        path: the file to make; must not exist.
        target: one of TARGETS.

    Raises:
        FormatError: a checkpoint without a graph, what the target cannot hold, a file that is in the way. Then nothing is left behind.
    """
    path = Path(path)
    vacant(path)
    plan(checkpoint, target)
    if checkpoint.graph is None or not isinstance(checkpoint.graph.model, Traced):
        raise FormatError("an ExecuTorch program holds the whole computation, and this checkpoint has none; set checkpoint.graph = "
                          "qatlas.model.program.program(model)")
    broken: dict[str, str | None] = {name: "it holds NaN or infinity" for name, t in checkpoint.tensors.items()
              if isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all()}
    _refuse(broken | {address: why_not_input(signal) for address, signal in checkpoint.graph.signals.items()}, target)
    data = program(checkpoint, target)
    with appearing(path) as aside:
        aside.write_bytes(data)
        _prove(aside)
    return path


def _prove(aside: Path) -> None:
    """That every tensor lies in the program as the program says: compilers may fold constants."""
    try:
        with silent():
            process.read(str(aside))
    except process.Strange as error:
        raise FormatError(f"ExecuTorch's compiler has changed what it was given: {error}. Fold norms into their layers before (--fold), or keep the "
                          "tensor in full precision") from None


def read(path: str | Path, engine: Any = runtime) -> dict[str, Tensor]:
    """The tensors of a program of ours under their names, fp32 where they are quantized: s q, from the constants that XNNPACK's graph names.

    engine: the one there is.

    Raises:
        FormatError: no file, a damaged or a foreign one.
    """
    return runtime.constants(path)[0]


def types(path: str | Path) -> dict[str, int]:
    """How many quantized weights of which type of XNNPACK."""
    found: dict[str, int] = runtime.constants(path)[1]["types"]
    return found


def unused(path: str | Path) -> tuple[list[str], list[str]]:
    """What a file of ours does not hold: names of tensors that the computation does not use, and addresses of quantizers that were left out: none."""
    said = runtime.constants(path)[1]
    return said["unused"], said["left_out"]


def answers(path: str | Path, asked: list[Tensor], engine: Any = runtime) -> Tensor:
    """(rows, vocabulary or classes) fp32: what ExecuTorch computes for each input, of a language model after its last token.

    asked: ids (1, tokens) or pixels.

    Raises:
        FormatError: a file that ExecuTorch cannot load or run.
    """
    return torch.cat([found[:, -1] if found.dim() == 3 else found for found in engine.run(path, asked)])


def _refuse(faults: dict[str, str | None], target: str) -> None:
    found = {name: reason for name, reason in faults.items() if reason}
    if found:
        first, *more = found
        also = f"\n  refused as well: {len(more)} more ({', '.join(more[:SHOWN])}{', ...' if more[SHOWN:] else ''})" if more else ""
        raise FormatError(f"{NAME}:{target} cannot hold {first}: {found[first]}.\n  nearest scheme: {SCHEMES[target]}{also}")
