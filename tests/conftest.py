"""What every test shares: one thread, Triton's interpreter where there is no GPU, and the account of the golden vectors at the end."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small import write_llama, write_text

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                # before anything imports Triton: it asks once


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 64, with its tokenizer."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "text.txt")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many golden cases passed, were refused and why, and are uncovered and where."""
    cases = []
    for report in (r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "call"):
        told = dict(report.user_properties)
        if "golden" in told:
            cases.append((*told["golden"], told.get("outcome", "failed")))
    if not cases:
        return
    kinds = Counter(outcome.partition(":")[0] for _, _, outcome in cases)
    terminalreporter.section("golden vectors")
    terminalreporter.line(f"{len(cases)} cases: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    for outcome, n in sorted(Counter(outcome for _, _, outcome in cases if ":" in outcome).items()):
        where = Counter(file for file, _, which in cases if which == outcome)
        terminalreporter.line(f"  {n:4} {outcome}  [{', '.join(f'{file} {k}' for file, k in sorted(where.items()))}]")
    for file in sorted({file for file, _, outcome in cases if outcome == "uncovered"}):
        of = Counter(kind for name, kind, outcome in cases if name == file and outcome == "uncovered")
        terminalreporter.line(f"       uncovered in {file}: " + ", ".join(f"{kind} {k}" for kind, k in sorted(of.items())))
