"""The benchmark of QuEST's rotation, on a model of one layer: pairs, the claim by the interval's upper end, and going on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHES = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """Both files anew, as they import each other when they are run."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", [str(BENCHES), *sys.path])
    for name in ("training", "hadamard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import hadamard as made
    import training

    for name, value in {"ROWS": 2, "LENGTH": 8, "VOCABULARY": 64}.items():
        monkeypatch.setattr(training, name, value)
    made.small = lambda: training.llama(64, 1)
    yield made
    for name in ("training", "hadamard"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)


def test_it_measures_pairs_and_goes_on(bench, tmp_path):
    file, page = tmp_path / "h.json", tmp_path / "page.md"
    given = ["--json", str(file), "--threads", "1", "--page", str(page)]
    bench.main([*given, "--pairs", "2"], bench.small)
    first = json.loads(file.read_text())["rounds"]
    made = bench.main([*given, "--pairs", "7"], bench.small)
    rounds = json.loads(file.read_text())["rounds"]
    assert len(first) == 2 and rounds[:2] == first and len(rounds) == 7
    assert [next(iter(r)) for r in rounds[:4]] == ["plain", "no rotation", "QuEST", "plain"]      # who is first takes turns
    assert "QuEST / QuEST without rotation" in made and "at most 10% for the rotation" in made and made in page.read_text()
    with pytest.raises(SystemExit, match="other settings"):
        bench.main([*given, "--bits", "2"], bench.small)


@pytest.mark.parametrize(("ratio", "words"), [(1.05, "holds"), (1.2, "does not hold")])
def test_the_claim_is_judged_by_the_upper_end(bench, ratio, words):
    rounds = [{"plain": (1.0, 1.0), "no rotation": (1.5, 1.5), "QuEST": (1.5 * ratio, 1.5 * ratio)}] * 20
    how = {"parameters": 1, "tokens": 1, "optimizer": "AdamW", "threads": 1, "cpu": "one"}
    assert f"rotation, {words} (" in bench.section({"rounds": rounds, "bits": 4, "setting": how}, "wall")
