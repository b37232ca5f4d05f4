"""The bench of serving: its table, its resumption, on a model of a few thousand weights. No times are asserted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("serving_cost", ROOT / "benchmarks" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_case_is_measured_once_and_written_once(bench, tmp_path, monkeypatch, capsys):
    import qatlas.bench as real

    asked = []

    def measured(packed, ways, prompt, tokens, repeats, threads, say):
        asked.append(sorted(path.name for path in packed.iterdir()))
        rows = [{"name": "bf16", "load": 1.0, "file": 100, "peak": 400, "prefill": 10.0, "decode": 4.0, "limit": 5.0, "routes": []},
                {"name": "fast", "load": 0.5, "file": 100, "peak": 110, "prefill": 20.0, "decode": 8.0, "limit": 16.0, "routes": ["by kernel"]},
                {"name": "llama.cpp", "absent": "not installed"}]
        return {"rows": rows, "rounds": {"bf16": [(1.0, 2.0)] * 6, "fast": [(1.0, 1.0)] * 6, "llama.cpp": []},
                "setting": {"prompt": prompt, "tokens": tokens, "repeats": repeats, "threads": threads, "bandwidth": 1e9}}

    monkeypatch.setattr(real, "bench", measured)
    file, page = tmp_path / "serve.json", tmp_path / "performance.md"
    given = ["--json", str(file), "--cases", "w4", "--threads", "1", "--pairs", "6", "--width", "64", "--depth", "1", "--page", str(page)]
    made = bench.main(given)
    assert len(asked) == 1 and {"model.safetensors", "tokenizer.json"} <= set(asked[0])
    assert "| fast | 20 | 8.0 | 0.500 | 0.500 to 0.500 | 50% of 16 | 1.10 of 0 MiB | 0.50 |" in made and "absent: not installed" in made
    assert bench.main(given) == made and len(asked) == 1 and page.read_text().count("## Serving") == 1
    state = json.loads(file.read_text())
    assert state["setting"]["parameters"] > 0
    with pytest.raises(SystemExit, match="measured with other threads"):
        bench.main([*given[:4], "--threads", "7", *given[6:]])
    capsys.readouterr()
