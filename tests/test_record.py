"""A record goes to JSON and back; a watched run is bit-identical to an unwatched one."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from tiny import Stop, llama, quantized, task

from qatlas import record as module
from qatlas.core.error import CheckpointError
from qatlas.record import Record, Watch, listing, machine, moved_scales, peak_memory, versions, weight_errors
from qatlas.train.fit import fit
from qatlas.train.optim import AdamW
from qatlas.train.run import Run


def full() -> Record:
    return Record("lsq", {"bits": 4}, "qatlas run lsq", "zoo:gpt", "builtin:docs", target="gguf:q4_0", seed=3, scores={"trained": {"loss": 0.1}},
                  curve=[(2, {"loss": 0.2})], errors={"q_proj": (0.1, 0.2)}, samples={"packed": "naïve"})


def test_to_json_and_back(tmp_path):
    record = full()
    record.seal(tmp_path)
    record.write(tmp_path)
    again = Record.read(tmp_path)
    assert json.loads(json.dumps(vars(record))) == json.loads(json.dumps(vars(again)))
    assert again.versions["torch"] == torch.__version__ and again.peak_memory > 2**20 and again.machine["threads"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_sums_are_those_of_the_files(tmp_path):
    (tmp_path / "exports").mkdir()
    file = tmp_path / "exports" / "model.gguf"
    file.write_bytes(b"abc")
    record = full()
    record.seal(tmp_path, file)
    assert record.sums == {"exports/model.gguf": hashlib.sha256(b"abc").hexdigest()}


def test_a_record_names_no_host_and_no_user():
    import getpass
    import platform

    said = json.dumps([machine(), versions()])
    assert platform.node() not in said or not platform.node()
    assert f'"{getpass.getuser()}"' not in said


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"paper": "x"}', '{"paper": "x", "arguments": {}, "command": "", "colour": 3}', "null"])
def test_what_is_no_record(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a record"):
        Record.read(tmp_path)


def test_no_record(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(CheckpointError, match=r"no record\.json.*photo\.jpg"):
        Record.read(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        Record.read(tmp_path / "none")
    assert listing(tmp_path) == "photo.jpg"


def trained(watch=None, out=None, resume=False, stop=None):
    subject = task(run=Run(out, save_every=1, resume=resume, progress=False))
    subject.run.tactics = tuple(t for t in (watch, stop) if t is not None)
    model = quantized(llama(dropout=0.1), "w2a8")
    fit(model, subject, optimizer=AdamW(1e-3), steps=4)
    return model


def test_a_watched_run_is_bit_identical():
    plain, record = trained(), Record("lsq", {}, "")
    watched = trained(Watch(record, every=1))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))
    assert [step for step, _ in record.curve] == [1, 2, 3] and "perplexity" in record.scores["untrained"]
    assert len(record.errors) == 14 and record.errors == {name: (e, e) for name, (e, _) in record.errors.items()}


def test_a_watch_that_sleeps_scores_the_start_only():
    record = Record("lsq", {}, "")
    trained(Watch(record))
    assert record.curve == [] and list(record.scores) == ["untrained"]


def test_what_was_watched_survives_a_resume(tmp_path):
    whole, again = Record("lsq", {}, ""), Record("lsq", {}, "")
    trained(Watch(whole, 1), tmp_path / "whole", stop=Stop(None))
    with pytest.raises(KeyboardInterrupt):
        trained(Watch(Record("lsq", {}, ""), 1), tmp_path / "out", stop=Stop(2))
    trained(Watch(again, 1), tmp_path / "out", resume=True, stop=Stop(None))
    assert [list(entry) for entry in again.curve] == [list(entry) for entry in whole.curve]
    assert again.scores == whole.scores


def test_weight_errors_are_relative_squares():
    model = quantized(llama(), "w4")
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "weight_quantizer"))
    expected = (layer.weight - layer.hard()).norm() ** 2 / layer.weight.norm() ** 2
    assert weight_errors(model)[name] == pytest.approx(float(expected), rel=1e-4)
    assert 0 < weight_errors(model)[name] < 0.05


def test_versions_leave_out_what_is_missing(monkeypatch):
    monkeypatch.setattr(module, "LIBRARIES", ("torch", "no-such-library"))
    assert set(versions()) == {"python", "torch"} and peak_memory() > 0


def test_a_run_of_two_fits_is_watched_as_one():
    record, run = Record("two", {}, ""), Run(progress=False)
    run.tactics = (Watch(record, every=2),)
    one, model = task(run=run), quantized(llama())
    fit(model, one, steps=3)
    fit(model, one.later(3), steps=4)
    assert [step for step, _ in record.curve] == [2, 4, 6]


def test_scales_that_the_last_rounding_moved_are_counted():
    from torch import nn

    from qatlas.model.rules import quantize

    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 2)), "w4-g32", target="onnx:int4")
    assert moved_scales(model) == {}, "steps in fp32 are stored as they are"
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 2)), "w4-g32", target="gguf:q4_0")
    found = moved_scales(model)
    moved, count, most = found["0"]
    assert set(found) == {"0"} and 0 < moved <= count == 8 and 0 < most <= 2**-11
    scale = model[0].weight_quantizer.scale
    with torch.no_grad():
        scale.copy_(scale.half())
    assert moved_scales(model)["0"] == (0, 8, 0.0)
    with torch.no_grad():
        scale[0, 0] *= 1 + 2**-12
    assert moved_scales(model)["0"][0] == 1
