"""Tables, figures and words of Teacher Intervention's experiment, from runs that were made up."""

import doctest
import importlib
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

from qatlas.core.error import RunError

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {"plain": 4.0, "restart": 3.6, "TI-O": 4.4, "TI-M": 3.8, "TI-G": 3.2}


@pytest.fixture
def made(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    return importlib.import_module("teacher_intervention_table")


@pytest.fixture
def numbers(made):
    return importlib.import_module("teacher_intervention_runs")


@pytest.fixture
def figures(made):
    return importlib.import_module("teacher_intervention_figures")


def run(task="cola", row="plain", seed=0, loss=4.0, **given):
    """Loss falls on a line from 10 at step 10 to `loss` at step 50; a step takes half a second."""
    curve = [[step, step / 2, 10 + (loss - 10) * (step - 10) / 40] for step in range(10, 51, 10)]
    return {"task": task, "row": row, "seed": seed, "batch": 16, "steps": 50, "first": 0 if row == "plain" else 12, "lr": 2e-4, "metric": "matthews",
            "scores": {"matthews": 0.25 + seed / 100, "loss": 0.6}, "teacher": {"matthews": 0.5} if row == "plain" else None, "loss": loss,
            "curve": curve, "history": [], "seconds": 40.0, "threads": 1, "depth": [0.1, 0.05 * loss],
            **({"sharpness": 100 * loss} if seed == 0 else {}), **given}


def put(folder, *runs):
    for one in runs:
        (folder / f"{one['task']}-{one['seed']}-{one['row']}.json").write_text(json.dumps(one))
    return folder


def whole(folder, task="cola", skip=(), shift=0.1, **given):
    """Three seeds of all rows; each seed's loss is by `shift` higher."""
    return put(folder, *(run(task, row, seed, loss + shift * seed, **given) for row, loss in LOSSES.items() for seed in range(3)
                         if (row, seed) not in skip))


def cells(table):
    """row -> head -> cell."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    assert all(len(line) == len(head) for line in lines)
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_examples(made, numbers, figures):
    for module in (numbers, figures):
        failed, tried = doctest.testmod(module)
        assert tried and not failed


def test_table(made, tmp_path):
    found = cells(made.table(made.read(whole(tmp_path))["cola"]))
    assert list(found) == list(LOSSES)
    plain, guided, worse = found["plain"], found["TI-G"], found["TI-O"]
    assert plain["matthews (teacher 0.500)"] == "0.260 ± 0.010" and plain["held-out loss"] == "4.100 ± 0.100"
    assert plain["to plain"] == "1.000" and plain["steps to plain's loss"] == "50" and plain["CPU s to plain's loss"] == "25"
    assert (plain["below plain"], plain["below restart"], plain["seeds"]) == ("–", "0 of 3", "3")
    assert guided["to plain"] == f"{sum((3.2 + s) / (4.0 + s) for s in (0, 0.1, 0.2)) / 3:.3f}"
    assert guided["steps to plain's loss"] == "45" and guided["CPU s to plain's loss"] == "23"
    assert (guided["below plain"], guided["below restart"]) == ("3 of 3", "3 of 3")
    assert guided["last block's MSE"] == "0.1650 ± 0.0050" and guided["sharpness"] == "320.0"
    assert worse["steps to plain's loss"] == worse["CPU s to plain's loss"] == "not reached" and worse["below plain"] == "0 of 3"


@pytest.mark.parametrize("target, steps", [(10.0, (10, 5.0, True)), (11.0, (10, 5.0, True)), (7.0, (30, 15.0, False)), (6.25, (35, 17.5, False)),
                                           (4.0, (50, 25.0, False)), (3.99, None), (math.nan, None)])
def test_reached(numbers, target, steps):
    assert numbers.reached(run(loss=4.0), target) == steps


def test_the_last_step_is_a_point_of_the_curve(numbers):
    short = run(loss=4.0, steps=53)
    assert numbers.curve(short)[-1] == (53, 26.5, 4.0)
    assert numbers.curve(run(loss=4.0, curve=[[20, 8.0, 9.0]]))[-1] == (50, 20.0, 4.0)
    assert numbers.reached({**short, "loss": 3.0}, 3.5) == (51.5, 25.75, False)
    assert numbers.curve(run(curve=[])) == [] and numbers.reached(run(curve=[]), 9.0) is None


def test_a_curve_that_was_not_finite(numbers):
    broken = run(curve=[[10, 5.0, math.nan], [20, 10.0, 5.0], [50, 25.0, 4.0]])
    assert numbers.reached(broken, 6.0) == (20, 10.0, False)


def test_only_equal_seeds_are_compared(made, tmp_path):
    skip = {("plain", 0), ("restart", 1), ("restart", 2), ("TI-G", 2), ("TI-M", 0), ("TI-M", 1), ("TI-M", 2)}
    runs = made.read(whole(tmp_path, skip=skip))
    found = cells(made.table(runs["cola"]))
    assert (found["TI-G"]["seeds"], found["TI-G"]["below plain"], found["TI-G"]["below restart"]) == ("2 (0, 1)", "1 of 1", "1 of 1")
    assert (found["restart"]["to plain"], found["restart"]["steps to plain's loss"]) == ("–", "–")
    assert set(found["TI-M"].values()) == {"TI-M", "none", "–"}
    lacks = made.missing(runs)
    assert lacks.startswith("cola: plain (seed 0), restart (seed 1, 2), TI-M (seed 0, 1, 2), TI-G (seed 2); sst2: all; ")
    assert "TI-O" not in lacks and lacks in made.section(runs, "x")


def test_nothing_is_said_to_be_missing_where_all_is_there(made, tmp_path):
    for task in made.MODELS:
        whole(tmp_path, task)
    runs = made.read(tmp_path)
    assert made.missing(runs) == "" and "missing" not in made.section(runs, "x")
    assert list(made.MODELS) == list(runs)


def test_verdicts(made):
    def rows(*losses):
        return {row: {seed: run(row=row, seed=seed, loss=loss[at]) for seed, loss in enumerate(losses)} for at, row in ((0, "TI-G"), (1, "plain"))}

    assert made.verdict(rows((3, 4), (3, 4)), "plain") == "TI-G beats plain (held-out loss lower in 2 of 2 seeds, -25.0 % on average)."
    assert made.verdict(rows((5, 4), (4, 4)), "plain") == "TI-G does not beat plain (held-out loss lower in 0 of 2 seeds, +12.5 % on average)."
    open_ = "Whether TI-G beats plain is not clear (held-out loss lower in 1 of "
    assert made.verdict(rows((5, 4), (3, 4)), "plain") == f"{open_}2 seeds, +0.0 % on average)."
    assert made.verdict(rows((3, 4)), "plain") == f"{open_}1 seed, -25.0 % on average)."
    assert "not finite" in made.verdict(rows((math.nan, 4), (5, 4)), "plain")
    assert made.verdict({"TI-G": {0: run()}, "plain": {1: run()}}, "plain") == "Whether TI-G beats plain is open: no seed has both."


def test_scores_that_are_all_the_same_are_said_to_tell_nothing(made, tmp_path):
    same = made.read(whole(tmp_path, scores={"matthews": 0.0}))
    assert "Every run has the same matthews, 0.000: it tells nothing here." in made.summary("cola", same["cola"])
    (tmp_path / "b").mkdir()
    assert "same" not in made.summary("cola", made.read(whole(tmp_path / "b"))["cola"])


def test_the_claim_beside_what_came_out(made, tmp_path):
    runs = made.read(whole(tmp_path))
    said = made.claims(runs)
    steps = sum(10 + 40 * (10 - 4.0 - s) / (10 - 3.2 - s) for s in (0, 0.1, 0.2)) / 3
    assert f"TI-G reaches plain's last held-out loss after {steps:.0f} of 50 steps" in said and f"(steps {50 / steps:.2f}x, seconds" in said
    assert "in every seed of two or more: cola; lower than restart's, a control that is ours: cola |" in said
    assert "lower than plain's on cola; not lower on no task" in said
    assert made.fewer(runs["cola"], "TI-O") == "TI-O does not reach plain's last held-out loss in any of 3 seeds"
    assert "cola was not run" in made.claims({"rte": runs["cola"]})
    lone = made.claims({"cola": {**runs["cola"], "plain": {}}})
    assert "of TI-G there is no run to compare with plain" in lone and "in every seed of two or more: no task" in lone and "not measured" in lone


def test_what_is_refused(made, tmp_path):
    with pytest.raises(RunError, match=r"no runs in .* makes the first"):
        made.read(tmp_path)
    whole(tmp_path)
    put(tmp_path, run(seed=3, lr=5e-4))
    with pytest.raises(RunError, match=r"runs of cola with different lr: .*cola-3-plain.json"):
        made.read(tmp_path)
    (tmp_path / "cola-3-plain.json").rename(tmp_path / "cola-4-plain.json")
    with pytest.raises(RunError, match=r"cola-4-plain.json holds task 'cola', row 'plain', seed 3"):
        made.read(tmp_path)


def test_the_page_and_its_figures(made, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    page, out = tmp_path / "docs" / "results.md", tmp_path / "out"
    out.mkdir()
    page.write_text("# Results\n\n## lsq\n\ntext\n")
    whole(out, skip={("TI-O", 1)})
    whole(out, "stories", depth=[0.1, 0.5, 40.0], metric="real perplexity", scores={"real perplexity": 5.0}, teacher=None, sharpness=-3.0)
    put(out, run("rte", "TI-G", 0, depth=[], curve=[]))
    given = ["--out", str(out), "--figures", str(tmp_path / "docs" / "figures"), "--page", str(page)]
    said = made.main(given)
    text = page.read_text()
    assert capsys.readouterr().out.strip() == said.strip()
    assert text.startswith("# Results\n\n## lsq\n\ntext\n\n<!-- teacher-intervention -->\n## Teacher Intervention\n")
    assert text.endswith("<!-- /teacher-intervention -->\n") and str(tmp_path) not in text
    links = re.findall(r"!\[[^\]]+\]\((.*?)\)", text)
    assert links == [f"figures/teacher_intervention_{name}.png" for name in ("loss", "depth", "sharpness")]
    assert all(0 < (page.parent / link).stat().st_size < 150_000 for link in links)
    page.write_text(text + "\n## zoo\n")
    made.main(given)
    assert page.read_text() == text + "\n## zoo\n", "written twice, it is the same"


def test_a_figure_without_numbers_is_not_drawn(made, figures, tmp_path):
    put(tmp_path, *(run(row=row, seed=1, depth=[], loss=math.nan if row == "TI-M" else 4.0) for row in LOSSES))
    runs = made.read(tmp_path)
    assert figures.depth(runs) is None and figures.sharpness(runs) is None
    assert [path.name for path, _ in figures.save(runs, tmp_path / "figures")] == ["teacher_intervention_loss.png"]
    assert "not finite" in made.table(runs["cola"]) and "One seed" in made.section(runs, "x")


def test_labels_do_not_overlap(figures):
    for heights in ([0.5] * 5, [0.0, 0.0, 1.0, 1.0, 1.0], [0.2, 0.21, 0.5, 0.9, 0.95]):
        places = list(figures.apart({str(i): height for i, height in enumerate(heights)}, 0.155).values())
        assert all(b - a > 0.1549 for a, b in pairwise(places)) and min(places) > -1e-9 and max(places) < 1 + 1e-9
