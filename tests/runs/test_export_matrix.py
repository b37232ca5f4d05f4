"""The matrix of exports: which form a target is tried with, and what its table says."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from qatlas.export import targets

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def runs():
    sys.path.insert(0, str(RUNS))
    try:
        spec = importlib.util.spec_from_file_location("export_matrix", RUNS / "export_matrix.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(RUNS))


def test_forms(runs):
    """Every target is tried with forms that exist, first with the one that it is for; every form is trained for a target that exists."""
    for model in ("stories", "zoo"):
        for bits in (4, 3, 2, 1.58):
            known = runs.forms(model, bits)
            assert {form.target for form in known.values()} <= set(targets())
            tried = {target: runs.order(target, known) for target in targets()}
            assert all(tried.values()) and {name for names in tried.values() for name in names} == set(known)
    assert tried["onnx:int4"][0] == "static" and tried["onnx:int4-weights"][0] == "channel"
    assert tried["torchao:w4a8"][0] == "zero" and tried["compressed-tensors:w4a8"][0] == "inputs" and tried["bitnet:bitlinear"][0] == "matrix"
    assert tried["gguf:mxfp4"][0] == "powers" and tried["gguf:f16"][0] == "short" and tried["gguf:q4_0"][0] == "channel"


def test_perplexity(runs):
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.1, 0.1, 0.8]]))
    assert runs.perplexity([logits], [torch.tensor([[2, 1, 0]])]) == pytest.approx((0.25 * 0.125) ** -0.5)


def run(**targets):
    return {"model": "zoo", "bits": 4.0, "format": "gguf", "steps": 40, "tokens": 2048, "targets": targets}


def read(**more):
    return {"by": "gguf, transformers", "weights": 0.0, "logits": 0.0, "largest": 20.0, "median": 0.0, "perplexity": 12.345} | more


def test_the_section(runs):
    exact = {"form": "one step a channel", "ours": 12.345, "bytes": 1, "read": [read()]}
    near = {"form": "one step a channel", "ours": 12.345, "bytes": 1,
            "read": [read(), {"by": "llama.cpp", "logits": 0.25, "median": 0.1, "perplexity": 12.5}]}
    made = runs.section([run(q4_1=exact, q5_0=exact, q4_0=near, q2_k={"refused": "no room"}, bf16={"refused": "3 of 64 values are no bf16 numbers"}),
                         run(q4_0={"refused": "no room"}) | {"bits": 3.0}])
    assert "| gguf: q4_1, q5_0 | gguf, transformers | a exact · 12.35 | not run | not run | not run |" in made      # alike: one row
    assert "| gguf: q4_0 | llama.cpp | a 2.5e-01 · 12.50 / 12.35 | [1] | not run | not run |" in made
    assert "| gguf: q2_k | – | [1] | not run" in made
    assert "\n1. no room\n" in made and "some values are no bf16 numbers" in made and "- a: one step a channel\n" in made
    assert "Of 6 targets asked 3 hold the model, 3 are refused" in made and "Weights: 3 of 3 readings" in made
    assert "1.26 %\n(gguf:q4_0, 4 bits, zoo:gpt, llama.cpp)" in made


def test_reasons_lose_what_is_only_one_blocks(runs):
    plain = sys.modules["export_matrix_page"].plain
    assert plain("64 inputs are no multiple of 256, the block of Q2_K") == "64 inputs are no multiple of 256, its block"
    said = "the values of this grid are not the {} of {}, nor those over a power of two"
    assert plain(said.format("integers 0 .. 3", "Q2_K")) == plain(said.format("integers -1 .. 1", "TQ1_0")) == said.format("integers", "its block")
    assert plain(said.format("numbers of E2M1", "MXFP4")) == said.format("numbers", "its block")
    assert plain("its input is quantized by A, and the file would say otherwise (B") == "its input is quantized otherwise than the file would say"


def test_a_reader_that_says_nothing(runs):
    mute = {"form": "f", "ours": 2.0, "bytes": 1, "read": [{"by": "gptqmodel", "why": "not installed", "missing": True}]}
    made = runs.section([run(w4=mute) | {"format": "gptq"}])
    assert "| gptq: w4 | gptqmodel | a [1] | not run" in made and "1. not installed" in made and "1 readings could not be made" in made
