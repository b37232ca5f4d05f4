"""The command line end to end: the main job on a small Llama, what it leaves, and each command on it. Bad input: test_refusals.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from small import FLAGS, WORDS, write_llama

from qatlas import cli, job
from qatlas.cli import COMMANDS, main
from qatlas.core.error import DataError
from qatlas.record import Record, versions

TARGET = "gguf:q4_0"


@pytest.fixture(scope="module")
def ask(llama_dir, text_file):
    """The flags of a run on the small model."""
    return lambda *more: ["run", "lsq", "--model", str(llama_dir), "--data", str(text_file), *FLAGS, "--steps", "3", *more]


@pytest.fixture(scope="module")
def made(ask, tmp_path_factory):
    """One whole run: (directory, exit code)."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, main(ask("--bits", "4", "--target", TARGET, "--out", str(out)))


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def flip(path: Path, at: int) -> None:
    """One bit of one byte; `at` from the end where negative."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def test_the_main_job_ends_well_with_every_proof(made):
    out, code = made
    assert code == 0
    proofs = Record.read(out).proofs
    assert len(proofs) == 5
    assert proofs[0]["claim"] == "the saved directory computes what the trained model computes"
    engine = proofs.pop()
    assert engine["passed"] is (True if find_spec("xllamacpp") else None), engine
    assert all(proof["passed"] for proof in proofs), proofs


def test_a_quantized_file_is_a_start_in_full_precision_and_says_so(made, text_file, tmp_path, capsys):
    file = Path(shutil.copy(made[0] / "exports" / "gguf-q4_0" / "model.gguf", tmp_path))
    flags = ["--model", str(file), "--data", str(text_file), *FLAGS, "--steps", "2"]
    assert main(["run", "lsq", *flags, "--plan"]) == 0
    assert "training starts in full precision from its dequantized weights" in capsys.readouterr().out
    assert main(["run", "lsq", *flags, "--bits", "3"]) == 0
    assert "training starts in full precision from its dequantized weights" in capsys.readouterr().err
    assert main(["eval", str(file), "--data", str(text_file), "--length", "32"]) == 0 and "perplexity" in capsys.readouterr().out


def test_what_a_run_leaves_behind(made):
    out, _ = made
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                    "exports/gguf-q4_0/model.gguf", "record.json", "report.html"}
    assert not (out / "state").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "qatlas"


def test_the_built_in_text_is_told(llama_dir, monkeypatch, capsys):
    """Nobody trains on Python's documentation without knowing."""
    def stop(*_, **__):
        raise DataError("enough")

    monkeypatch.setattr("qatlas.job.prepare", stop)
    assert main(["run", "lsq", "--model", str(llama_dir)]) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if "builtin:docs" in line and "--data" in line]
    for flags in (["--model", str(llama_dir), "--data", "a.txt"], ["--model", "zoo:gpt"]):
        assert main(["run", "lsq", *flags]) == 2
        assert "builtin:docs" not in capsys.readouterr().err


def test_the_record_tells_the_run(made, llama_dir, text_file):
    record = Record.read(made[0])
    assert list(record.scores) == ["full precision", "untrained", "trained", "packed"]
    assert record.scores["packed"] == record.scores["trained"] != record.scores["untrained"]
    assert (record.paper, record.model, record.data, record.target, record.arguments["bits"]) == ("lsq", str(llama_dir), str(text_file), TARGET, 4)
    assert len(record.history[0]["loss"]) == 3 and record.fingerprint and record.command.startswith("qatlas run lsq --model")
    assert record.sizes[TARGET] == (made[0] / "exports/gguf-q4_0/model.gguf").stat().st_size
    assert set(record.times) == {"load", "full precision", "trained", "packed", TARGET, "read back"}
    assert set(record.sums) == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                "exports/gguf-q4_0/model.gguf"}
    assert len(record.errors) == 14 and all(before != after for before, after in record.errors.values())


def test_nothing_is_kept_without_a_directory(ask, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(ask()) == 0
    said = capsys.readouterr()
    assert "nothing was kept" in said.out and "rounded, untrained" in said.out
    assert "%|" not in said.err, "a progress bar where nobody looks"
    assert not list(tmp_path.iterdir())


def test_plan_writes_nothing_and_says_what_would_happen(ask, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(ask("--bits", "4", "--target", TARGET, "--out", "never", "--plan")) == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "model.layers.1.mlp.down_proj" in said and "Uniform 4b" in said and "lm_head" in said
    for line in ("refusals         none", "peak memory", "seconds a step", "steps            3", "tokens           372"):
        assert line in said


def test_a_config_in_and_out_gives_the_same_run(ask, made, tmp_path, capsys):
    assert main(ask("--bits", "4", "--target", TARGET, "--print_config")) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    out = tmp_path / "out"
    assert main(["run", "lsq", "--config", str(file), "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["run", "lsq", "--config", str(file), "--bits", "3", "--print_config"]) == 0
    assert capsys.readouterr().out == printed.replace("bits: 4", "bits: 3", 1)


def test_eval_is_the_packed_models_score(made, capsys):
    assert main(["eval", str(made[0])]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["perplexity"]) == pytest.approx(Record.read(made[0]).scores["packed"]["perplexity"], rel=1e-4)


def test_eval_takes_any_model_with_data(llama_dir, text_file, made, capsys):
    assert main(["eval", str(llama_dir), "--data", str(text_file), "--length", "32"]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["perplexity"]) == pytest.approx(Record.read(made[0]).scores["full precision"]["perplexity"], rel=1e-4)


def test_generate_continues_the_prompt(made, capsys):
    assert main(["generate", str(made[0]), "--prompt", "the cat", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the cat")


def test_export_writes_a_second_target_and_verify_proves_both(copied, capsys):
    assert main(["export", str(copied), "--target", "gguf:q8_0"]) == 0
    assert (copied / "exports/gguf-q8_0/model.gguf").is_file()
    record = Record.read(copied)
    assert record.sizes["gguf:q8_0"] and "exports/gguf-q8_0/model.gguf" in record.sums
    assert main(["verify", str(copied)]) == 0
    said = capsys.readouterr().out
    assert "gguf:q8_0 holds the trained weights" in said and f"{TARGET} holds the trained weights" in said and "NO " not in said
    assert main(["verify", str(copied), "--target", "gguf:q8_0"]) == 0
    assert TARGET not in capsys.readouterr().out
    assert main(["export", str(copied), "--target", "gguf:q8_0"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("name, at, claim", [
    ("exports/gguf-q4_0/model.gguf", -5, f"{TARGET} holds the trained weights"),
    ("exports/gguf-q4_0/model.gguf", 0, f"{TARGET} holds the trained weights"),
    ("model.safetensors", -5, "the files are those that the run wrote"),
    ("model.safetensors", 9, "the saved directory loads"),
    ("tokenizer.json", -3, "the files are those that the run wrote")])
def test_a_flipped_bit_is_found(copied, capsys, name, at, claim):
    flip(copied / name, at)
    assert main(["verify", str(copied)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("NO ")]
    assert any(claim in line for line in failed), failed
    assert any("sha256" in line and name in line for line in failed)


def test_a_flipped_bit_is_found_without_a_record(copied, capsys):
    (copied / "record.json").unlink()
    assert main(["verify", str(copied)]) == 0
    flip(copied / "model.safetensors", -5)
    assert main(["verify", str(copied)]) == 1
    assert "NO       gguf:q4_0 holds the trained weights" in capsys.readouterr().out


def test_report_is_written_again(copied, capsys):
    (copied / "report.html").unlink()
    assert main(["report", str(copied)]) == 0
    assert capsys.readouterr().out.strip() == str(copied / "report.html")
    assert "<html" in (copied / "report.html").read_text()


def test_list_show_doctor_version(capsys):
    assert main(["list"]) == 0
    assert "LSQ: learned step size quantization." in capsys.readouterr().out
    assert main(["show", "lsq"]) == 0
    said = capsys.readouterr().out
    assert "Steven K. Esser" in said and "--scale_lr" in said
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in said and "xllamacpp" in said and TARGET in said
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == versions().get("qatlas", "a source tree, not installed")


@pytest.mark.parametrize("command", [[], ["--help"], ["run"], ["run", "--help"], *([name, "--help"] for name in COMMANDS if name != "run")])
def test_help_is_everywhere(command, capsys):
    assert main(command) == (2 if command == ["run"] else 0)
    said = capsys.readouterr().out
    assert "qatlas" in said and "<function" not in said and "Args:" not in said


def test_a_papers_help_has_every_argument_with_its_text(capsys):
    pytest.importorskip("docstring_parser")
    assert main(["run", "lsq", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for flag, text in {"--bits": "bits of the weights", "--group": "share a weight's step", "--distil": "full-precision model's logits",
                       "--model": "a hub id, a directory", "--target": "the artefact to train for", "--plan": "stop before training",
                       "--resume": "go on from the resume points"}.items():
        assert flag in said and text in said
    assert said.count("type:") == len([line for line in said.split("--") if "default:" in line])


# --- resume ---------------------------------------------------------------------------------------------------------------------------------------

def test_a_run_killed_at_a_step_resumes_to_the_same_bits(ask, tmp_path, capsys):
    """A process of its own, really killed (SIGKILL) once its first resume point lies on the disk."""
    more = ("--steps", "40", "--save_every", "1", "--bits", "2", "--input_bits", "8", "--distil")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(ask(*more, "--out", str(whole))) == 0
    source = Path(cli.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-m", "qatlas.cli", *ask(*more, "--out", str(killed))], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(source)}) as process:
        while process.poll() is None and not list(killed.glob("state/phase-01/step-*")):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (killed / "record.json").exists() and not (killed / "state/phase-01/done").exists()
    assert main(ask(*more, "--out", str(killed))) == 2             # without --resume it is another run's directory
    assert "--resume" in capsys.readouterr().err
    assert main(ask(*more, "--out", str(killed), "--bits", "3", "--resume")) == 2
    assert "belongs to another run" in capsys.readouterr().err
    assert main(ask(*more, "--out", str(killed), "--resume")) == 0
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    once, again = Record.read(whole), Record.read(killed)
    assert once.scores == again.scores and once.history[0]["loss"] == again.history[0]["loss"] and once.errors == again.errors
    assert not (killed / "state").exists()


@pytest.mark.parametrize("stage", ["export", "verify", "report"])
def test_a_run_that_stopped_after_training_resumes(ask, made, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    flags = ask("--bits", "4", "--target", TARGET, "--out", str(out))
    whole = getattr(job, stage)

    def stop(*arguments, **named):
        whole(*arguments, **named) if stage != "verify" else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, stage, stop)
        assert main(flags) == 130
    assert (out / "state/phase-01/done").is_dir()
    with monkeypatch.context() as patch:                           # not one step is trained again
        patch.setattr("qatlas.train.fit._step", None)
        assert main([*flags, "--resume"]) == 0
    for name in ("model.safetensors", "exports/gguf-q4_0/model.gguf"):
        assert (out / name).read_bytes().replace(b"\3\0\0\0\0\0\0\0out", b"") == (made[0] / name).read_bytes().replace(b"\3\0\0\0\0\0\0\0out", b"")
    assert not (out / "state").exists() and (out / "report.html").is_file()


def test_the_demo_in_two_steps(tmp_path, monkeypatch, capsys):
    """On a small model in place of the shipped one."""
    model, text = write_llama(tmp_path / "gpt", 256, max_position_embeddings=256), tmp_path / "text.txt"
    text.write_text(WORDS * 2000)
    monkeypatch.setattr("qatlas.demo.MODEL", str(model))
    monkeypatch.setattr("qatlas.demo.DATA", str(text))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "2", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "rounded, untrained" in said.out and (out / "exports/gguf-tq2_0/model.gguf").is_file()
    record = Record.read(out)
    assert record.command.startswith("qatlas run teacher_intervention --rows=True --clip=null")
    assert list(record.scores) == ["full precision", "untrained", "plain distillation", "trained", "packed"]
    assert all(proof["passed"] is not False for proof in record.proofs)


def test_the_package_is_a_command():
    source = Path(cli.__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "qatlas", "list"], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(source)})
    assert "lsq" in done.stdout
