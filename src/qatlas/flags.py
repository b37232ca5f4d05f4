"""Flags: what the command line reads out of signatures and docstrings. A paper's flags are its function's arguments and those of `job.Job`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from .core.error import nearest

SHARED = ("model", "task")                                        # what a paper's function is handed, not told by flags


class Parser(ArgumentParser):
    """An ArgumentParser that takes a bare --flag for yes, and whose complaints name what comes closest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(default_meta=False, allow_abbrev=False, **settings)         # half a flag is another paper's whole one

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        flags = re.findall(r"--[\w.-]+", message) if "nrecognized" in message else []
        known = [flag for action in self._actions for flag in action.option_strings]
        message = re.sub(r"<class '(\w+)'>", r"\1", message)
        for flag in flags:
            close = nearest(flag, known)
            message += f"\n  {flag}: " + (f"did you mean {', '.join(close)}?" if close else f"the flags are {', '.join(known)}")
        sys.stderr.write(f"qatlas: {message}\n  {self.prog} --help shows all flags\n")
        sys.exit(2)

    def bare(self) -> Parser:
        """Let `--plan` mean `--plan true`."""
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True
        return self


def first_line(documented: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(documented) or "").split("\n")[0]


def essay(function: Callable[..., Any]) -> str:
    """A docstring without its list of arguments, which the flags show."""
    return (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]


def many(parser: Parser, function: Callable[..., Any]) -> str:
    """Let the parser take one or more words for `*name` of a function; the name, or nothing where it has none."""
    found = next((p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL), "")
    if found:
        told = re.search(rf"^\s*{found}: (.*)$", inspect.getdoc(function) or "", re.M)
        parser.add_argument(found, nargs="+", type=str, help=told.group(1) if told else "")
    return found


def run_parser(paper: str) -> Parser:
    """The parser of one paper: its function's arguments, and what all papers share."""
    from . import papers
    from .prepare import Job

    function = papers.paper(paper)
    parser = Parser(prog=f"qatlas run {paper}", description=f"{first_line(papers.module(paper))} {first_line(function)}")
    parser.add_argument("--config", action="config", help="a YAML file of these flags")
    parser.add_function_arguments(function, skip=set(SHARED), nested_key=None)
    parser.add_class_arguments(Job, nested_key=None)
    return parser.bare()
