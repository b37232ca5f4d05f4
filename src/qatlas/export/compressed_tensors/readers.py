"""What others read in the directory: the compressed-tensors package, layer by layer, and transformers, which runs it.

Both give fp32 where they are asked for it: the package multiplies in the type of the step, so the step is handed over in fp32, as transformers does
when it loads a model in fp32. FP4 the package answers in bf16, where the products are exact.

transformers 5.23 with compressed-tensors 0.20 loads packed weights with zero points, and FP4 in fp32, with `dequantize=True` alone, and with that it
takes the first config group for all layers. A directory of several groups, one of them such, it cannot load; `model` then says so in a sentence.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.error import SAID, FormatError, foreign
from ..shards import headers, read_json, tensors
from .fitting import NAME


def lacks() -> str | None:
    """The sentence for a missing reader, or None."""
    return None if find_spec("compressed_tensors") else f"the package {NAME} is not installed: pip install 'qatlas[{NAME}]'"


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights of a directory under their Hugging Face names, fp32, through the package's own decompression.

    Raises:
        FormatError: no such directory, a truncated or foreign one, or the package is missing.
    """
    if lacks():
        raise FormatError(str(lacks()))
    with foreign(f"{path} is no whole {NAME} directory; write it anew"):
        return _read(path)


def _read(path: str | Path) -> dict[str, Tensor]:
    groups, held = _groups(path), tensors_of(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in held.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.weight_scale" in held and part.startswith("weight"):
            parts.setdefault(layer, {})[part] = tensor
    out = {name: t.float() if t.is_floating_point() else t for name, t in held.items() if name.rpartition(".")[0] not in parts}
    out |= {name: held[name].float() for layer in parts if (name := f"{layer}.bias") in held}
    for layer, mine in parts.items():
        out[f"{layer}.weight"] = _decompressed(path, layer, mine, groups)
    return out


def model(path: str | Path) -> nn.Module | str:
    """The model that transformers loads from the directory in fp32, or a sentence on why it cannot.

    Raises:
        FormatError: a directory that transformers refuses.
    """
    if lacks():
        return str(lacks())
    with foreign(f"transformers cannot load {path}"), _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                           # that a setting of ours overrides the file's
        return _model(path)


def _model(path: str | Path) -> nn.Module | str:
    import transformers

    config = config_of(path)
    headers(path)
    groups = config["quantization_config"]["config_groups"]
    hard = {name for name, group in groups.items() if "fp4" in group["format"] or ("pack" in group["format"] and not group["weights"]["symmetric"])}
    if hard and len(groups) > 1:
        return (f"transformers loads {'FP4 and ' if any('fp4' in groups[n]['format'] for n in hard) else ''}packed weights with zero points with "
                f"dequantize=True alone, and then reads every layer by the first of the {len(groups)} config groups")
    more = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if hard else {}
    cls = getattr(transformers, config["architectures"][0])
    made = cls.from_pretrained(Path(path), dtype=torch.float32, local_files_only=True, use_safetensors=True, **more).eval()
    if not hard:
        made.hf_quantizer.compressor.decompress_model(made)       # its first forward would, with bars
    return made


def _decompressed(path: str | Path, layer: str, part: dict[str, Tensor], groups: dict[str, Any]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    scheme = next((group for group in groups.values() if layer in group.targets), None) or next(
        (group for group in groups.values() if "Linear" in group.targets), None)
    if scheme is None:
        raise FormatError(f"{path}: no config group has the layer {layer}; config.json and model.safetensors are not of one save")
    if part["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        part = part | {"weight_scale": part["weight_scale"].float()}
    try:
        with _silent():
            return BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(part, scheme)["weight"].float()
    except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError, TypeError, IndexError) as error:
        raise FormatError(f"{path}: {layer} is not what its config group says: {error!r}. Write it anew") from error


def _groups(path: str | Path) -> dict[str, Any]:
    """Name -> QuantizationScheme, parsed by the package."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        return dict(QuantizationConfig.model_validate(config_of(path)["quantization_config"]).config_groups)
    except ValueError as error:
        raise FormatError(f"{path}/config.json has a quantization_config that {NAME} refuses: {str(error)[:SAID]}") from None


def config_of(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FormatError(f"there is no {NAME} directory {path}: it has no file config.json")
    config = read_json(file)
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(said, dict) or method != NAME or not isinstance(said.get("config_groups"), dict):
        raise FormatError(f"{file} describes no {NAME} model, its quantization is by {method!r}")
    return config


def tensors_of(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a directory by their names in its files.

    Raises:
        FormatError: no such file, a truncated one, or an index that points outside of the directory.
    """
    return dict(tensors({name: part for name, part in headers(path).items() if wanted(name)}))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the bars and the log lines that the package writes for every load."""
    from loguru import logger

    logger.disable("compressed_tensors")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")
