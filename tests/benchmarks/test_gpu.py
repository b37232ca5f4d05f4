"""What a GPU machine will run: its refusal here, its table of made-up rounds, and that its variants are weights that kernels take."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    """The file anew."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.reach()
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu, tmp_path):
    with pytest.raises(SystemExit, match="torch sees none here"):
        gpu.main(["--json", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())


def test_the_table(gpu, tmp_path):
    rounds = [{"cublas": 8e-6 + i * 1.2e-8, "w4": 2e-6, "copy": 1e-5} for i in range(20)]
    state = {"setting": {"device": "a chip", "torch": "2", "triton": "3", "pairs": 20, "copy": 4e12, "plans": "as guessed"}, "wrong": ["it differs"],
             "cases": {"4096x4096, batch 1": {"rounds": rounds, "bytes": {"cublas": 32_000_000, "w4": 7_200_000}, "absent": {"torchao": "not here"}}},
             "passes": {"rounds": rounds}}
    made = gpu.section(json.loads(json.dumps(state)))
    assert "| w4 | 2.0 µs | 4.06 | 4.03 to 4.08 | 90% |" in made and "| torchao | not here" in made and "- it differs" in made
    page = tmp_path / "page.md"
    for _ in range(2):
        gpu.write(page, made)
    assert page.read_text().count("## On a GPU") == 1


def test_kernels_take_every_variant(gpu):
    from qatlas.kernels.triton.linear import why_not_fp8
    from qatlas.kernels.triton.matrix import why_not

    for name, quant in gpu.quants().items():
        for shape in gpu.SHAPES:
            assert not why_not(quant.grid, quant.grain, shape, integers="a8" in name)
            assert name != "fp8" or "fp8" not in why_not_fp8(quant.grid, quant.grain, shape, torch.device("cpu"))
