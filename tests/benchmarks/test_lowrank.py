"""The benchmark of low-rank memory: its rows are what they say, and its page says what was measured."""

import importlib.util
from pathlib import Path

import pytest
import torch

from qatlas.train.optim import trained

spec = importlib.util.spec_from_file_location("lowrank_memory", Path(__file__).resolve().parents[2] / "benchmarks" / "lowrank.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
TINY = {"width": 128, "depth": 1, "vocabulary": 64, "rows": 1, "length": 8}


@pytest.mark.parametrize("row", bench.ROWS)
def test_each_row_trains_what_it_says(row):
    with torch.device("meta"):
        model, globs = bench.made(row, TINY, "bfloat16")
    ends = {name.rpartition(".")[2] for name in trained(model, globs).values()}
    assert ends == {"LSQ": {"weight", "scale"}, "L4Q": {"a", "b", "scale", "offset"}, "QAT-LoRA": {"a", "b", "scale", "offset"},
                    "LR-QAT": {"a", "b", "scale"}}.get(row, {"a", "b"})


def test_lora_adds_its_product_to_the_frozen_weight():
    linear = torch.nn.Linear(8, 4)
    layer = bench.Beside(linear, 2)
    torch.nn.init.normal_(layer.b)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, linear.weight + 2 * layer.b @ layer.a, linear.bias))
    assert not linear.weight.requires_grad


def test_the_page_holds_ratios_to_the_lora_of_the_same_rank():
    found = {row: {"peak": 100 * (i + 1) * 2**20, "told": 110 * (i + 1) * 2**20, "weights": 10, "stored": 10} for i, row in enumerate(bench.ROWS)}
    page = bench.section({"torch": "x", "measured": {"small, float32": found}, "told": [
        {"row": "LR-QAT", "rows": 1, "length": 1024, "checkpointing": False, "weights": 7e9, "moments": 1e9, "peak": 2e10}]})
    assert "| L4Q | 200.0 MiB | 2.000 | 220.0 MiB | 1.100 |" in page and "| LR-QAT | 500.0 MiB | 1.250 |" in page
    assert "1.000 bytes a weight" in page and "| LR-QAT | 1 x 1024 | no | 7.0 GB | 1.0 GB | 20.0 GB |  | fits |" in page
