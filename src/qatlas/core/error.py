"""One family of errors: what was found, where, and what to write instead.

Everything that a user can get wrong raises a `QatlasError`; the command line prints it without a traceback and exits with code 2.
Anything else that escapes is a fault of ours.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

SAID = 400                                                        # letters of another library's message that an error quotes


class QatlasError(Exception):
    """The root: a message for people."""


class RuleError(QatlasError):
    """A rule that cannot be applied, or coverage that is not what the rules say."""


class QuantError(QatlasError):
    """Numbers that cannot work: a group that does not divide, NaN in a weight, a scale that nobody initialised."""


class FormatError(QatlasError):
    """A format that cannot hold a tensor, or a file that is not what it should be."""


class CheckpointError(QatlasError):
    """A truncated, mismatched or foreign checkpoint."""


class DataError(QatlasError):
    """Data that is missing, empty or of another form than the task needs."""


class RunError(QatlasError):
    """A run that cannot start or go on: a directory in use, a missing extra, a flag that no paper has."""


@contextlib.contextmanager
def foreign(what: str, kind: type[QatlasError] = FormatError) -> Iterator[None]:
    """Whatever another library raises inside, as an error of ours that begins with `what`: on a damaged file its readers raise anything.

    >>> with foreign("the file x cannot be read"):
    ...     [][1]
    Traceback (most recent call last):
    qatlas.core.error.FormatError: the file x cannot be read (IndexError: list index out of range)
    """
    try:
        yield
    except QatlasError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:SAID]
        raise kind(f"{what} ({type(error).__name__}{': ' if said else ''}{said})") from error


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The `n` names closest to `name`.

    >>> nearest("lsqq", ["lsq", "quest"])
    ['lsq']
    """
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.4)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist.

    >>> unknown("paper", "lsqq", ["lsq", "quest"])
    "there is no paper 'lsqq'; nearest: lsq; all: lsq, quest"
    """
    known = sorted(known)
    close = nearest(name, known) or ["none is close"]
    return f"there is no {kind} {name!r}; nearest: {', '.join(close)}; all: {', '.join(known)}"
