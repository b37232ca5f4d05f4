"""Reading the authors' numbers, and holding ours against them.

A file of vectors holds cases; what its arrays mean stands in tests/golden/README.md. Nothing here knows a part of ours: the maps do (golden_maps).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

P = dict[str, Any]
A = dict[str, Tensor]
Answer = dict[str, Tensor] | None                                 # tensors by the names of a case; None: no public part of ours says it yet


@dataclass(frozen=True)
class Case:
    """One case of one file: its parameters P, its arrays A, and the arrays of every other case of the file."""

    file: str
    name: str
    p: P
    a: A
    rest: dict[str, A]
    rest_p: dict[str, P] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.p["kind"])


def read(path: Path) -> Iterator[Case]:
    with numpy.load(path) as z:
        names = json.loads(bytes(z["params_json"]))
        arrays: dict[str, A] = {name: {} for name in names}
        for key in z.files:
            case, _, array = key.partition("/")
            if case in arrays:
                arrays[case][array] = torch.from_numpy(z[key])
    for name, p in names.items():
        yield Case(path.stem, name, p, arrays[name], arrays, names)


def tolerance(c: Case, theirs: Tensor) -> Tensor | float:
    """float64 1e-12; float32 2e-6 of the largest in the row, 1e-5 for what is a sum (gradients of scales, outputs of layers)."""
    if any(t.dtype == torch.float64 for name, t in c.a.items() if name in ("w", "x")):
        return 1e-12 * float(theirs.abs().nan_to_num().amax())
    elementwise = theirs.shape in {c.a[name].shape for name in ("w", "x") if name in c.a} and "linear" not in c.kind
    return 2e-6 * theirs.abs().nan_to_num().amax(-1, keepdim=True) if elementwise else 1e-5 * float(theirs.abs().nan_to_num().amax())


def differ(c: Case, name: str, ours: Tensor, apart: Tensor, within: float | None) -> str:
    """How ours and theirs differ outside the places `apart`; empty where they do not."""
    theirs = c.a[name]
    if ours.dtype == torch.uint8 and theirs.dtype in (torch.int32, torch.uint8):        # bytes against words, which may end in padding
        if name in ("packed_dim0", "qweight"):
            ours, theirs = ours.T, theirs.T
        if theirs.dtype == torch.uint8 and apart.shape == theirs.shape:
            ours = ours.where(~apart, theirs)
        theirs = theirs.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        same = torch.equal(theirs[..., : ours.shape[-1]], ours) and not theirs[..., ours.shape[-1] :].any()
        return "" if same else "other bytes"
    if ours.numel() != theirs.numel():
        return f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    ours, keep = ours.detach().reshape(theirs.shape), torch.ones_like(theirs, dtype=torch.bool)
    if apart.shape == theirs.shape:
        keep = ~apart
    elif apart.any():
        groups = apart.numel() % theirs.numel() == 0
        keep = ~apart.reshape(theirs.numel(), -1).any(1).reshape(theirs.shape) if groups else torch.zeros_like(keep)
    if name == "codes":                                           # ours count from 0, theirs from where they like
        starts = (ours.int() - theirs.int())[keep].unique()
        return "" if starts.numel() <= 1 else f"other codes: apart by {starts.tolist()}"
    size = tolerance(c, theirs.double())
    far = ((ours.double() - theirs.double()).abs() <= (size if within is None else within * theirs.abs().nan_to_num().amax())).logical_not() & keep
    if not far.any():
        return ""
    gap = (ours - theirs).double().abs().masked_fill(~far, 0)
    return f"{int(far.sum())} of {far.numel()} off, by up to {float(gap.max()):.2g} where the largest is {float(theirs.abs().max()):.2g}"


def apart(places: list[Any], name: str) -> Tensor:
    """The places of one output that are refused."""
    masks = [p.get(name) if isinstance(p, dict) else p for p in places]
    held = [m for m in masks if m is not None]
    return torch.stack(held).any(0) if held else torch.zeros((), dtype=torch.bool)


def any_of(place: Any) -> bool:
    """Whether a refusal leaves anything out."""
    return any(any_of(p) for p in place.values()) if isinstance(place, dict) else bool(torch.as_tensor(place).any())
