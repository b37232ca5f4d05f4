"""Output directories are never overwritten; settings fail early."""

import pytest
import torch

from qatlas.core.error import RunError
from qatlas.train.run import Run, bar, check_precision


@pytest.mark.parametrize("mark", ["record.json", "model.safetensors", "state"])
def test_a_directory_that_holds_another_run_is_refused(tmp_path, mark):
    (tmp_path / mark).mkdir() if mark == "state" else (tmp_path / mark).write_text("{}")
    with pytest.raises(RunError, match="holds another run"):
        Run(tmp_path)
    if mark == "state":
        assert Run(tmp_path, resume=True).resume
    else:
        with pytest.raises(RunError, match="nothing to resume"):
            Run(tmp_path, resume=True)
    assert (tmp_path / mark).exists()


def test_files_of_other_kinds_do_not_hinder(tmp_path):
    (tmp_path / "run.log").write_text("")
    assert Run(tmp_path).out == tmp_path
    assert Run(tmp_path / "new", resume=True).out == tmp_path / "new"
    with pytest.raises(RunError, match="is a file"):
        Run(tmp_path / "run.log")


@pytest.mark.parametrize("wrong", [{"precision": "fp16"}, {"compile": "all"}, {"micro": 0}, {"save_every": 0}, {"tensorboard": True}])
def test_settings_fail_early(wrong):
    with pytest.raises(RunError):
        Run(**wrong)


def test_bf16_is_refused_where_the_chip_has_none(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    with pytest.raises(RunError, match="precision='no'"):
        check_precision("bf16", torch.device("cpu"))
    check_precision("no", torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    check_precision("bf16", torch.device("cpu"))


def test_a_plain_line_each_tenth_where_nobody_looks(capsys):
    with bar("fit", 40, done=10) as advance:
        for step in range(10, 40):
            advance(f"loss {step}")
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [f"  fit: {step} of 40" for step in range(12, 41, 4)]
    assert said[0].split(", ")[1] == "loss 11" and said[-1].endswith("loss 39, 0 s left") and "\r" not in "".join(said)
    with bar("fit", 3, wanted=False) as advance:
        advance("loss 1")
    assert capsys.readouterr().err == ""


def test_phases_are_numbered_and_removed(tmp_path):
    run = Run(tmp_path / "out")
    assert [run.phase("fit", {}).number for _ in range(3)] == [1, 2, 3]
    (tmp_path / "out" / "state").mkdir(parents=True)
    run.finish()
    assert not (tmp_path / "out" / "state").exists()
