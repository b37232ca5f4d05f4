"""Bad input: one clear error each, exit code 2, no traceback, nothing written and nothing overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FLAGS

from qatlas import job
from qatlas.cli import main


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys, llama_dir, text_file):
    """Run a command that must be refused: its message. The working directory stays as it is, and training never starts."""
    def never(*arguments):
        raise AssertionError("it began to train")

    def ask(*argv, model=llama_dir, data=text_file):
        shared = ["run", "lsq", "--model", str(model), "--data", str(data), *FLAGS, "--out", str(tmp_path / "out")]
        full = [*shared, *argv[1:]] if argv[0] == "lsq" else argv
        before = tree(tmp_path)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr("qatlas.train.fit._step", never)
            assert main([str(word) for word in full]) == 2
        assert tree(tmp_path) == before
        said = capsys.readouterr().err
        told = "\n".join(line for line in said.splitlines() if line.startswith("qatlas:") or (line.startswith("  ") and "ing " not in line[:12]))
        assert len([line for line in said.splitlines() if line.startswith("qatlas: ")]) == 1 and "Traceback" not in said
        return told

    return ask


@pytest.fixture
def spoilt(llama_dir, tmp_path):
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(llama_dir, tmp_path / "spoilt"))


@pytest.mark.parametrize("argv, words", [
    (["rum"], ["no command 'rum'", "nearest: run"]),
    (["run", "lsqq"], ["no paper 'lsqq'", "nearest: lsq"]),
    (["show", "ls"], ["no paper 'ls'", "lsq"]),
    (["lsq", "--bist", "4"], ["--bist", "--bits"]),
    (["lsq", "--bits", "four"], ["bits", "four"]),
    (["lsq", "--seed", "1.5"], ["seed", "1.5"]),
    (["lsq", "--plan", "perhaps"], ["plan", "perhaps"]),
    (["lsq", "--target", "gguf:q4_2"], ["no target 'gguf:q4_2'", "gguf:q4_0"]),
    (["lsq", "--target", "gguff:q4_0"], ["gguff", "nearest: gguf"]),
    (["lsq", "--task", "lmm"], ["no task 'lmm'", "lm"]),
    (["lsq", "--precision", "fp16"], ["fp16", "bf16"]),
    (["lsq", "--steps", "0"], ["steps=0"]),
    (["lsq", "--batch", "0"], ["at least one row"]),
    (["lsq", "--bits", "9.5"], ["9.5"]),
    (["lsq", "--bits", "1"], ["bits=1"]),
    (["lsq", "--input_bits", "0"], ["bits"]),
    (["lsq", "--warmup", "2"], ["warmup"]),
    (["lsq", "--config", "none.yaml"], ["none.yaml"]),
    (["run", "lsq", "--steps"], ["--steps"]),
    (["export", "nowhere"], ["--target"]),
    (["export", "nowhere", "--target", "gguf:q4_0"], ["nowhere"]),
    (["verify", "nowhere"], ["nowhere"]),
    (["eval", "nowhere"], ["nowhere", "record.json", "--data"]),
    (["eval", "zoo:gpt"], ["zoo:gpt", "--data"]),
    (["generate", "zoo:gpt", "--tokens", "0"], ["tokens=0"]),
    (["generate", "zoo:gpt", "--prompt", ""], ["prompt", "no tokens"]),
    (["run", "lsq", "--model", "zoo:vit"], ["builtin:docs", ".npz"]),
    (["report", "nowhere"], ["nowhere", "record.json"]),
    (["generate", "./nowhere"], ["there is no directory ./nowhere"]),
    (["show"], ["paper"]),
    (["run", "lsq", "--resume"], ["nothing to resume", "--out"]),
    (["demo", "--step", "3"], ["--step", "--steps"]),
])
def test_words_that_mean_nothing(refused, argv, words):
    said = refused(*argv)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("shape, words", [((40, 28, 28), ["1 x 28 x 28"]), ((40, 16, 16, 3), ["3 x 16 x 16"])])
def test_images_that_the_model_cannot_take(refused, tmp_path, shape, words):
    file = tmp_path / "images.npz"
    np.savez(file, x_train=np.arange(np.prod(shape)).reshape(shape).astype(np.uint8), y_train=np.arange(40) % 10)
    said = refused("run", "lsq", "--model", "zoo:vit", "--data", file)
    assert all(word in said for word in (*words, "images.npz", "zoo:vit")), said


def test_bits_that_the_target_cannot_hold(refused):
    said = refused("lsq", "--bits", "4", "--target", "gguf:tq2_0")
    assert "model.layers.0.self_attn.q_proj" in said and "gguf:q4_0" in said and "13 more layers" in said


def test_a_width_that_the_target_cannot_hold(refused):
    said = refused("lsq", "--bits", "1.58", "--target", "gguf:tq2_0")
    assert "64 inputs are no multiple of 256" in said and "model.layers.0.self_attn.q_proj" in said and "gguf:q8_0" in said


def test_an_architecture_that_the_target_does_not_know(refused, tmp_path, llama_dir):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = Path(shutil.copytree(llama_dir, tmp_path / "gpt2"))
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=300, n_positions=64, bos_token_id=0, eos_token_id=0)).save_pretrained(other)
    assert "knows no architecture 'gpt2'" in refused("lsq", "--target", "gguf:q4_0", model=other)


def test_a_group_that_does_not_divide(refused):
    said = refused("lsq", "--group", "48")
    assert "model.layers.0.self_attn.q_proj" in said and "48" in said and "32" in said


@pytest.mark.parametrize("text, words", [
    ('[{"is": "model.rules:Rule", "where": "*.q_prj", "weight": null}]', ["'*.q_prj'", "q_proj"]),
    ('{"is": "model.rules:Rule", "where": "*"}', ["no list of rules"]),
    ("[{", ["cannot be read as rules"]),
    ('[{"is": "model.rules:Rul", "where": "*"}]', ["Rul"]),
    ('[{"is": "os:system", "where": "*"}]', ["os:system"]),
    (None, ["cannot be read as rules"])])
def test_rules_that_cannot_be_applied(refused, tmp_path, text, words):
    file = tmp_path / "rules.json"
    file.write_text(text) if text is not None else None
    said = refused("lsq", "--rules", file)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("name, text, words", [
    ("none.txt", None, ["there is no file", "beside.txt"]),
    ("empty.txt", "", ["is empty"]),
    ("blank.txt", " \n", ["holds no text"]),
    ("short.txt", "the cat sat", ["fewer than one window of 32"]),
    ("rows.jsonl", '{"word": "cat"}\n' * 50, ["no column 'text'", "word"]),
    ("rows.json", "[1, 2]", ["objects"]),
    ("torn.json", "[{", ["torn.json", ".json"]),
    ("latin.txt", b"caf\xe9 " * 500, ["UTF-8"]),
    ("junk.parquet", b"junk", ["cannot be read as .parquet"])])
def test_data_that_is_none(refused, tmp_path, name, text, words):
    (tmp_path / "beside.txt").write_text("x")
    file = tmp_path / name
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused("lsq", data=file)
    assert all(word in said for word in words), said


def test_a_table_is_asked_for_its_columns(refused, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"word": "cat"}\n' * 50)
    assert "messages" in refused("lsq", "--task", "chat", data=file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights(refused, spoilt, value):
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused("lsq", model=spoilt)


@pytest.mark.parametrize("keep", [4, 40, 20_000])
def test_truncated_weights(refused, spoilt, keep):
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refused("lsq", model=spoilt)


def test_pickles_are_never_opened(refused, spoilt):
    torch.save(load_file(spoilt / "model.safetensors"), spoilt / "pytorch_model.bin")
    (spoilt / "model.safetensors").unlink()
    said = refused("lsq", model=spoilt)
    assert "pytorch_model.bin" in said and "never opened" in said


def test_a_directory_that_is_no_model(refused, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    assert "no config.json; found: cat.jpg" in refused("lsq", model=tmp_path / "photos")
    (tmp_path / "photos" / "config.json").write_text("{}")
    assert "photos" in refused("lsq", model=tmp_path / "photos")


def test_no_tokenizer(refused, spoilt):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (spoilt / name).unlink()
    said = refused("lsq", model=spoilt)
    assert "has no tokenizer" in said and "tokenizer.json" in said


def test_a_model_that_is_quantized_already(llama_dir, text_file, refused, tmp_path):
    done = tmp_path / "done"
    assert main(["run", "lsq", "--model", str(llama_dir), "--data", str(text_file), *FLAGS, "--steps", "1", "--out", str(done)]) == 0
    assert "quantized already" in refused("lsq", model=done)
    assert "holds another run" in refused("lsq", "--out", done)                # the later --out is the one that counts
    assert "nothing to resume" in refused("lsq", "--out", done, "--resume")
    assert "holds no export 'gguf:q4_0'" in refused("verify", done, "--target", "gguf:q4_0")
    assert "gguf:q4_0 cannot hold" in refused("export", done, "--target", "gguf:q4_0")
    (done / "record.json").write_text('{"paper": "x", "colour": 3}')
    assert "not a record" in refused("report", done)


def test_a_directory_of_someone_elses(refused, tmp_path, llama_dir):
    assert "holds another run or model" in refused("lsq", "--out", llama_dir)
    (tmp_path / "sharded").mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / "sharded" / name).write_text("{}")
    assert "model-00001-of-00002.safetensors" in refused("lsq", "--out", tmp_path / "sharded")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused("lsq", "--out", tmp_path / "file")


@pytest.mark.parametrize("changed, word", [
    (["--bits", "3"], "model"), (["--steps", "9"], "steps"), (["--lr", "0.1"], "optimizer"), (["--seed", "5"], "seed"), (["--batch", "2"], "task"),
    (["--target", "gguf:q4_0"], "model"), (["--distil"], "loss"), (["--input_bits", "8"], "model"), (["--warmup", "0.5"], "schedule")])
def test_resume_with_other_arguments(refused, llama_dir, text_file, tmp_path, monkeypatch, changed, word):
    out = tmp_path / "out"
    argv = ["run", "lsq", "--model", str(llama_dir), "--data", str(text_file), *FLAGS, "--steps", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(job, "place", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(argv) == 130
    said = refused("lsq", "--steps", "1", "--resume", *changed)
    assert "belongs to another run" in said and word in said


def test_a_torn_resume_point(refused, llama_dir, text_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = ["run", "lsq", "--model", str(llama_dir), "--data", str(text_file), *FLAGS, "--steps", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(job, "place", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(argv) == 130
    file = out / "state/phase-01/done/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated or changed" in refused("lsq", "--steps", "1", "--resume")


# --- extras ---------------------------------------------------------------------------------------------------------------------------------------

def test_without_llama_cpp_the_proof_says_so(llama_dir, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qatlas.export.gguf.readers.available", lambda: False)
    argv = ["run", "lsq", "--model", str(llama_dir), "--data", str(text_file), *FLAGS, "--steps", "1", "--target", "gguf:q4_0"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "not made" in (said := capsys.readouterr().out) and "pip install 'qatlas[llamacpp]'" in said


def test_doctor_names_the_extras_that_are_missing(monkeypatch, capsys):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in ("xllamacpp", "PIL") else there(name, *rest))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "qatlas[llamacpp]" in said and "qatlas[vision]" in said


def test_encoded_images_without_pillow(refused, tmp_path, monkeypatch):
    import sys

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"jpeg": [b"x"] * 40, "label": [0, 1] * 20}), tmp_path / "images.parquet")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'qatlas[vision]'" in refused("lsq", model="zoo:resnet", data=tmp_path / "images.parquet")


def test_labels_that_the_model_has_no_place_for(refused, tmp_path):
    import numpy as np

    np.savez(tmp_path / "images.npz", x=np.zeros((40, 32, 32, 3), dtype=np.uint8), y=np.arange(40) % 12)
    assert "labels 0 to 11" in refused("lsq", model="zoo:resnet", data=tmp_path / "images.npz")


def test_curves_without_tensorboard(refused, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install 'qatlas[tensorboard]'" in refused("lsq", "--tensorboard")


def test_an_image_model_runs_too_and_speaks_not(tmp_path, capsys):
    """zoo:resnet on eight by eight pixels: packed, proved, no target."""
    import numpy as np

    draw = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=draw.integers(0, 255, (80, 32, 32, 3), dtype=np.uint8), y=np.arange(80) % 10)
    out = tmp_path / "out"
    flags = ["--data", str(tmp_path / "images.npz"), "--batch", "4", "--steps", "2", "--threads", "1", "--out", str(out)]
    assert main(["run", "lsq", "--model", "zoo:resnet", "--input_bits", "8", "--static", *flags]) == 0
    assert "from_pretrained" in capsys.readouterr().out and json.loads((out / "config.json").read_text())["quantization_config"]
    assert main(["eval", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["generate", str(out)]) == 2


