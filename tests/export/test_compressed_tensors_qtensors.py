"""compressed-tensors in the other direction: what we wrote, and what the package itself writes, as QTensors, bit for bit; what is wrong is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_compressed_tensors import CASES, SIZES, packed, there
from tiny_llama import MATRICES, llama

from qatlas.core.error import FormatError
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import Float, Uniform
from qatlas.core.qtensor import QTensor
from qatlas.core.scheme import weight
from qatlas.export import compressed_tensors as form
from qatlas.export.compressed_tensors.layout import words
from qatlas.export.compressed_tensors.qtensors import from_words
from qatlas.model.pack import checkpoint
from qatlas.model.rules import Rule


def values(tensors):
    return {name: t.dequantize() if isinstance(t, QTensor) else t.float() for name, t in tensors.items()}


def equal(ours, theirs):
    return set(ours) == set(theirs) and all(torch.equal(t, theirs[name]) for name, t in ours.items())


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
    assert ({signal.quant for signal in inputs.values()} == {form.fit_input(entry, kind, quant, (8, 64), "Linear").but(estimator=signal.quant.estimator)
            for signal in inputs.values()}) if entry is not None else not inputs
    made = checkpoint(model)
    made.tensors = found
    again = form.write(made, tmp_path / "again", kind)
    first, second = (load_file(at / "model.safetensors") for at in (path, again))
    assert set(first) == set(second) and [name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name].view(
        torch.uint8), second[name].view(torch.uint8))] == []
    assert json.loads((path / "config.json").read_text()) == json.loads((again / "config.json").read_text())


# ---- the package's own ------------------------------------------------------------------------------------------------------------------------------

def args(bits=4, kind="int", **more):
    return {"num_bits": bits, "type": kind, **more}


def by_package(folder, groups, ignore=("lm_head",), shards=1, dtype=torch.bfloat16, **sizes):
    """A directory as the package's compressors write it, with steps that it would find: groups are (format, weights, input, targets)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = llama(**{**SIZES, **sizes})
    schemes = [(name, QuantizationScheme(targets=targets, weights=said, input_activations=entry, format=name))
               for name, said, entry, targets in groups]
    tensors = {}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        fits = [s for s in schemes if layer in s[1].targets] or [s for s in schemes if "Linear" in s[1].targets]
        if layer.split(".")[-1] not in MATRICES or not fits:
            tensors[name] = weight
            continue
        (name, scheme), part = fits[0], {"weight": weight}
        said, size = scheme.weights, scheme.weights.group_size
        view = {"tensor": lambda: weight.reshape(1, 1, -1), "channel": lambda: weight[:, None],
                "block": lambda: weight.unflatten(0, (-1, said.block_structure[0])).unflatten(2, (-1, said.block_structure[1])).transpose(1, 2).flatten(2)
                }.get(said.strategy, lambda: weight.unflatten(1, (-1, size)))()
        if "nv" in name:
            part["weight_global_scale"] = torch.tensor([448 * 6 / float(weight.abs().max())])
        scale, zero = calculate_qparams(view.amin(-1), view.amax(-1), said, global_scale=part.get("weight_global_scale"))
        part["weight_scale"] = scale.reshape(1) if said.strategy == "tensor" else scale
        part["weight_scale"] = part["weight_scale"] if "fp4" in name else part["weight_scale"].to(dtype)
        if not said.symmetric:
            part["weight_zero_point"] = zero.to(torch.int8)
        part = BaseCompressor.get_value_from_registry(name).compress(part, scheme)
        tensors |= {f"{layer}.{key}": value.contiguous() for key, value in part.items()}
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            tensors[f"{layer}.input_scale"] = torch.tensor([0.03 if said.type == "int" else 0.005])
            if not scheme.input_activations.symmetric:
                tensors[f"{layer}.input_zero_point"] = torch.tensor([-7], dtype=torch.int8)
    said = QuantizationConfig(config_groups={f"group_{i}": s for i, (_, s) in enumerate(schemes)}, ignore=list(ignore), quantization_status="compressed",
                              format=groups[0][0] if len(groups) == 1 else "mixed-precision").model_dump(mode="json")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": said}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors": names[i::shards] for i in range(shards)}
    for file, mine in files.items():
        save_file({name: tensors[name].clone() for name in mine}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, mine in files.items() for name in mine}}))
    return folder


PACK = "pack-quantized"
THEIRS = {
    **{f"{b} bits, groups, {'symmetric' if sym else 'zeros'}": [(PACK, args(b, strategy="group", group_size=32, symmetric=sym), None, ["Linear"])]
       for b in (2, 3, 4, 5, 6, 7, 8) for sym in (True, False)},
    "4 bits, channels": [(PACK, args(strategy="channel"), None, ["Linear"])],
    "4 bits, channels, zeros": [(PACK, args(strategy="channel", symmetric=False), None, ["Linear"])],
    "4 bits, one step": [(PACK, args(strategy="tensor"), None, ["Linear"])],
    "w8a8": [("int-quantized", args(8, strategy="channel"), args(8, strategy="token", dynamic=True), ["Linear"])],
    "w8a8, one step": [("int-quantized", args(8, strategy="tensor"), args(8, strategy="tensor"), ["Linear"])],
    "w8a8, zeros": [("int-quantized", args(8, strategy="channel", symmetric=False), args(8, strategy="tensor", symmetric=False), ["Linear"])],
    "w4, bytes": [("int-quantized", args(4, strategy="group", group_size=16, symmetric=False), None, ["Linear"])],
    "w8, naive": [("naive-quantized", args(8, strategy="tensor"), None, ["Linear"])],
    "fp8": [("float-quantized", args(8, "float", strategy="tensor"), args(8, "float", strategy="tensor"), ["Linear"])],
    "fp8, blocks": [("float-quantized", args(8, "float", strategy="block", block_structure=[16, 32]), None, ["Linear"])],
    "fp8, channels": [("float-quantized", args(8, "float", strategy="channel"), args(8, "float", strategy="token", dynamic=True), ["Linear"])],
    "mxfp4": [("mxfp4-pack-quantized", args(4, "float", strategy="group", group_size=32, scale_dtype="torch.uint8"), None, ["Linear"])],
    "nvfp4": [("nvfp4-pack-quantized", args(4, "float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"), None, ["Linear"])],
}


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
