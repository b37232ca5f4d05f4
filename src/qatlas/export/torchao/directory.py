"""Writing the directory (export/folder.py): the header that names every tensor's class, and what `quantization_config` says.

transformers takes the tensors as the header describes them; the config says what torchao's own quantizer would have been asked for: one kind and
group for all layers, or FqnToConfig with a config for each name. Layers in full precision stand in `modules_to_not_convert`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.error import FormatError
from ...core.qtensor import QTensor
from .. import folder
from ..checkpoint import Checkpoint, vacant
from .fitting import KINDS, NAME, kind_of, kinds
from .layout import PARTS, Stored, store


def plan(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """The name of each tensor -> its kind, or "full" for those in full precision.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the target cannot hold.
    """
    kinds(target)                                                 # an unknown target
    return folder.plan(checkpoint, NAME, partial(kind_of, target=target))


def write(checkpoint: Checkpoint, path: str | Path, target: str) -> Path:
    """The checkpoint as a directory that transformers with torchao loads. torchao itself is not needed.

    Args:
        path: the directory to make; must not exist, or be empty.
        target: one of TARGETS.

    Raises:
        FormatError: what cannot be expressed (see `plan`), or something that is in the way. Then nothing is left behind.
    """
    path = Path(path)
    vacant(path)
    found = plan(checkpoint, target)
    if set(found.values()) <= {"full"}:
        raise FormatError(f"no layer is quantized, so there is nothing that {NAME} could say of this model")
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    header: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QTensor):
            layer = name.removesuffix(".weight")
            stored[layer] = store(tensor, KINDS[found[name]])
            tensors |= {f"{layer}._weight_{part}": stored[layer].tensors[part] for part in PARTS}
            header[name] = json.dumps(stored[layer].said)
        else:
            tensors[name] = folder.plain(tensor)
            header[name] = json.dumps({"_type": "Tensor"})
    header["tensor_names"] = json.dumps(list(checkpoint.tensors))
    config = _config(checkpoint, stored, {name.removesuffix(".weight"): kind for name, kind in found.items() if kind != "full"})
    return folder.write(path, tensors, config, checkpoint.tokenizer, header)


def _config(checkpoint: Checkpoint, stored: dict[str, Stored], named: dict[str, str]) -> dict[str, Any]:
    """config.json: the model's own in the type of the tensors, and what torchao would be asked for."""
    linear = [name for name, module in folder.skeleton(checkpoint.config, NAME).items() if isinstance(module, nn.Linear)]
    asked = {layer: _asked(kind, stored[layer]) for layer, kind in named.items()}
    first = next(iter(asked.values()))
    quant_type = first if all(one == first for one in asked.values()) else {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": asked}}
    own = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    return {**own, "dtype": "float32", "quantization_config": {
        "quant_method": NAME, "quant_type": {"default": quant_type}, "modules_to_not_convert": [name for name in linear if name not in named],
        "include_input_output_embeddings": False, "untie_embedding_weights": False}}


def _asked(name: str, layer: Stored) -> dict[str, Any]:
    """The config object with which torchao's quantizer would make such a tensor, as JSON."""
    kind = KINDS[name]
    grain = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}} if layer.whole else {
        "_type": "PerGroup", "_version": 1, "_data": {"group_size": layer.size}}
    mapping = {"_type": "MappingType", "_data": "SYMMETRIC" if layer.symmetric else "ASYMMETRIC"}
    dtype = {"_type": "torch.dtype", "_data": f"int{kind.bits}"}
    if kind.dynamic:
        return {"_type": "Int8DynamicActivationIntxWeightConfig", "_version": 2,
                "_data": {"weight_dtype": dtype, "weight_granularity": grain, "weight_mapping_type": mapping}}
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {"weight_dtype": dtype, "granularity": grain, "mapping_type": mapping}}
