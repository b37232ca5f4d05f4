"""The evidence of two engines: its model, and what its table says."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def runs():
    sys.path.insert(0, str(RUNS))
    try:
        spec = importlib.util.spec_from_file_location("onnx_engines", RUNS / "onnx_engines.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(RUNS))


def row(**more):
    return {"model": "resnet20", "bits": 4, "target": "int4", "way": "OpenVINO", "bytes": 1234567, "full": 0.8125, "ours": 0.75, "theirs": 0.5,
            "weights": "19 of 19", "off": 1.5e-3, "median": 2e-6, "same": 0.99, "samples": 500, "steps": 60} | more


def test_the_section(runs, tmp_path):
    made = runs.section([row()], {})
    assert ("| ResNet-20, CIFAR-10, w4a8 | int4 | 1,234,567 | OpenVINO | 19 of 19 | 81.2 / 75.0 / 50.0 % | 1.5e-03 (2.0e-06) | 99.0 % | 500 |"
            in made)
    assert "ResNet-20: 60 steps, batch 32" in made and "MiniLM-L6: not run yet" in made and "was not measured yet" in made
    made = runs.section([row()], {"resnet20-8-fp32": {"onnxruntime": 1.0, "OpenVINO, as it comes": 0.5}})
    assert "| resnet20, fp32 | 1.00 | 0.50 |" in made
    said = runs.reading([row(), row(median=1e-6), row(model="minilm", median=3e-3), row(way="OpenVINO, as it comes", median=0.01)])
    assert "at most: OpenVINO 2.0e-06 (ResNet-20), 3.0e-03 (MiniLM-L6).\n" in said and "1.0e-02 to 1.0e-02" in said
    assert runs.reading([row()]) == ""
    page = tmp_path / "page.md"
    page.write_text("# Results\n")
    for _ in range(2):
        runs.write(page, made)
    assert page.read_text().count("## ONNX in two engines") == 1 and page.read_text().startswith("# Results\n")


def test_differences(runs):
    ours, theirs = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.5], [0.0, 0.9]])
    assert runs.median_off(ours, theirs) == pytest.approx(0.05) and runs.right(ours, torch.tensor([0, 0])) == 0.5


@pytest.mark.skipif(not (Path(os.environ.get("QATLAS_DATA", "none")) / "ckpt" / "cifar10_resnet20.safetensors").is_file(),
                    reason="QATLAS_DATA has no ResNet-20")
def test_resnet_20_folds(runs):
    """All 19 norms of a net that was really trained."""
    from qatlas.model.fold import fold, folded

    model, x = runs.cifar_resnet(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x).logits
        assert (fold(model)(x).logits - before).abs().max() < 1e-5 * before.abs().max()
    assert len(folded(model)) == 19 and folded(model)["layer2.0.bn1"] == "layer2.0.conv1"
