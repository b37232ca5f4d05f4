"""What the experiments share: means and spreads of their tables."""

import pytest
from scripts import ROOT, script


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    return script("told")


def test_means_and_spreads(rows):
    assert rows.told([1.0]) == "1.00" and rows.told([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert rows.means([{"a": 1.0, "b": 2.0}, {"a": 2.0}], "a", "b") == ["1.50 ± 0.71", ""]


def test_the_tables_have_a_row_for_each_row(rows):
    runs = [{"accuracy": 50.0, "norms anew": 51.0, "edges": 20.0, "turning": 1.0}]
    table = script("oscillations").section({"full precision": 81.0, **{f"at {b}": 10.0 for b in (2, 3, 4, 8)}}, {"3 bits, LSQ": runs})
    assert len({line.count("|") for line in table.splitlines()}) == 1 and "| 3 bits, LSQ | 50.00 |  |  |  |  | 51.00 | 20.00 | 1.00 |" in table
    one = {"left": 0.5, "perplexity": 8.0, "held out": 2.0, "distance": 0.1, "turning": 1.0}
    table = script("cage").section({("QuEST, 3 bits", 0.0): [one], ("QuEST, 3 bits", 30.0): [one | {"held out": 1.9}]})
    assert len({line.count("|") for line in table.splitlines()}) == 1 and table.rstrip().endswith("| -0.1000 |")
    duals = {"a": 0.1, "b": 0.5, "c": 0.2, "d": 0.3, "e": 0.0, "output": 9.0}
    pick = script("quantization_constraints").layers
    assert pick(duals, "largest", 0) == ["a", "c", "d", "b"] and pick(duals, "smallest", 0) == ["e", "a", "c", "d"]
    assert len(set(pick(duals, "random", 1))) == 4 and "output" not in pick(duals, "random", 1)
