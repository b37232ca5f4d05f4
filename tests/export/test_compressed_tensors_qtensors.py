"""compressed-tensors in the other direction: what we wrote, and what the package writes, as QTensors, bit for bit; what is wrong is refused."""

from __future__ import annotations

import json

import pytest
import torch
from by_package import PACK, THEIRS, args
from by_package import directory as by_package
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_compressed_tensors import CASES, packed, there

from qatlas.core.error import FormatError
from qatlas.core.qtensor import QTensor
from qatlas.export import compressed_tensors as form
from qatlas.export.compressed_tensors.layout import words
from qatlas.export.compressed_tensors.qtensors import from_words
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


# ---- what is wrong ---------------------------------------------------------------------------------------------------------------------------------

FOUR, BYTES = (PACK, args(strategy="group", group_size=32, symmetric=False), None, ["Linear"]), ("int-quantized", args(4), None, ["Linear"])
FP8, ONE = ("float-quantized", args(8, "float", strategy="tensor"), None, ["Linear"]), {"num_hidden_layers": 1}
NV = ("nvfp4-pack-quantized", args(4, "float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"), None, ["Linear"])
MX = ("mxfp4-pack-quantized", args(4, "float", strategy="group", group_size=32, scale_dtype="torch.uint8"), None, ["Linear"])
AT = "model.layers.0.mlp.up_proj"


def drop(part):
    return lambda tensors: tensors.pop(f"{AT}.{part}")


def put(part, change):
    return lambda tensors: tensors.update({f"{AT}.{part}": change(tensors.get(f"{AT}.{part}"))})


def filled(index, value):
    def change(t):
        t = t.clone()
        t.view(torch.uint8).flatten()[index] = value
        return t
    return change


TENSORS = {
    "no packed": (FOUR, drop("weight_packed"), "has no weight|is torch"), "no shape": (FOUR, drop("weight_shape"), "says no shape"),
    "no zeros": (FOUR, drop("weight_zero_point"), "has no weight_zero_point"), "no steps": (FOUR, drop("weight_scale"), "without|weight_packed"),
    "a huge shape": (FOUR, put("weight_shape", lambda t: torch.tensor([2**40, 2**40])), "a dense stream of 4 bits"),
    "a negative shape": (FOUR, put("weight_shape", lambda t: -t), "says no shape"),
    "another shape": (FOUR, put("weight_shape", lambda t: torch.tensor([128, 65])), "has \\(128, 8\\) words"),
    "too few zeros": (FOUR, put("weight_zero_point", lambda t: t[1:]), "transposed, has"),
    "too few steps": (FOUR, put("weight_scale", lambda t: t[1:]), "words|weight_scale has shape"),
    "steps of another type": (FOUR, put("weight_scale", lambda t: t.to(torch.int32)), "weight_scale is torch.int32"),
    "NaN in steps": (FOUR, put("weight_scale", lambda t: t * torch.nan), "NaN or infinity"),
    "another order": (FOUR, put("weight_g_idx", lambda t: torch.arange(64)), "weight_g_idx"),
    "codes beyond the bits": (BYTES, put("weight", lambda t: t * 0 + 9), "no integers of 4 bits"),
    "codes that are none": (BYTES, put("weight", lambda t: t.float()), "is torch.float32"),
    "zeros where there are none": (BYTES, put("weight_zero_point", lambda t: torch.ones(1, dtype=torch.int8)), "said to be symmetric"),
    "NaN in codes": (FP8, put("weight", filled(3, 127)), "weight holds NaN"),
    "NaN in fp8 steps": (NV, put("weight_scale", filled(0, 127)), "weight_scale holds NaN"),
    "no global": (NV, drop("weight_global_scale"), "weight_global_scale is no positive number"),
    "a global of zero": (NV, put("weight_global_scale", lambda t: t * 0), "no positive number"),
    "an exponent too far": (MX, put("weight_scale", filled(0, 255)), "exponent 128"),
}


@there
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_contradict_themselves_are_refused_by_name(case, tmp_path):
    group, change, say = TENSORS[case]
    path = by_package(tmp_path / "theirs", [group], **ONE)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    with pytest.raises(FormatError, match=say) as caught:
        form.qtensors(path)
    assert str(path) in str(caught.value) and AT in str(caught.value)


def said(**changes):
    return lambda config: config.update(changes)


def grouped(**changes):
    return lambda config: config["config_groups"]["group_0"].update(changes)


def weights(**changes):
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


A8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
CONFIGS = {
    "a cache": (said(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"), "transforms": (said(transform_config={"a": 1}), "transform_config"),
    "sparsity": (said(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity"), "marlin": (grouped(format="marlin-24"), "'marlin-24'"),
    "a preset": (said(config_groups={"W8A8": ["Linear"]}), "group W8A8"), "outputs": (grouped(output_activations=A8), "quantized outputs"),
    "inputs of groups": (grouped(input_activations={**A8, "strategy": "group", "group_size": 32}), "no form of ours"),
    "local inputs": (grouped(input_activations={**A8, "dynamic": "local"}), "no form of ours"),
    "a stored step that is not": (grouped(input_activations={**A8, "dynamic": False, "strategy": "tensor"}), "input_scale is None"),
    "no group": (grouped(targets=["re:.*_norm"]), "no config group"), "9 bits": (weights(num_bits=9), "int of 9 bits"),
    "a group that does not divide": (weights(group_size=48), "must divide it"), "another group": (weights(group_size=16), "weight_scale has shape"),
    "floats": (weights(type="float"), "floating-point codes"), "a lonely layer": (said(ignore=[]), "without weight_scale"),
}


@there
@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_config_says_and_cannot_be_kept_is_refused(case, tmp_path):
    change, say = CONFIGS[case]
    path = by_package(tmp_path / "theirs", [FOUR], **ONE)
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=say) as caught:
        form.qtensors(path)
        form.inputs(path)
    assert str(path) in str(caught.value)


@there
def test_steps_of_inputs_that_the_config_does_not_quantize_are_refused(tmp_path):
    path = by_package(tmp_path / "theirs", THEIRS["fp8"], **ONE)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="input_scale, and config.json quantizes no input there"):
        form.inputs(path)


@there
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_packing_of_earlier_versions_is_refused_by_name(bits, tmp_path):
    path = by_package(tmp_path / "theirs", [(PACK, args(bits, strategy="channel"), None, ["Linear"])], **ONE)
    tensors, each = load_file(path / "model.safetensors"), 32 // bits
    tensors[f"{AT}.weight_packed"] = torch.zeros(128, -(-64 // each), dtype=torch.int32)        # `each` codes a word, the top bits unused
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(FormatError, match=f"before 0.18 for {bits} bits"):
        form.qtensors(path)


@there
def test_shards_that_are_truncated_doubled_or_elsewhere(tmp_path):
    path = by_package(tmp_path / "theirs", [FOUR], shards=2, **ONE)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(FormatError, match="other.safetensors"):
        form.qtensors(path)
    first, second = sorted(path.glob("*.safetensors"))
    index.write_text(json.dumps({"weight_map": {"a": first.name, "b": second.name}}))
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="which of them"):
        form.qtensors(path)
    second.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(FormatError, match="truncated"):
        form.qtensors(path)
    index.write_text("{")
    with pytest.raises(FormatError, match="cannot be read"):
        form.qtensors(path)


def test_a_directory_of_something_else_is_not_held(tmp_path):
    assert not form.holds(tmp_path) and not form.holds(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert not form.holds(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    assert form.holds(tmp_path)
    with pytest.raises(FormatError):
        form.qtensors(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_words_there_and_back(bits, rows, n, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(from_words("x", words(codes, bits), bits, (rows, n)), codes)
