"""The bench of a saved model: its contenders, its rows, its refusals. No times are asserted."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small import write_llama
from torch import nn

from qatlas import bench as module
from qatlas.bench import Contender, bench, memory_speed, process
from qatlas.cli import main
from qatlas.core.error import CheckpointError, QuantError, RunError
from qatlas.layers.packed import Packed, PackedLinear
from qatlas.model.load import load
from qatlas.model.pack import save
from qatlas.model.rules import quantize


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    model, tokenizer = load(write_llama(folder / "full", width=256))
    return save(quantize(model, "w4-g32", target="gguf:q4_0"), folder / "packed", tokenizer)


def test_a_model_beside_itself_and_llamacpp(made: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    words = ["bench", made, "--ways", "fast,llama.cpp", "--prompt", 8, "--tokens", 3, "--repeats", 1, "--threads", 1, "--out", out]
    assert main([str(word) for word in words]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    fast, engine = found["rows"]
    assert fast["prefill"] > 0 and fast["decode"] > 0 and fast["peak"] > 0 and fast["file"] == (made / "model.safetensors").stat().st_size
    assert len(found["rounds"]["fast"]) == 1 and found["setting"]["threads"] == 1 and "layer" in fast["routes"][0]
    assert ("decode" in engine) == (find_spec("xllamacpp") is not None) and "threads: 1" in said and "fast" in said
    assert engine.get("routes", ["gguf:q4_0"]) == ["gguf:q4_0"] and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("dtype", process.TYPES.values())
def test_the_same_model_in_full_precision(made: Path, dtype: torch.dtype) -> None:
    packed, plain = load(made)[0], process.dequantized(load(made)[0], dtype)
    assert not any(isinstance(module, Packed) for module in plain.modules()) and plain.lm_head.weight.dtype == dtype
    with torch.no_grad():
        ours, theirs = (model(input_ids=torch.arange(12)[None]).logits.float() for model in (packed, plain))
    assert torch.allclose(ours, theirs, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_what_a_measurement_says_is_what_generation_says(made: Path) -> None:
    model, answer = process.begin(str(made), "exact", torch.get_num_threads())
    found = process.measure(model, prompt=6, tokens=5, seed=3)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, model.config.vocab_size, (1, 6), generator=draw)
    whole = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
    assert found["said"] == whole[0, 6:].tolist() and answer["routes"] == [] and answer["load"] > 0


def test_what_a_token_reads(made: Path) -> None:
    model = load(made)[0]
    table = model.get_input_embeddings().weight
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert process.read(model) == whole - table.numel() * table.element_size()
    model.lm_head.weight = table
    assert process.read(model) == sum({id(t): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}.values())


def test_a_row_tells_medians_and_an_absent_one_its_reason() -> None:
    one = Contender("exact", bytes=100, rounds=[(2.0, 4.0), (1.0, 8.0), (4.0, 2.0)])
    row = one.told(prompt=10, tokens=20, bandwidth=1e3)
    assert (row["prefill"], row["decode"], row["limit"]) == (5, 5, 10)
    assert Contender("fast", absent="because").told(1, 1, 1.0) == {"name": "fast", "absent": "because"}
    assert memory_speed(2**20, 1) > 0
    names = ["gguf:q8_0", "gguf:mxfp4", "gguf:tq1_0", "gguf:tq2_0", "gguf:q4_0"]
    assert sorted(names, key=module._width) == ["gguf:tq2_0", "gguf:tq1_0", "gguf:mxfp4", "gguf:q4_0", "gguf:q8_0"]


def test_a_process_that_dies_is_a_row(made: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module.sys, "executable", shutil.which("false"))
    found = bench(made, ways=["exact"], prompt=1, tokens=1, repeats=1)
    assert "absent" in found["rows"][0]


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    for more, words in (({"prompt": 0}, "at least 1"), ({"ways": ["slow"]}, "no way 'slow'")):
        with pytest.raises(RunError, match=words):
            bench(made, **more)
    with pytest.raises(CheckpointError, match="no packed layer"):
        bench(made.parent / "full")
    assert main(["bench", str(made), "--out", str(tmp_path / "none" / "x.json")]) == 2
    with pytest.raises(QuantError, match="no form in full precision"):
        layer = next(m for m in load(made)[0].modules() if isinstance(m, PackedLinear))
        layer.norm = nn.Identity()
        process.dequantized(nn.Sequential(layer), torch.float32)
