"""The bench of training: its statistics, its resumption, its table, on a model of a few thousand weights. No times are asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("training_cost", ROOT / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def nobody(model, stack):
        raise ModuleNotFoundError("No module named 'nobody'")

    for name, value in {"ROWS": 2, "LENGTH": 8, "VOCABULARY": 64}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "CASES", {"w1.58a8": {"qatlas": module.ours("w1.58a8"), "nobody": nobody}})
    return module


@pytest.mark.parametrize("n", range(6, 60))
def test_the_interval_covers_the_median_in_95_of_100_cases_and_no_narrower_one_does(bench, n):
    middle, low, high = bench.interval(range(n))
    assert middle == (n - 1) / 2 and low + high == n - 1 and low < middle < high

    def misses(k):
        return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    assert misses(low + 1) <= 0.05 < misses(low + 2)
    assert bench.interval([x % n for x in range(7, n + 7)]) == (middle, low, high)


def test_few_pairs_say_nothing(bench):
    assert bench.interval([1.0] * 5) == (1.0, -math.inf, math.inf)


def test_a_run_goes_on_where_it_was_stopped_and_writes_its_section_once(bench, tmp_path, capsys):
    file, page = tmp_path / "cost.json", tmp_path / "performance.md"
    given = ["--json", str(file), "--threads", "1", "--page", str(page)]
    bench.main([*given, "--pairs", "2"], lambda: bench.llama(64, 1))
    first = json.loads(file.read_text())["cases"]["w1.58a8"]["rounds"]
    page.write_text(page.read_text() + "\nother words\n")
    made = bench.main([*given, "--pairs", "7"], lambda: bench.llama(64, 1))
    found = json.loads(file.read_text())["cases"]["w1.58a8"]
    assert len(first) == 2 and found["rounds"][:2] == first and len(found["rounds"]) == 7
    assert [next(iter(r)) for r in found["rounds"][:3]] == ["plain", "qatlas", "plain"]       # who is first takes turns
    assert found["absent"] == {"nobody": "ModuleNotFoundError: No module named 'nobody'"}
    text = page.read_text()
    assert text.count("## Training") == 1 and made in text and text.rstrip().endswith("other words")
    assert "| nobody | absent: ModuleNotFoundError: No module named 'nobody' | | |" in made and "time, 7 pairs" in made
    parameters = sum(p.numel() for p in bench.llama(64, 1).parameters())
    assert f"{parameters:,} parameters on 16 tokens" in made
    capsys.readouterr()
    again = bench.main([*given, "--pairs", "7"], lambda: pytest.fail("nothing is left to measure"))
    assert again == made
    state = json.loads(file.read_text())
    state["setting"]["threads"] = 64
    file.write_text(json.dumps(state))
    with pytest.raises(SystemExit, match="measured with other threads"):
        bench.main(given, lambda: bench.llama(64, 1))


def test_memory_counts_weights_gradients_moments_and_what_is_kept(bench):
    found = {}
    bench.measure("w1.58a8", found, 0, lambda: None, lambda: bench.llama(64, 1))
    assert found["w1.58a8"]["peak"] == {}
    bench.measure("w1.58a8", found, 1, lambda: None, lambda: bench.llama(64, 1))
    peak = found["w1.58a8"]["peak"]
    weights = [p.numel() * 4 for name, p in bench.llama(64, 1).named_parameters()]
    assert 4 * sum(weights) < peak["plain"] < 4 * sum(weights) + 2**20
    assert peak["qatlas"] > peak["plain"]


def test_ours_that_fails_is_no_row_but_an_error(bench, monkeypatch):
    def broken(model, stack):
        raise ValueError("no")

    monkeypatch.setattr(bench, "CASES", {"w1.58a8": {"qatlas": broken}})
    with pytest.raises(ValueError, match="no"):
        bench.measure("w1.58a8", {}, 1, lambda: None, lambda: bench.llama(64, 1))
