"""The main job as a function: stages, preparation, plans, exports. The command line's view of it: test_cli.py."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import write_llama

from qatlas import keep
from qatlas.core.error import DataError, FormatError, QatlasError, QuantError, RuleError, RunError
from qatlas.core.qtensor import QTensor
from qatlas.export import awq, compressed_tensors, gptq, torchao
from qatlas.job import generate, plan, run
from qatlas.model.fold import folded
from qatlas.model.load import load
from qatlas.model.pack import checkpoint
from qatlas.model.rules import Rule
from qatlas.model.verify import exports, verify
from qatlas.prepare import Job, prepare, read_rules
from qatlas.record import Record
from qatlas.train.run import Run

ARGUMENTS = {"bits": 4, "steps": 2}


@pytest.fixture
def small(llama_dir, text_file):
    return Job(model=str(llama_dir), data=str(text_file), length=32, batch=4, threads=1)


def test_stages_are_said_and_timed(small, tmp_path):
    said = []
    outcome = run("lsq", ARGUMENTS, replace(small, out=str(tmp_path / "out"), watch=1), say=said.append)
    assert [line.split(" ")[0] for line in said] == ["loading", "judging", "lsq:", "judging", "packing", "reading"]
    assert outcome.out == tmp_path / "out" and outcome.record.curve[0][0] == 1
    assert outcome.record.job["watch"] == 1 and Record.read(outcome.out).job["length"] == 32
    assert set(outcome.record.samples) == {"full precision", "packed"}


def test_norms_are_folded_before_anything_else(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.zeros((40, 32, 32, 3), np.uint8), y=np.arange(40) % 10)
    small = Job(data=str(tmp_path / "images.npz"), batch=2, fold=True)
    model, _, _ = prepare(replace(small, model="zoo:resnet"), Run(progress=False))
    assert len(folded(model)) > 5 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(QuantError, match="has no batch norm.*it has none"):
        prepare(replace(small, model="zoo:vit"), Run(progress=False))


def test_the_packed_directory_is_the_packed_model(small, tmp_path):
    outcome = run("lsq", ARGUMENTS, replace(small, out=str(tmp_path / "out")))
    again, tokenizer = load(tmp_path / "out")
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(again(ids).logits, outcome.model(ids).logits)
    assert generate(again, tokenizer, "the cat", 5) == generate(outcome.model, tokenizer, "the cat", 5)


def test_the_seed_decides_and_the_directory_does_not(small, tmp_path):
    def weights(name, **changes):
        run("lsq", ARGUMENTS, replace(small, out=str(tmp_path / name), **changes))
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert weights("one") == weights("two") == weights("three", micro=4) != weights("four", seed=1)


def test_a_plan_trains_nothing_and_keeps_nothing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan("lsq", ARGUMENTS, replace(small, target="gguf:q4_0", out="out"))
    assert found["steps"] == 2 and found["tokens"] == 2 * 4 * 31 and found["peak memory"] > 2**20 and found["seconds"] > 0
    assert [row["weight"] for row in found["coverage"]].count("Uniform 4b") == 14 and found["refusals"].startswith("none")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FormatError, match="q_proj"):
        plan("lsq", {"bits": 8}, replace(small, target="gguf:q4_0"))


def test_a_paper_that_trains_nothing_has_no_plan(small, monkeypatch):
    monkeypatch.setattr("qatlas.papers.paper", lambda name: lambda model, task: model)
    with pytest.raises(RunError, match="nothing to plan"):
        plan("lsq", {}, small)


def test_extra_rules_come_first(small, tmp_path):
    file = tmp_path / "rules.json"
    file.write_text(json.dumps([Rule("*.down_proj", weight=None).to_json()]))
    assert read_rules(str(file)) == (Rule("*.down_proj", weight=None),)
    record = run("lsq", ARGUMENTS, replace(small, rules=str(file))).record
    assert [row["weight"] for row in record.coverage if row["name"].endswith("down_proj")] == ["full", "full"]
    assert read_rules(None) == ()
    file.write_text("{}")
    with pytest.raises(RuleError):
        read_rules(str(file))


@pytest.mark.parametrize("changes, kind", [({}, "LanguageModelling"), ({"task": "lm"}, "LanguageModelling")])
def test_the_task_follows_from_the_model(small, changes, kind):
    model, tokenizer, task = prepare(replace(small, **changes), Run(None, progress=False))
    assert type(task).__name__ == kind and tokenizer is not None and not model.training


def test_a_sentence_classifier_is_seen_by_its_configuration(small, tmp_path, llama_dir):
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path / "bert"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama_dir / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                             max_position_embeddings=64, num_labels=2)).save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"sentence": "the cat sat" if i % 2 else "a red barn", "label": i % 2}) + "\n" for i in range(60)))
    out = tmp_path / "out"
    outcome = run("lsq", {**ARGUMENTS, "input_bits": 8}, replace(small, model=str(folder), data=str(rows), out=str(out)))
    assert "accuracy" in outcome.record.scores["packed"] and all(proof["passed"] for proof in outcome.record.proofs)
    with pytest.raises(FormatError, match="bert"):
        prepare(replace(small, model=str(folder), data=str(rows), target="gguf:q4_0"), Run(None))


def test_words_as_labels_are_told_and_kept(small, tmp_path, monkeypatch, llama_dir):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    words = AutoTokenizer.from_pretrained(llama_dir)
    words.pad_token = words.eos_token
    model = BertForSequenceClassification(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3))
    monkeypatch.setattr("qatlas.prepare.load", lambda *_: (model, words))
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence,label\n" + "the cat sat,good\na red barn,bad\n" * 30)
    said = []
    prepare(replace(small, task="classification", data=str(rows)), Run(None, progress=False), said.append)
    assert said == ["labels: 0 is bad, 1 is good"]
    assert model.config.id2label == {0: "bad", 1: "good", 2: "LABEL_2"} and model.config.label2id["good"] == 1 and model.config.num_labels == 3
    rows.write_text("sentence,label\n" + "a,b\na,c\na,d\na,e\n" * 30)
    with pytest.raises(DataError, match="labels 0 to 3"):
        prepare(replace(small, task="classification", data=str(rows)), Run(None, progress=False))


@pytest.mark.parametrize("doing", [run, plan])
@pytest.mark.parametrize("paper, arguments, said", [
    ("lsq", {"bits": 9}, "bits=9"), ("lsq", {"bits": 9, "distil": True}, "bits=9"), ("lsq", {"input_bits": 1}, "input_bits=1"),
    ("lsq", {"teacher_cache": "x"}, "distil"), ("lsq", {"bist": 4}, "nearest: bits"), ("paretoq", {"bits": 5}, "bits=5"),
    ("bitnet", {"bits": 2}, "bits=2"), ("bitnet", {"sub_norm": True}, "sub_norm"), ("teacher_intervention", {"mode": "outputt"}, "nearest: output"),
    ("teacher_intervention", {"first": 7, "steps": 7}, "first=7")])
def test_a_papers_arguments_are_refused_before_the_model_is_loaded(small, monkeypatch, doing, paper, arguments, said):
    def never(*_):
        raise AssertionError("it loads")

    monkeypatch.setattr("qatlas.prepare.start", never)
    with pytest.raises(QatlasError, match=said):
        doing(paper, arguments, replace(small, target="gguf:tq2_0"))
    with pytest.raises(AssertionError, match="it loads"):
        doing(paper, {}, small)


def test_missing_data_is_refused_before_the_model_is_loaded(small, monkeypatch):
    for way in ("load", "start"):
        monkeypatch.setattr(f"qatlas.prepare.{way}", None)
    with pytest.raises(DataError, match="there is no file none.txt"):
        prepare(replace(small, data="none.txt"), Run(None))


def test_an_unknown_task(small):
    with pytest.raises(DataError, match="no task 'speech'"):
        prepare(replace(small, task="speech"), Run(None))


def test_exports_of_one_run_stand_side_by_side(small, tmp_path):
    out = tmp_path / "out"
    run("lsq", {"bits": 1.58, "steps": 1}, replace(small, model=str(write_llama(tmp_path / "wide", 256)), target="gguf:tq2_0", out=str(out)))
    path = keep.add_export(out, "gguf:q4_0")
    assert path == out / "exports/gguf-q4_0/model.gguf" and (out / "exports/gguf-tq2_0/model.gguf").is_file()
    with pytest.raises(FormatError, match="exists"):
        keep.add_export(out, "gguf:q4_0")
    with pytest.raises(FormatError, match="no target"):
        keep.add_export(out, "gguf:q9_0")
    assert set(Record.read(out).sizes) == {"full precision", "packed", "gguf:tq2_0", "gguf:q4_0"}


@pytest.mark.skipif(bool(compressed_tensors.lacks()), reason="needs compressed-tensors")
def test_a_directory_is_an_export_as_well(small, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    outcome = run("lsq", {**ARGUMENTS, "group": 32}, replace(small, target="compressed-tensors:w4a16", out=str(out)))
    assert all(proof["passed"] for proof in outcome.record.proofs) and len(outcome.record.proofs) == 4
    made = out / "exports/compressed-tensors-w4a16"
    assert {path.name for path in made.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    assert outcome.record.sizes["compressed-tensors:w4a16"] == (made / "model.safetensors").stat().st_size
    assert "exports/compressed-tensors-w4a16/config.json" in outcome.record.sums
    ids = torch.arange(12).view(1, 12)
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert torch.equal(theirs(ids).logits, outcome.model(ids).logits)
    assert keep.add_export(out, "compressed-tensors:mixed").is_dir() and set(exports(out)) == {f"compressed-tensors:{k}" for k in ("w4a16", "mixed")}
    assert [proof.passed for proof in verify(out, sums=Record.read(out).sums)] == [True] * 6
    with pytest.raises(FormatError, match="exists"):
        keep.add_export(out, "compressed-tensors:w4a16")
    with pytest.raises(FormatError, match="its input is in full precision"):
        keep.add_export(out, "compressed-tensors:w4a8")


def test_gptq_and_awq_are_exports_as_well(small, tmp_path):
    """One run for both: groups of 32 around zero are the same numbers in both."""
    out = tmp_path / "out"
    outcome = run("lsq", {**ARGUMENTS, "group": 32}, replace(small, target="gptq:w4", out=str(out)))
    reads = None if gptq.lacks() else True
    assert [proof["passed"] for proof in outcome.record.proofs] == [True, True, reads, *([True] if reads else [])], outcome.record.proofs
    made = out / "exports/gptq-w4"
    assert {path.name for path in made.iterdir()} >= {"model.safetensors", "config.json", "quantize_config.json", "tokenizer.json"}
    assert keep.add_export(out, "awq:w4").is_dir() and keep.add_export(out, "gptq:w4_v2").is_dir()
    assert set(exports(out)) == {"gptq:w4", "gptq:w4_v2", "awq:w4"} and all(proof.passed in (True, None) for proof in verify(out))
    trained = checkpoint(outcome.model).tensors
    for form, name in ((gptq, "gptq-w4"), (gptq, "gptq-w4_v2"), (awq, "awq-w4")):
        found = form.qtensors(out / "exports" / name)
        assert all(torch.equal(found[n].dequantize(), t.dequantize()) for n, t in trained.items() if isinstance(t, QTensor))
    with pytest.raises(FormatError, match="gptq:w2 cannot hold model.layers.0.* no integers of 2 bits"):
        keep.add_export(out, "gptq:w2")


@pytest.mark.skipif(bool(compressed_tensors.lacks()), reason="needs compressed-tensors")
def test_inputs_are_trained_as_the_format_says(small, tmp_path):
    target = "compressed-tensors:w8a8"
    outcome = run("lsq", {"bits": 8, "input_bits": 8, "steps": 2}, replace(small, target=target, out=str(tmp_path / "out")))
    assert [proof["passed"] for proof in outcome.record.proofs] == [True] * 4
    assert outcome.model.model.layers[0].mlp.up_proj.input_quantizer.quant.scale.reach == 127.5
    with pytest.raises(FormatError, match="its input is in full precision"):
        plan("lsq", {"bits": 8}, replace(small, target=target))


@pytest.mark.parametrize("paper, arguments, target", [
    pytest.param("lsq", {"bits": 4, "group": 32, "input_bits": 8, "steps": 2}, "torchao:w4a8",
                 marks=pytest.mark.skipif(bool(torchao.lacks()), reason="needs torchao")),
    ("bitnet", {"steps": 2}, "bitnet:bitlinear")])
def test_a_directory_whose_layers_quantize_inputs_in_their_own_way(paper, arguments, target, small, tmp_path):
    outcome = run(paper, arguments, replace(small, target=target, out=str(tmp_path / "out")))
    assert [proof["passed"] for proof in outcome.record.proofs] == [True] * 4
    assert outcome.record.proofs[-1]["tolerance"].startswith("0.1 of the largest logit: ")
    scale = outcome.model.model.layers[0].mlp.up_proj.qtensor().steps
    assert torch.equal(scale.bfloat16().float(), scale) if paper == "lsq" else torch.equal(1 / (1 / scale), scale)


def test_what_a_killed_save_left_is_taken_away(small, tmp_path):
    out = tmp_path / "out"
    for name in (".model", "..model.77.part"):
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_bytes(b"half")
    run("lsq", ARGUMENTS, replace(small, out=str(out)))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
