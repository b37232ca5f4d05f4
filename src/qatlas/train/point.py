"""What of a training goes into a resume point: model, moments, random states of all ranks, the tactics' own state, the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .resume import Point, optimizer_state, random_state, state_of
from .run import gathered
from .tactic import Loop, Tactic


def point_of(loop: Loop, tactics: Sequence[Tactic], finished: bool = False) -> Point:
    """The point as it is now; a finished phase needs no moments and no random states. To be called on every rank."""
    states = [tactic.state_dict() for tactic in tactics]
    rest = [{k: v for k, v in state.items() if not isinstance(v, Tensor)} for state in states]
    plain: dict[str, Any] = {"history": vars(loop.history), "tactics": rest}
    own = {f"{i}.{k}": v for i, state in enumerate(states) for k, v in state.items() if isinstance(v, Tensor)}
    tensors = {"model.safetensors": state_of(loop.model)} | ({"tactics.safetensors": own} if own else {})
    if not finished:
        tensors["optimizer.safetensors"], plain["optimizer"] = optimizer_state(loop.optimizer, loop.names)
        tensors["rng.safetensors"] = {name: gathered(loop.accelerator, t) for name, t in random_state().items()}
    return Point(loop.step, finished, plain, tensors)
