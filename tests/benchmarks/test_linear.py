"""The benchmark of packed weights, on a small layer and without peers: it measures, goes on, and writes its section."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from qatlas.kernels import library

BENCHES = Path(__file__).resolve().parents[2] / "benchmarks"
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    BUILT = bool(library.variants())


@pytest.mark.skipif(not BUILT, reason="the CPU kernels are not built")
def test_it_measures_and_writes(monkeypatch, tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", [str(BENCHES), *sys.path])
    for name in ("training", "linear"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import linear as made

    monkeypatch.setattr(made, "SIZE", 64)
    monkeypatch.setattr(made, "COLD", 1)
    monkeypatch.setitem(made.ENGINES, "onnxruntime dynamic int8", lambda tokens: (_ for _ in ()).throw(ImportError("no such engine")))
    file, page = tmp_path / "l.json", tmp_path / "page.md"
    given = ["--json", str(file), "--threads", "1", "--pairs", "6", "--tokens", "1", "--beside", "torch fp32"]
    engines = ["--engines", "qatlas 1.6, int8", "qatlas 4-g32, float", "torch fp32", "onnxruntime dynamic int8"]
    text = made.main([*given, *engines, "--page", str(page)])
    first = json.loads(file.read_text())["batches"]["1"]
    assert len(first["seconds"]["qatlas 1.6, int8"]) == 6 and first["bytes"]["torch fp32"] == 4 * 64 * 64
    assert "absent: ImportError: no such engine" in text and text in page.read_text() and "<!-- packed-linear-1 -->" in page.read_text()
    made.main([*given, *engines])
    assert json.loads(file.read_text())["batches"]["1"] == first
    with pytest.raises(SystemExit, match="pairs"):
        made.main([*given[:4], "--pairs", "7", *given[6:]])
    for name in ("training", "linear"):
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)
