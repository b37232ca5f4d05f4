"""What the numbers of a record mean, and how they are written for people.

A stage's scores are a dict of metrics; the first metric of METRICS that any stage has is the record's headline. Whether less is better belongs to it.
Records come from JSON that may be old, cut short, or of a run that went wrong: whatever is not a number is read as None, NaN and infinity stay what
they are and are written in words. No number is invented: a ratio without a reference is None.

Units: bytes are decimal (1 MB = 10^6 B, as disks and model hubs count), times in seconds, losses in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..record import Record

FULL = "full precision"
UNTRAINED = "untrained"
NOTHING = "–"


@dataclass(frozen=True)
class Metric:
    """A headline metric. lower: less is better. share: a fraction of one, written in percent."""

    name: str
    lower: bool
    share: bool = False

    def say(self, x: Any) -> str:
        """The value for people.

        >>> METRICS[1].say(0.9123), METRICS[0].say(5012.3)
        ('91.23 %', '5,012')
        """
        value = real(x)
        return f"{100 * value:.2f} %" if self.share and value is not None and math.isfinite(value) else number(value)


METRICS = (Metric("perplexity", True), Metric("accuracy", False, True), Metric("matthews", False), Metric("pearson", False),
           Metric("spearman", False), Metric("loss", True))


def headline(record: Record) -> Metric | None:
    """The metric of the headline table; None where nothing was scored."""
    found = [name for metrics in record.scores.values() for name in (metrics or {}) if name != "tokens"]
    known = next((metric for metric in METRICS if metric.name in found), None)
    return known or (Metric(found[0], lower=False) if found else None)


def nats(metrics: dict[str, Any]) -> float | None:
    """The loss of a score, from `loss` or from the perplexity; None where there is neither."""
    loss, perplexity = real(metrics.get("loss")), real(metrics.get("perplexity"))
    if loss is not None:
        return loss
    return math.log(perplexity) if perplexity is not None and perplexity > 0 else None


def real(x: Any) -> float | None:
    """A float, NaN and infinity included; None for what is no number."""
    if x is None or isinstance(x, bool):
        return None
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError):
        return None


def finite(x: Any) -> float | None:
    """A finite float, or None.

    >>> finite("2"), finite(float("nan")), finite([])
    (2.0, None, None)
    """
    value = real(x)
    return value if value is not None and math.isfinite(value) else None


def number(x: Any) -> str:
    """Three or four digits that count.

    >>> number(17.031), number(5012.3), number(1.2e9), number(0.00012), number(float("inf")), number(None), number(4)
    ('17.03', '5,012', '1.20e9', '1.20e-4', 'infinite', '–', '4')
    """
    value = real(x)
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def size(x: Any) -> str:
    """Bytes.

    >>> size(999), size(1_234_567), size(None)
    ('999 B', '1.23 MB', '–')
    """
    value = finite(x)
    if value is None:
        return NOTHING
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.2f} {unit}" if scaled < 10 else f"{scaled:.1f} {unit}" if scaled < 100 else f"{scaled:.0f} {unit}"
    return f"{value:.0f} B"


def seconds(x: Any) -> str:
    """A time span.

    >>> seconds(0.012), seconds(3.21), seconds(200), seconds(7500)
    ('12 ms', '3.2 s', '3 min 20 s', '2 h 5 min')
    """
    value = finite(x)
    if value is None:
        return NOTHING
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def ratio(x: Any, reference: Any) -> float | None:
    """x / reference, where both are finite and the reference is not 0."""
    value, one = finite(x), finite(reference)
    return value / one if value is not None and one else None


def times(x: float | None) -> str:
    """A ratio for people.

    >>> times(1.4126), times(None), times(295.123)
    ('1.413×', '–', '295.1×')
    """
    return NOTHING if x is None else f"{number(x)}×"


def smaller(x: Any, reference: Any) -> str:
    """How a size stands to the reference, in words.

    >>> smaller(10, 123), smaller(20, 10), smaller(10, 10)
    ('12.3× smaller', '2.0× larger', 'same size')
    """
    share = ratio(x, reference)
    if not share or share < 0:
        return NOTHING
    return "same size" if abs(share - 1) < 5e-4 else f"{1 / share:.1f}× smaller" if share < 1 else f"{share:.1f}× larger"


def plain(text: Any, length: int = 0) -> str:
    """Text without control characters and lone surrogates, which neither SVG nor UTF-8 can hold; cut in the middle to `length` (0: whole).

    >>> plain("a\\x00b"), plain("abcdefgh", 5)
    ('a\ufffdb', 'ab…gh')
    """
    clean = "".join(c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 and not 0xD800 <= ord(c) < 0xE000 and ord(c) & 0xFFFE != 0xFFFE)
                    else "\ufffd" for c in str(text))
    if not length or len(clean) <= length:
        return clean
    head = length // 2
    return f"{clean[:head]}…{clean[len(clean) - (length - head - 1):]}"
