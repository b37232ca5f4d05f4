"""Triton's interpreter for the tests of this folder. It is chosen when Triton is imported, so before anything else here imports it. On a machine
with a GPU the tests run compiled. Without Triton, or where something else imported it compiled before, the tests are skipped and say so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_no_triton: of what is said where Triton is missing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from qatlas.kernels.triton.lang import why_not_here

    reason = why_not_here(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for item in items:
        if reason and HERE in item.path.parents and "needs_no_triton" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
