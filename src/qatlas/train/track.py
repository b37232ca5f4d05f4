"""Track: the integers of the quantized weights followed step by step: which weights turn back and forth between two levels, and how often.

A switch against the direction of the switch before it is an oscillation (Nagel et al., 2022, arXiv 2203.11086). `often` is its running frequency in
steps, `mean` the running mean of the integers; both move by `momentum`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tactic import Loop, Tactic

Seen = dict[str, Tensor]                                          # of one weight, in the shape of its codes: codes, turn, often, mean


class Track(Tactic):
    """Watch, and move nothing.

    >>> Track(0.1).momentum
    0.1
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.momentum = momentum
        self._seen: dict[str, Seen] = {}

    def start(self, loop: Loop) -> None:
        for name, layer in loop.layers():
            codes = layer.quantize().codes
            self._seen[name] = {"codes": codes, "turn": torch.zeros_like(codes, dtype=torch.int8),
                                "often": torch.zeros_like(codes, dtype=torch.float32), "mean": codes.float()}

    @torch.no_grad()
    def after(self, loop: Loop) -> None:
        for name, layer in loop.layers():
            self.follow(self._seen[name], layer.quantize().codes)

    def follow(self, seen: Seen, codes: Tensor) -> None:
        """One observation of the integers of one weight."""
        turn = (codes.int() - seen["codes"].int()).sign().to(torch.int8)
        seen["often"].lerp_((turn * seen["turn"] == -1).float(), self.momentum)
        seen["mean"].lerp_(codes.float(), self.momentum)
        seen["turn"], seen["codes"] = torch.where(turn != 0, turn, seen["turn"]), codes

    def turning(self, often: float = 0.005) -> float:
        """The share of all weights that oscillate with more than this frequency."""
        return self.share(lambda seen: seen["often"] > often)

    def share(self, which: Callable[[Seen], Tensor]) -> float:
        """The share of all weights of which `which` is true."""
        total = sum(seen["codes"].numel() for seen in self._seen.values())
        return sum(int(which(seen).sum()) for seen in self._seen.values()) / max(total, 1)

    def state_dict(self) -> dict[str, Any]:
        return {f"{name}.{what}": t for name, seen in self._seen.items() for what, t in seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for full, t in state.items():
            name, _, what = full.rpartition(".")
            self._seen[name][what] = t.to(self._seen[name][what].device)
