"""Runs that are really killed end as if they had not been; a state that is not the run's own is refused and nothing is touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import llama, task
from torch import nn

from qatlas.core.error import CheckpointError
from qatlas.train import resume
from qatlas.train.fit import fit
from qatlas.train.optim import SGD, AdamW
from qatlas.train.run import Run
from qatlas.train.tactic import Freeze, Tactic

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    source = str(HERE.parents[1] / "src")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, str(HERE)]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(HERE / "resume_runs.py"), str(root)], env=env, check=True, timeout=300)
    return json.loads((root / "result.json").read_text())


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical(killed):
    whole = killed.pop("whole")
    assert whole["ended"] == 0
    assert len(whole["result"]["history"][0]["loss"]) == 6
    assert len(killed) == 16
    for name, case in killed.items():
        assert case["killed"] == -9, name
        assert case["ended"] == 0, name
        assert case["result"] == whole["result"], name
        assert not case["state"], f"{name}: resume points are left after a good end"
    written = [place for case in killed.values() for place in case["left"]]
    assert any("step-" in place for place in written) and any("done" in place for place in written) and any(".writing" in place for place in written)


class Stop(Tactic):
    """Break off at a step, leaving the resume points."""

    def __init__(self, at):
        self._at = at

    def before(self, loop):
        if loop.step == self._at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    out = tmp_path_factory.mktemp("once") / "out"
    with pytest.raises(KeyboardInterrupt):
        go(out, False, at=5)
    assert [p.name for p in (out / "state" / "phase-01").iterdir()] == ["step-00000004"]
    return out


@pytest.fixture
def broken(once, tmp_path, monkeypatch):
    """A run that broke off after four of six steps."""
    monkeypatch.setattr(resume, "sync", lambda path: None)        # synced once above; here it would only cost time
    return Path(shutil.copytree(once, tmp_path / "out"))


def go(out, again, at=99, model=None, seed=0, steps=6, optimizer=None, tactics=(), data=None):
    model = model if model is not None else llama()
    subject = task(run=Run(out, seed=seed, save_every=2, resume=again, progress=False), **(data or {}))
    return fit(model, subject, steps=steps, optimizer=optimizer or AdamW(1e-3), tactics=[Stop(at), *tactics])


def snapshot(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("other, said", [
    ({"seed": 1}, "seed: 0 there, 1 here"), ({"steps": 7}, "steps: 6 there, 7 here"), ({"optimizer": SGD()}, "optimizer"),
    ({"tactics": [Freeze()]}, "tactics"), ({"data": {"length": 8}}, "task"), ({"model": "other"}, "model")])
def test_a_foreign_state_is_refused_and_nothing_changes(broken, other, said):
    model = llama(seed=1 if other.pop("model", None) else 0)
    before, weights = snapshot(broken), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"another run: .*{said}"):
        go(broken, True, model=model, **other)
    assert snapshot(broken) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "bit", "gone"])
def test_a_damaged_state_is_refused_and_nothing_changes(broken, name, harm):
    path = broken / "state" / "phase-01" / "step-00000004" / name
    raw = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw[: len(raw) // 2] if harm == "cut" else raw)
    model = llama()
    before, weights = snapshot(broken), {k: v.clone() for k, v in model.state_dict().items()}
    if name == "state.json" and harm == "bit":
        return                                                    # plain text may still be JSON; its tensors are guarded by their hashes
    with pytest.raises(CheckpointError):
        go(broken, True, model=model)
    assert snapshot(broken) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_the_rest_of_a_broken_run_is_not_run_again(broken):
    class Count(Tactic):
        """Counts steps."""

        def before(self, loop):
            seen.append(loop.step)

    seen: list[int] = []
    with pytest.raises(CheckpointError, match="tactics"):
        go(broken, True, tactics=[Count()])
    history = go(broken, True)
    assert len(history.loss) == 6
    fresh = go(None, False)
    assert history.loss == fresh.loss and history.grad_norm == fresh.grad_norm


def test_a_state_that_does_not_fit_leaves_the_model_alone():
    model, other = nn.Linear(3, 2), resume.state_of(nn.Linear(4, 2))
    weight = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight is \(2, 4\), not \(2, 3\)"):
        resume.load_state(model, other)
    with pytest.raises(CheckpointError, match="bias is missing"):
        resume.load_state(model, {"weight": model.weight})
    with pytest.raises(CheckpointError, match="extra is not in the model"):
        resume.load_state(model, {**resume.state_of(model), "extra": torch.zeros(1)})
    assert torch.equal(model.weight, weight)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    state = resume.state_of(model)
    assert list(state) == ["a.weight"]
    resume.load_state(model, {"a.weight": torch.ones(2, 2)})
    assert model["b"].weight is model["a"].weight and bool((model["b"].weight == 1).all())


def test_writing_takes_its_share_of_the_time_only(tmp_path):
    phase = resume.Phase(tmp_path, 1, {}, None, 0.0)
    phase._cost = 1e6
    assert not phase.due(1)
    phase._cost = 0.0
    assert phase.due(1)
    assert not resume.Phase(None, 1, {}, 1, 0.0).due(1)


def test_random_states_come_back():
    import random

    import numpy as np

    state = resume.random_state()
    first = torch.rand(3), random.random(), np.random.rand()
    resume.load_random(state)
    second = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


def test_a_removed_state_starts_anew(broken):
    shutil.rmtree(broken / "state")
    assert len(go(broken, True).loss) == 6


def test_a_model_that_came_in_bf16_resumes_bit_identical(tmp_path):
    """Masters are widened to fp32, so what a point holds must not pass through bf16 on its way back."""
    whole, rest = llama().bfloat16(), llama().bfloat16()
    go(None, False, model=whole)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out", False, at=5, model=llama().bfloat16())
    go(tmp_path / "out", True, model=rest)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
