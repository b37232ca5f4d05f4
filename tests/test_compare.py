"""Comparisons on a small Llama: every cell is run once, kept, gone on with, or refused aloud; equal means equal."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import wraps

import pytest
from small import FLAGS

from qatlas import compare as module
from qatlas import papers
from qatlas.cli import main
from qatlas.compare import Entry, compare, read_arguments
from qatlas.core.error import CheckpointError, RunError
from qatlas.prepare import Job
from qatlas.trial import Trials

RUNS = ["lsq-1-s0", "lsq-4-s0", "lsq-group=32-1-s0", "lsq-group=32-4-s0", "plain-32-s0"]


@pytest.fixture(scope="module")
def job(llama_dir, text_file, tmp_path_factory):
    return Job(model=str(llama_dir), data=str(text_file), length=32, batch=4, out=str(tmp_path_factory.mktemp("compare") / "out"))


@pytest.fixture(scope="module")
def made(job):
    return compare(["plain", "lsq", "lsq:group=32"], job, [4, 1], steps=2, seeds=1, shared={"lr": 1e-3}, against="lsq")


def test_each_cell_is_run_and_kept(job, made):
    from pathlib import Path

    out = Path(job.out)
    assert sorted(p.stem for p in (out / "runs").glob("*-s0.json")) == RUNS
    assert not list((out / "state").rglob("*.safetensors"))       # resume points go when a run ends well
    cell = made.of("lsq", 4.0)[0]
    assert cell.steps == 2 and cell.items == 2 * 4 * 31 and 0 < cell.bytes < made.full_bytes * 2 and {"untrained", "trained"} <= set(cell.scores)
    assert cell.arguments == {"lr": 1e-3, "steps": 2, "bits": 4} and made.of("plain", 32.0)[0].arguments == {"lr": 1e-3, "steps": 2}
    assert Trials.from_json(json.loads((out / "trials.json").read_text())) == made


def test_bits_that_a_paper_does_not_have_are_refused_aloud(made):
    assert "not bits=1" in made.refusal("lsq", 1.0) and not made.of("lsq", 1.0)
    assert made.beside("lsq:group=32", 4.0) is not None and made.verdict("lsq:group=32", 4.0) == "open"


def test_papers_are_held_against_a_paper(job, made):
    """Unasked, too: the control has no bits at which anything could be compared with it."""
    again = compare(["plain", "lsq", "lsq:group=32"], job, [4, 1], steps=2, seeds=1, shared={"lr": 1e-3})
    assert again.against == "lsq" and again.beside("lsq:group=32", 4.0) == made.beside("lsq:group=32", 4.0) is not None


def test_a_cell_is_what_its_command_makes(job, made, capsys):
    """The command of a cell, run alone, ends at the same score."""
    cell = made.of("lsq", 4.0)[0]
    from shlex import split

    from qatlas.record import Record

    out = job.out + "-alone"
    assert main([*split(cell.command)[1:], *FLAGS[-2:], "--out", out]) == 0
    assert Record.read(out).scores["trained"] == cell.scores["trained"]


def test_nothing_is_run_twice(job, made, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("it ran again"))
    again = compare(["plain", "lsq", "lsq:group=32"], job, [4, 1], steps=2, seeds=1, shared={"lr": 1e-3}, against="lsq")
    assert again.trials == made.trials


def test_a_stopped_run_goes_on(llama_dir, text_file, tmp_path, monkeypatch):
    job = Job(model=str(llama_dir), data=str(text_file), length=32, batch=4, save_every=1, out=str(tmp_path / "out"))
    whole = compare(["lsq"], replace(job, out=str(tmp_path / "whole")), [4], steps=3, seeds=1).trials[0]
    paper, seen = module.function("lsq"), []

    @wraps(paper)
    def stopped(model, task, **arguments):
        def loss(m, batch):
            seen.append(1)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return type(task).loss(task, m, batch)
        task.loss = loss
        return paper(model, task, **arguments)

    monkeypatch.setattr(module, "function", lambda name: stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(["lsq"], job, [4], steps=3, seeds=1)
    monkeypatch.undo()
    assert list((tmp_path / "out" / "state").rglob("*")) and not list((tmp_path / "out" / "runs").glob("*-s0.json"))
    assert compare(["lsq"], job, [4], steps=3, seeds=1).trials[0].scores["trained"] == whole.scores["trained"]


def test_other_conditions_do_not_mix(job, made):
    with pytest.raises(RunError, match="steps=2, not 5"):
        compare(["lsq"], job, [4], steps=5, seeds=1)
    with pytest.raises(RunError, match="was run with"):
        compare(["lsq"], job, [4], steps=2, seeds=1, shared={"lr": 2e-3})


def test_a_spoilt_run_is_named(job, made, tmp_path):
    import shutil

    shutil.copytree(job.out, tmp_path / "copy")
    (tmp_path / "copy" / "runs" / "lsq-4-s0.json").write_text("{")
    with pytest.raises(CheckpointError, match="lsq-4-s0.json is not a run"):
        compare(["lsq"], replace(job, out=str(tmp_path / "copy")), [4], steps=2, seeds=1, shared={"lr": 1e-3})


@pytest.mark.parametrize(("entries", "more", "match"), [
    (["lsqq"], {}, "nearest: lsq"), (["lsq:grop=3"], {}, "no argument 'grop'"), (["lsq:group"], {}, "write key=value"),
    (["lsq"], {"shared": {"speed": 1}}, "none of these papers has it"), (["lsq"], {"against": "paretoq"}, "none of the entries")])
def test_wrong_entries_fail_before_a_model_is_loaded(job, tmp_path, entries, more, match, monkeypatch):
    monkeypatch.setattr(module, "prepare", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(RunError, match=match):
        compare(entries, replace(job, out=str(tmp_path / "new")), [4], steps=2, **more)


def test_a_directory_of_other_things_is_left_alone(job, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other things"):
        compare(["lsq"], replace(job, out=str(tmp_path)), [4], steps=2)
    with pytest.raises(RunError, match="give --out"):
        compare(["lsq"], replace(job, out=None), [4], steps=2)


def test_arguments_are_read_as_people_write_them():
    assert read_arguments("a=1e-3, b=true,c=word,d=null,e=2") == {"a": 1e-3, "b": True, "c": "word", "d": None, "e": 2}
    assert Entry.read("plain:lr=1e-4").arguments == {"lr": 1e-4}


def test_the_command_line_compares(job, made, capsys):
    assert main(["compare", "plain", "lsq", "lsq:group=32", "--model", job.model, "--data", job.data, "--bits", "4,1", "--steps", "2", "--seeds", "1",
                 "--shared", "lr=1e-3", "--against", "lsq", "--length", "32", "--batch", "4", "--out", job.out]) == 0
    said = capsys.readouterr().out
    assert "refused" in said and "report.html" in said
    assert main(["compare", "lsq", "--bits", "four", "--out", job.out]) == 2


@pytest.mark.parametrize("name", papers.names())
def test_every_paper_says_what_it_claims(name):
    claim = papers.module(name).CLAIM
    assert claim.endswith(".") and 40 < len(claim) < 150
