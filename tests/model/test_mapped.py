"""A packed model is used where it lies: loading maps the file, and a forward takes little beside it. Measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import write_llama

import qatlas
from qatlas.model.load import load
from qatlas.model.pack import save
from qatlas.model.rules import quantize

CHILD = """
import json, sys, torch
from pathlib import Path
from qatlas.model.fast import fast
from qatlas.model.load import load

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def go(path, quick):
    model, _ = load(path)
    model = fast(model) if quick else model
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    return model

torch.set_num_threads(1)
small, large, quick = sys.argv[1], sys.argv[2], sys.argv[3] == "fast"
go(small, quick)                                                  # what is imported and allocated by any first model
Path("/proc/self/clear_refs").write_text("5")                     # the peak begins anew
before = status("VmRSS")
go(large, quick)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks of memory")
@pytest.mark.parametrize("way", ["exact", "fast"])
def test_the_peak_of_loading_and_a_forward_is_far_from_the_models_in_float(way: str, tmp_path: Path) -> None:
    for name, width, depth in (("small", 64, 1), ("large", 512, 14)):
        model, _ = load(write_llama(tmp_path / f"{name}-full", width=width, tokenizer=False, num_hidden_layers=depth, intermediate_size=3 * width))
        save(quantize(model, "w4-g32", target="gguf:q4_0"), tmp_path / name)
    file, floats = (tmp_path / "large" / "model.safetensors").stat().st_size, 4 * sum(p.numel() for p in model.parameters())
    path = os.pathsep.join([str(Path(qatlas.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), way], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])
    assert floats > 5 * file > 5 * 2**24, "a model in float would be seen"
    assert peak < floats / 2, f"{peak / file:.2f} of the file. At this size one weight in float and what first calls allocate count; larger files: " \
                              "benchmarks/serve.py"


def test_tensors_lie_in_the_file(tmp_path: Path) -> None:
    model, _ = load(write_llama(tmp_path / "full", tokenizer=False))
    save(quantize(model, "w4-g32", target="gguf:q4_0"), tmp_path / "packed")
    loaded, _ = load(tmp_path / "packed")
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in Path("/proc/self/maps").read_text().splitlines()
             if line.endswith(str(tmp_path / "packed" / "model.safetensors"))] if Path("/proc/self/maps").exists() else []
    held = {name: t for name, t in loaded.state_dict().items() if t.dtype in (torch.uint8, torch.float16)}
    assert len(held) > 14 and (not spans or all(any(low <= t.data_ptr() < high for low, high in spans) for t in held.values()))
