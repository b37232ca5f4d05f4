"""Benchmarks through lm-eval on a small packed model, with tasks and data of a folder. Without lm-eval the sentence alone is tested."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from small import WORDS

from qatlas.cli import main
from qatlas.core.error import CheckpointError, DataError, RunError
from qatlas.model.load import load
from qatlas.model.pack import pack, save
from qatlas.model.rules import quantize
from qatlas.train import benchmark as module
from qatlas.train.benchmark import benchmark, keep, read

needs = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'qatlas[eval]'")
CHOICE = """task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: animals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = """task: barn
dataset_path: json
dataset_kwargs: {data_files: {test: barn.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
QUESTIONS = [{"question": "the cat sat on a", "choices": [" mat", " red"], "answer": 0},
             {"question": "the dog ran to the", "choices": [" us", " red"], "answer": 1}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "animals.yaml").write_text(CHOICE)
    (folder / "barn.yaml").write_text(TEXT)
    (folder / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "barn.jsonl").write_text(json.dumps({"text": WORDS}) + "\n")
    return folder


@pytest.fixture(scope="module")
def packed(llama_dir, tmp_path_factory):
    model, _ = load(llama_dir)
    return save(pack(quantize(model, "w4-g32")), tmp_path_factory.mktemp("run") / "out", llama_dir)


@needs
def test_scores_are_those_of_the_packed_model_itself(packed, tasks, monkeypatch):
    model, tokenizer = load(packed)
    scores = benchmark(model, tokenizer, ["animals", "barn"], task_path=tasks)
    hits = 0
    for row in QUESTIONS:                                         # by hand
        sums = []
        for choice in row["choices"]:
            before, whole = (tokenizer(text)["input_ids"] for text in (row["question"], row["question"] + choice))
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(float(sum(logs[i - 1, whole[i]] for i in range(len(before), len(whole)))))
        hits += sums.index(max(sums)) == row["answer"]
    assert scores["animals"]["acc"] == hits / len(QUESTIONS)
    assert scores["barn"]["word_perplexity"] > 1 and scores["barn"]["bits_per_byte"] > 0
    assert benchmark(model, tokenizer, ["animals"], task_path=tasks, limit=1).keys() == {"animals"}


@needs
def test_the_command_prints_side_by_side_and_keeps_the_scores(packed, llama_dir, tasks, capsys):
    assert main(["eval", str(packed), str(llama_dir), "--tasks", "animals,", "--task_path", str(tasks)]) == 0
    said = capsys.readouterr().out
    assert "animals" in said and "acc" in said
    assert read(packed)["animals"]["scores"]["acc"] in (0.0, 0.5, 1.0) and read(llama_dir)["animals"]["shots"] is None
    (llama_dir / module.FILE).unlink()                            # the model is shared by other tests


@needs
@pytest.mark.parametrize("name", ["animal", "torn"])
def test_a_task_that_is_none(packed, tasks, name, tmp_path):
    model, tokenizer = load(packed)
    (tmp_path / "torn.yaml").write_text(CHOICE.replace("task: animals", "task: torn"))
    with pytest.raises(DataError, match="animal" if name == "animal" else "torn"):
        benchmark(model, tokenizer, [name], task_path=tasks if name == "animal" else tmp_path)


def test_without_the_package_one_sentence(packed, monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert main(["eval", str(packed), "--tasks", "animals"]) == 2
    assert "pip install 'qatlas[eval]'" in capsys.readouterr().err
    with pytest.raises(RunError, match="eval"):
        benchmark(torch.nn.Linear(2, 2), None, ["animals"])


def test_scores_add_up_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    keep(tmp_path, {"a": {"acc": 0.5}})
    keep(tmp_path, {"b": {"acc": 1.0}}, limit=3)
    assert read(tmp_path) == {"a": {"scores": {"acc": 0.5}, "lm-eval": "1"}, "b": {"scores": {"acc": 1.0}, "lm-eval": "1", "limit": 3}}
    (tmp_path / module.FILE).write_text("[]")
    with pytest.raises(CheckpointError, match="no scores of ours"):
        keep(tmp_path, {"a": {}})


def test_flags_of_benchmarks_need_benchmarks(packed, capsys):
    assert main(["eval", str(packed), "--limit", "3"]) == 2
    assert "--tasks" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert main(["eval", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--task_path", "lm-eval", "eval.json", "qatlas eval DIR OTHER"))
    assert Path(module.__file__).is_file()
