"""Scheme: bit strings such as "w4a8kv8-g32" -> Quants.

    w<bits>         weights, one scale a channel unless a grain follows: 1, 1.58, 2 ... 8
    a<bits>         activations, one dynamic scale a token
    kv<bits>        keys and values, one dynamic scale a token and head: in training, and in the cache, which then holds codes
    kv<bits>z       the same with an integer zero point: the range of a token, not its largest magnitude, lies on the grid
    -g<n>, -tensor  the grain of the weights
    -static         activations with one learned scale a tensor instead (encoders and vision; in a decoder later tokens would move earlier ones)

Weights: 1 bit is Sign with mean|w| and refit; 1.58 is Ternary with BitNet's mean|w|; 2 and more are integers with a learned scale (LSQ).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .error import QuantError
from .estimator import Clip, Estimator, Ste
from .grain import Grain, Group, PerChannel, PerTensor, PerToken
from .grid import Sign, Ternary, Uniform
from .noun import Noun
from .quantizer import Quant
from .scale import AbsMax, AbsMean, Learned, MinMax

FORM = re.compile(r"w(?P<w>\d+(\.\d+)?)(a(?P<a>\d+))?(kv(?P<kv>\d+)(?P<zero>z)?)?"
                  r"(?P<rest>(-g[1-9]\d*|-tensor)?(-static)?|-static(-g[1-9]\d*|-tensor))")


@dataclass(frozen=True)
class Scheme(Noun):
    """The Quants of a scheme: weight, and input and cache or None where they stay in full precision."""

    weight: Quant
    input: Quant | None = None
    cache: Quant | None = None


def scheme(text: str) -> Scheme:
    """Read a bit string.

    Raises:
        QuantError: what is not of the form above.

    >>> scheme("w1.58a8").weight.grid
    Ternary(threshold=0.5)
    """
    match = FORM.fullmatch(text)
    if not match:
        raise QuantError(f"the scheme {text!r} is not of the form w<bits>[a<bits>][kv<bits>[z]][-g<n>|-tensor][-static]; "
                         "for instance w4, w2-g64, w1.58a8, w4a8kv8-g32")
    grain: Grain = PerChannel()
    for part in filter(None, match["rest"].split("-")):
        if part != "static":
            grain = PerTensor() if part == "tensor" else Group(int(part[1:]))
    static = "-static" in match["rest"]
    if static and not match["a"]:
        raise QuantError(f"the scheme {text!r} says -static, which is of activations, and has no a<bits>")
    token = Quant(Uniform(8), PerToken(), AbsMax())
    inputs = None
    if match["a"]:
        bits = int(match["a"])
        inputs = Quant(Uniform(bits, None), PerTensor(), Learned(AbsMax(), over="token"), Clip()) if static else token.but(grid=Uniform(bits))
    return Scheme(weight(match["w"], grain), inputs, cache(int(match["kv"]), zero=match["zero"] is not None) if match["kv"] else None)


def cache(bits: int, zero: bool = False, dtype: str = "float16") -> Quant:
    """The Quant of keys, or values: one scale a token and head, measured where they are made. zero: with an integer zero point. dtype: of the scales,
    which a cache stores beside the codes.

    Raises:
        QuantError: bits that no cache takes.

    >>> cache(4).grid, cache(4, zero=True).grid
    (Uniform(bits=4, signed=True, narrow=False), Uniform(bits=4, signed=False, narrow=False))
    """
    if bits not in range(2, 9):
        raise QuantError(f"keys and values take 2 to 8 bits, not {bits}")
    return Quant(Uniform(bits, not zero), PerToken(), MinMax(dtype=dtype) if zero else AbsMax(dtype=dtype))


def weight(bits: str | float, grain: Grain | None = None) -> Quant:
    """The Quant of a weight at so many bits, as in the table above.

    >>> weight(4).grid
    Uniform(bits=4, signed=True, narrow=False)
    """
    grain = PerChannel() if grain is None else grain
    number = float(bits)
    straight: Estimator = Ste()
    if number == 1:
        return Quant(Sign(), grain, AbsMean(), straight, refit=True)
    if number == 1.58:
        return Quant(Ternary(), grain, AbsMean(), straight)
    if number not in range(2, 9):
        raise QuantError(f"weights take 1, 1.58 or 2 to 8 bits, not {bits}")
    return Quant(Uniform(int(number)), grain, Learned(AbsMean(2.0, per_root=True)), Clip())
