"""Directories and files as the formats' own packages write them: compressed-tensors by its compressors, GGUF by gguf.quantize."""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tiny_llama import MATRICES, llama

from qatlas.core.grain import Block, Group, PerTensor
from qatlas.export.gguf import llama as names_of
from qatlas.export.gguf.layout import LAYOUTS

SMALL = {"hidden_size": 64, "intermediate_size": 128}


def args(bits=4, kind="int", **more):
    return {"num_bits": bits, "type": kind, **more}


def directory(folder, groups, ignore=("lm_head",), shards=1, dtype=torch.bfloat16, **sizes):
    """A directory as the package's compressors write it, with steps that it would find: groups are (format, weights, input, targets)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = llama(**{**SMALL, **sizes})
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
        grain = {"tensor": PerTensor(), "channel": Group(weight.shape[1]), "block": Block(*(said.block_structure or (1, 1)))}
        view = grain.get(said.strategy, Group(size or 1)).view(weight)
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
    said = QuantizationConfig(config_groups={f"group_{i}": s for i, (_, s) in enumerate(schemes)}, ignore=list(ignore),
                              quantization_status="compressed", format=groups[0][0] if len(groups) == 1 else "mixed-precision")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": said.model_dump(mode="json")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors": names[i::shards] for i in range(shards)}
    for file, mine in files.items():
        save_file({name: tensors[name].clone() for name in mine}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        where = {name: file for file, mine in files.items() for name in mine}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
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
    "nvfp4": [("nvfp4-pack-quantized", args(4, "float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"), None,
               ["Linear"])],
}


def file(path, model, kind, head=True, keys=(), extra=None):
    """The model as the gguf package writes it: matrices quantized by gguf.quantize, or random bytes where it has no quantizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**names_of.numbers(model.config.to_dict()), **dict(keys)}.items():
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    draw = np.random.default_rng(0)
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for hf, weight in model.state_dict().items():
        name, matrix = names_of.to_gguf(hf), hf.split(".")[-2] in MATRICES
        if name == "output.weight" and not head:
            continue
        count = names_of.heads_of(name, *heads)
        rows = (weight if count is None else names_of.permute(weight, count)).numpy()
        if not matrix:
            writer.add_tensor(name, rows.astype(np.float32))
            continue
        raw = gguf.GGMLQuantizationType[kind]
        try:
            data = gguf.quantize(rows, raw)
        except NotImplementedError:
            data = noise(draw, rows.shape, kind)
        writer.add_tensor(name, data, raw_dtype=raw)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def noise(draw, shape, kind):
    """Random blocks with steps that are numbers: llama.cpp's own quantizers can write any of them."""
    layout = LAYOUTS[kind.lower()]
    data = draw.integers(0, 256, (shape[0], shape[1] // layout.size, sum(layout.widths().values())), dtype=np.uint8)
    at = 0
    for name, width in layout.widths().items():
        if name in "dm":
            data[..., at : at + 2] = (draw.standard_normal(data.shape[:2]).astype(np.float16) / 100)[..., None].view(np.uint8)
        at += width
    return data.reshape(shape[0], -1)
