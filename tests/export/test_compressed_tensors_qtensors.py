"""compressed-tensors in the other direction: what we wrote, and what the package writes, as QTensors, bit for bit; what is wrong is refused."""

from __future__ import annotations

import json

import pytest
import torch
from by_package import PACK, THEIRS, args
from by_package import directory as by_package
from safetensors.torch import load_file
from test_compressed_tensors import CASES, packed, there

from qatlas.core.qtensor import QTensor
from qatlas.export import compressed_tensors as form
from qatlas.model.pack import checkpoint
from qatlas.model.rules import Rule


def values(tensors):
    return {name: t.dequantize() if isinstance(t, QTensor) else t.float() for name, t in tensors.items()}


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def same_numbers(one, other):
    return one == other.but(estimator=one.estimator, scale=other.scale.but(gradient=one.scale.gradient))


# ---- ours ------------------------------------------------------------------------------------------------------------------------------------------

@there
@pytest.mark.parametrize("case", CASES)
def test_what_we_wrote_comes_back(case, tmp_path):
    kind, quant, entry = CASES[case]
    model = packed(kind, Rule("*proj", weight=quant, input=entry))
    path = form.write(checkpoint(model), tmp_path / "out", kind)
    found, inputs = form.qtensors(path), form.inputs(path)
    assert form.holds(path) and equal(values(found), form.read(path))
    assert sum(isinstance(t, QTensor) for t in found.values()) == 14
    assert len(inputs) == (0 if entry is None else 14)
    assert all(same_numbers(signal.quant, form.fit_input(entry, kind, quant, (8, 64), "Linear")) for signal in inputs.values())
    made = checkpoint(model)
    made.tensors = found
    again = form.write(made, tmp_path / "again", kind)
    first, second = (load_file(at / "model.safetensors") for at in (path, again))
    assert set(first) == set(second) and [name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name].view(
        torch.uint8), second[name].view(torch.uint8))] == []
    assert json.loads((path / "config.json").read_text()) == json.loads((again / "config.json").read_text())


# ---- the package's own -----------------------------------------------------------------------------------------------------------------------------

@there
@pytest.mark.parametrize("case", THEIRS)
def test_what_the_package_wrote_is_what_it_reads(case, tmp_path):
    path = by_package(tmp_path / "theirs", THEIRS[case])
    found, theirs = form.qtensors(path), form.read(path)
    theirs = {name: t for name, t in theirs.items() if not name.endswith(("input_scale", "input_zero_point"))}
    ours = values(found)
    if case == "nvfp4":                                           # the package rounds its answer to bf16
        ours = {name: t.bfloat16().float() if isinstance(found[name], QTensor) else t for name, t in ours.items()}
    assert equal(ours, theirs) and sum(isinstance(t, QTensor) for t in found.values()) == 14
    assert len(form.inputs(path)) == (14 if THEIRS[case][0][2] else 0)


@there
def test_groups_by_name_expression_and_class_in_shards(tmp_path):
    groups = [(PACK, args(8, strategy="channel"), None, ["Linear"]), (PACK, args(4, strategy="channel"), None, ["model.layers.0.mlp.down_proj"]),
              (PACK, args(2, strategy="group", group_size=16), None, ["model.layers.1.mlp.down_proj"])]
    path = by_package(tmp_path / "theirs", groups, shards=3)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"]["targets"] = ["re:.*down_proj"]
    config["quantization_config"]["ignore"] = ["re:.*lm_head"]
    (path / "config.json").write_text(json.dumps(config))
    found = form.qtensors(path)
    bits = {name: t.bits for name, t in found.items() if isinstance(t, QTensor)}
    assert bits["model.layers.0.mlp.down_proj.weight"] == 4 and bits["model.layers.1.mlp.down_proj.weight"] == 2
    assert sorted(bits.values()) == [2, 4, *[8] * 12]
