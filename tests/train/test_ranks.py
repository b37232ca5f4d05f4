"""More than one process: DDP and FSDP2 on two processes over gloo give the losses of one process at the same global batch, each can go on from the
other's resume points, and afterwards the model is whole, plain and equal on both. torchrun is started once; see ranks_run.py."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_cases import CASES, STEPS, WAYS, environment, halted
from tiny import llama, task
from torch import nn

from qatlas.core.error import RunError
from qatlas.train.fit import fit
from qatlas.train.ranks import cut, opened, whole, written

HERE = Path(__file__).parent
ROUTES = [("one", "ddp"), ("one", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "one"), ("fsdp2", "one")]
pytestmark = pytest.mark.slow


def torchrun(*arguments, **environment):
    """Two processes; what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)]), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return subprocess.run([*command, str(HERE / "ranks_run.py"), *map(str, arguments)], env=shared, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The directory in which one process broke off, and two processes did all they do."""
    out = tmp_path_factory.mktemp("ranks")
    halted(out / "of-one")
    for way in WAYS:
        shutil.copytree(out / "of-one", out / f"of-one-for-{way}")
    done = torchrun(out, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def said(out):
    """What each of the two processes saw."""
    both = [json.loads((out / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0].keys() == both[1].keys() == set(WAYS)
    return both


@pytest.fixture(scope="module")
def alone():
    """The same trainings in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: case() for name, case in CASES.items()}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(said, alone, way, case):
    first, second = (rank[way][case] for rank in said)
    assert first == second == pytest.approx(alone[case], abs=1e-5)
    assert max(alone[case][:STEPS]) - min(alone[case][:STEPS]) > 1e-4      # it learns, so there is something to be equal in


@pytest.mark.parametrize(("origin", "way"), ROUTES)
def test_a_run_goes_on_in_the_other_way(out, said, tmp_path, origin, way):
    unbroken = halted(tmp_path / "unbroken", broken=False)
    if way == "one":
        shutil.copytree(out / f"of-{origin}", tmp_path / "again")
        assert list((tmp_path / "again").rglob("step-*")), "no resume point was left"
        found = halted(tmp_path / "again", True, False)
    else:
        found, second = (rank[way][f"resumed from {origin}"] for rank in said)
        assert found == second
    assert found == pytest.approx(unbroken, abs=1e-5)


def test_points_of_all_ways_hold_the_same_tensors(out):
    from safetensors.torch import load_file

    for name in ("model", "optimizer"):
        one, *others = (load_file(next((out / f"of-{way}").rglob(f"{name}.safetensors"))) for way in ("one", *WAYS))
        for other in others:
            assert one.keys() == other.keys()
            for key in one:
                torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-4)


def test_fsdp2_says_that_it_recomputes(said):
    assert [rank["ddp"]["warned"] for rank in said] == [0, 0]
    assert said[0]["fsdp2"]["warned"] > 0 and said[1]["fsdp2"]["warned"] == 0


@pytest.mark.parametrize(("what", "words"), [
    ("batch norm", "extra .statistics of the rows"), ("moving", "q_proj.input_quantizer .a moving scale"), ("tied", "shared by model.layers.0 and"),
    ("tactic", "Silent"), ("inside", "without passing the output of its block"), ("VERSION", "version 1"), ("OFFLOAD_PARAMS", "offloading"),
    ("RESHARD_AFTER_FORWARD", "reshard_after_forward"), ("CPU_RAM_EFFICIENT_LOADING", "first process only")])
def test_fsdp2_refuses_by_name(said, what, words):
    for rank in said:
        assert re.search(words, rank["fsdp2"]["refused"][what])


def test_processes_that_do_not_know_of_each_other_are_refused():
    model = llama()
    with environment({"WORLD_SIZE": "2"}), pytest.raises(RunError, match="one of 2 processes, and Accelerate sees one"):
        fit(model, task(), steps=1)
    assert all(p.requires_grad for p in model.parameters())


def test_in_one_process_nothing_is_cut():
    x, model = torch.ones(3), nn.Linear(2, 2)
    weight = model.weight
    assert whole(x) is x and written(x) is x and cut(x, torch.zeros(3)) is x
    with opened(model):
        assert model.weight is weight
