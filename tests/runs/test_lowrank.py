"""The experiment of low-rank papers: its rows, its table."""

import pytest
from scripts import script


@pytest.fixture
def runs(monkeypatch):
    import sys
    from pathlib import Path

    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).resolve().parents[2] / "runs")])
    return script("lowrank")


def test_every_setting_has_its_controls(runs):
    for which, settings in runs.SETTINGS.items():
        names = runs.rows(which, 1, lambda: None)
        for bits, _ in settings:
            assert {f"{bits} bits, {row}" for row in ("round-to-nearest", "LoRA, merged, rounded", "PEQA (steps alone)", "LR-QAT", "L4Q",
                                                      "LSQ, all weights")} <= set(names)
    assert "3 bits, L4Q, start deviation" in names and "4 bits, QAT-LoRA (adapter stays)" in names


def test_the_table_says_mean_spread_and_what_was_cut(runs):
    kept = {"3 bits, L4Q": [{"loss": 2.0, "cut": 0.01}, {"loss": 2.2, "cut": 0.03}], "3 bits, LSQ": [{"loss": 2.5, "cut": None}]}
    text = runs.table("adapt", 3.0, kept)
    for line in ("| 3 bits, L4Q | 2.100 ± 0.141 | 2.00 % |", "| 3 bits, LSQ | 2.500 |  |", "| full precision, not trained | 3.000 | |"):
        assert line in text
