"""What a target holds, found by asking it. Its own `fit` is called with the numbers of a layer, and, where it refuses, with those of every scheme.

There is no table of what goes with what. `Numbers` is what is said about one layer; `refusal` is the reason why a target cannot hold it, or None;
`nearest` is the scheme closest to it that the target does hold at this shape; `holders` are the targets, of all formats, that hold it as it is.
Asking is cheap, a question is asked once, and a format that is added is asked like the others.

Nearest means: inputs treated in the same way if that can be; then bits, of two as near the more; then the length of a group.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..core.error import FormatError, QuantError
from ..core.grain import Grain
from ..core.quantizer import Quant
from ..core.scheme import scheme
from . import target as find_target
from . import targets

BITS = ("1", "1.58", "2", "3", "4", "5", "6", "7", "8")
GRAINS = ("", "-tensor", "-g256", "-g128", "-g64", "-g32", "-g16")
INPUTS = ("", "a8", "a8-static")


@dataclass(frozen=True)
class Numbers:
    """What is said about one layer. weight, input, output: its Quants, None in full precision. shape: (out, ...). module: the class that is replaced.
    body: False for embeddings and heads."""

    weight: Quant | None
    input: Quant | None = None
    output: Quant | None = None
    shape: tuple[int, ...] = (4096, 4096)
    module: str = "Linear"
    body: bool = True


    def few(self) -> Numbers:
        """The same of a matrix with few rows, which is asked instead: rows are alike, and some thousand of them make a question slow."""
        rows = self.shape[0] if self.shape else 1
        some = math.gcd(rows, 128)
        some *= -(-8 // some)
        return dataclasses.replace(self, shape=(min(rows, some), *self.shape[1:]))


def refusal(numbers: Numbers, name: str) -> str | None:
    """Why a target cannot be trained for with these numbers, or None.

    >>> refusal(Numbers(scheme("w4-g32").weight), "gguf:q4_0") is None
    True
    >>> refusal(Numbers(scheme("w4").weight, shape=(8, 48)), "gguf:q4_0").splitlines()[0]
    '48 inputs are no multiple of 32, the block of Q4_0'
    """
    return _refusal(numbers.few(), name)


@lru_cache(maxsize=65536)
def _refusal(numbers: Numbers, name: str) -> str | None:
    try:
        moved(numbers, name)
    except (FormatError, QuantError) as error:
        return reason(str(error))
    return None


def unmoved(numbers: Numbers, name: str) -> str | None:
    """Why what these numbers give may not fit as it is, or None: the types of the steps count too, which `fit` would move before training."""
    return _unmoved(numbers.few(), name)


@lru_cache(maxsize=65536)
def _unmoved(numbers: Numbers, name: str) -> str | None:
    form, kind = find_target(name)
    reason: str | None = form.why_not(numbers.weight, kind, numbers.shape)
    return reason


def moved(numbers: Numbers, name: str) -> tuple[Quant | None, Quant | None]:
    """The Quants of weight and input as the target has them.

    Raises:
        FormatError: what the target cannot hold. QuantError: numbers that cannot work.
    """
    form, kind = find_target(name)
    for quant in (numbers.input, numbers.output):
        if quant is not None and hasattr(form, "why_not_signal") and (why := form.why_not_signal(quant, kind)):
            raise FormatError(f"{name} cannot hold this layer's quantized activations: {why}. Take static ones (w4a8-static, static=True), or a "
                              "target that leaves them out")
    says_all = hasattr(form, "fit_input")
    if says_all and numbers.output is not None:
        raise FormatError(f"{name} has no place for a quantized output; leave it out, or the target")
    if numbers.weight is not None and numbers.weight.several:
        raise FormatError(f"{name} cannot hold a tensor of shape {numbers.shape} under {numbers.weight.label}: {numbers.weight.several}")
    weight = None if numbers.weight is None else form.fit(numbers.weight, kind, numbers.shape, numbers.body)
    return weight, form.fit_input(numbers.input, kind, weight, numbers.shape, numbers.module) if says_all else numbers.input


def reason(message: str) -> str:
    """A refusal without what was asked for and what could be asked for instead."""
    first = message.split("\n")[0]
    _, found, rest = first.partition(" cannot hold a tensor of shape ")
    return (rest.partition(": ")[2] if found else first).rstrip(".")


def nearest(numbers: Numbers, name: str) -> str | None:
    """The scheme closest to these numbers that the target holds at this shape, or None where it holds none of ours.

    >>> nearest(Numbers(scheme("w4-g64").weight), "gguf:tq2_0"), nearest(Numbers(scheme("w4a8").weight, scheme("w4a8").input), "onnx:int8")
    ('w1.58-g256', 'w4a8-static')
    """
    return _nearest(numbers.few(), name)


@lru_cache(maxsize=4096)
def _nearest(numbers: Numbers, name: str) -> str | None:
    for text in sorted(schemes(), key=lambda text: _distance(numbers, text)):
        said = scheme(text)
        if refusal(Numbers(said.weight, said.input, None, numbers.shape, numbers.module, numbers.body), name) is None:
            return text
    return None


def holders(numbers: Numbers) -> list[str]:
    """The targets, of all formats, that hold these numbers."""
    return [name for name in targets() if refusal(numbers, name) is None]


@lru_cache(maxsize=1)
def schemes() -> tuple[str, ...]:
    """The bit strings that are tried."""
    return tuple(f"w{bits}{inputs.partition('-')[0]}{grain}{'-static' if 'static' in inputs else ''}" for bits in BITS for grain in GRAINS
                 for inputs in INPUTS)


def _distance(numbers: Numbers, text: str) -> tuple[Any, ...]:
    said = scheme(text)
    own = numbers.weight
    static = numbers.input is not None and numbers.input.scale.keeps != "nothing"
    inputs = ((numbers.input is None) != (said.input is None), static != ("static" in text))
    if own is None:
        return *inputs, -said.weight.bits, text
    off = math.log2(own.grid.count) - math.log2(said.weight.grid.count)
    return (*inputs, abs(off), off > 0, abs(_length(own.grain, numbers.shape) - _length(said.weight.grain, numbers.shape)), len(text), text)


@lru_cache(maxsize=4096)
def _length(grain: Grain, shape: tuple[int, ...]) -> float:
    """The logarithm of how many elements share a step."""
    try:
        return math.log2(math.prod(shape) / max(math.prod(grain.scale_shape(shape)), 1))
    except QuantError:
        return math.log2(getattr(grain, "size", 1))
