"""A transformers directory: model.safetensors, config.json with `quantization_config`, the tokenizer's files. What the formats that write one share.

The class that the config names is built empty (without memory for weights), which is what a reader does: so a name that it does not know, a tensor
that is missing and a layer that is no nn.Linear are refused here and not met there. The directory appears whole or not at all, and never replaces
another. Tensors in full precision are stored in bf16 or fp16 where that holds every value, else in fp32.

Of what is read nothing is believed and nothing is unpickled: `config` and `Tensors` are the two ways in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.error import SAID, FormatError, foreign
from ..core.quantizer import Quant
from .checkpoint import TOKENIZER, Checkpoint, appearing
from .shards import read_json, shards

DEEP = 10_000                                                     # layers; more would take minutes to build, even without memory


def plan(checkpoint: Checkpoint, form: str, kind_of: Callable[[Any, Quant | None], str]) -> dict[str, str]:
    """The name of each tensor -> its kind, or "full" for those in full precision.

    kind_of: of a weight (QTensor or Quant) and the Quant of its layer's input; raises FormatError where there is none.

    Raises:
        FormatError: an architecture that transformers cannot build, tensors that are not its, a tensor that the format cannot hold.
    """
    modules = skeleton(checkpoint.config, form)
    check_names(modules, checkpoint)
    out = {}
    for name, tensor in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if isinstance(tensor, Tensor):
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{name} holds NaN or infinity")
            out[name] = "full"
            continue
        if not isinstance(modules.get(layer), nn.Linear):
            raise FormatError(f"{name} belongs to a {type(modules.get(layer)).__name__}; {form} quantizes nn.Linear alone: keep it in full precision")
        try:
            out[name] = kind_of(tensor, checkpoint.inputs.get(layer))
        except FormatError as error:
            raise FormatError(f"{name}, shape {tuple(getattr(tensor, 'shape', ()))}: {error}") from None
    if bare := [layer for layer in checkpoint.inputs if out.get(f"{layer}.weight", "full") == "full"]:
        raise FormatError(f"{bare[0]} quantizes its input and not its weight, which {form} does not write; quantize both, or neither")
    if checkpoint.signals:
        raise FormatError(f"{checkpoint.signals[0]} is a quantized signal, and {form} holds weights and inputs of layers alone")
    return out


def skeleton(config: dict[str, Any], form: str) -> dict[str, nn.Module]:
    """Name -> module of the model that a reader will build, without memory for its weights.

    Raises:
        FormatError: a config that names no class of transformers, or of which it can build none.
    """
    import transformers

    kind, names = str(config.get("model_type")), config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if cls is None or kind not in transformers.CONFIG_MAPPING:
        raise FormatError(f"{form} holds models that transformers can build, and knows no {name or 'class'} of type {kind!r}")
    bare = {key: value for key, value in config.items() if key != "quantization_config"}
    if many := [key for key, value in bare.items() if "layer" in key and isinstance(value, int | float) and value > DEEP]:
        raise FormatError(f"config.json says {many[0]}={bare[many[0]]}; no model has so many, the file is damaged")
    with torch.device("meta"), foreign(f"transformers can build no {name} from config.json"):
        return dict(cls(transformers.CONFIG_MAPPING[kind].from_dict(bare)).named_modules())


def load(path: str | Path, found: dict[str, Any], dtype: torch.dtype | str) -> nn.Module:
    """The model that transformers loads from a directory, by the class that its config (`found`) names, in eval mode.

    Raises:
        FormatError: no such class, or what transformers says against the directory.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    names = found.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise FormatError(f"{path}/config.json names {name!r}, which is no model class of transformers")
    try:
        return cls.from_pretrained(Path(path), dtype=dtype, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError, TypeError, StrictDataclassError) as error:
        raise FormatError(f"transformers cannot load {path}: {error}") from error


def check_names(modules: dict[str, nn.Module], checkpoint: Checkpoint) -> None:
    """Refuse tensors that are not those of the model: of those that are tied one is enough, and before training buffers are not asked for."""
    ties = getattr(modules[""], "all_tied_weights_keys", None) or {}
    state, have = modules[""].state_dict(), set(checkpoint.tensors)
    twins = {a: {b for pair in ties.items() for b in pair if a in pair} for a in state}
    missing = sorted(name for name, _ in modules[""].named_parameters() if name not in have and not twins[name] & have)
    extra = sorted(have - set(state))
    wrong = sorted(name for name in have & set(state) if not _fits(name, checkpoint.tensors[name], modules, state[name]))
    if missing or extra or wrong:
        raise FormatError(f"the tensors are not those of {type(modules['']).__name__}: missing {', '.join(missing[:4]) or 'none'}; "
                          f"unknown {', '.join(extra[:4]) or 'none'}; of another shape {', '.join(wrong[:4]) or 'none'}")


def _fits(name: str, tensor: Any, modules: dict[str, nn.Module], own: Tensor) -> bool:
    """A QTensor lies (out, in), also where the module's weight lies (in, out), as that of Conv1D does."""
    layer = modules.get(name.removesuffix(".weight"))
    turned = type(layer).__name__ == "Conv1D" and name.endswith(".weight") and not isinstance(tensor, Tensor)
    return tuple(getattr(tensor, "shape", own.shape)) == tuple(own.T.shape if turned else own.shape)


def write(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: Path | None, header: dict[str, str] | None = None,
          more: Mapping[str, Any] | None = None) -> Path:
    """The directory; it appears whole or not at all. header: what model.safetensors says of itself, besides that torch wrote it. more: other
    files, name -> what becomes its JSON.

    Raises:
        FormatError: something is in the way.
    """
    from safetensors.torch import save_file

    with appearing(path) as aside:
        aside.mkdir()
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt", **(header or {})})
        for name, said in {"config.json": config, **(more or {})}.items():
            (aside / name).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in (tokenizer / name for name in (*TOKENIZER, "generation_config.json")) if tokenizer else ():
            if file.is_file():
                shutil.copyfile(file, aside / file.name)
    return path


def narrow(steps: Tensor, dtype: str) -> Tensor:
    """The numbers in the type that they were trained in, where that is bf16 or fp16 and loses nothing; else in fp32."""
    small = steps.to(getattr(torch, dtype)) if dtype in ("bfloat16", "float16") else steps.float()
    return small if torch.equal(small.to(steps.dtype), steps) else steps.float()


def plain(tensor: Tensor) -> Tensor:
    """A tensor in full precision, in the smallest type that holds every value."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor.clone()
    small = narrow(tensor, "bfloat16")
    return small if small.dtype == torch.bfloat16 else narrow(tensor, "float16").clone()


def said(path: str | Path) -> dict[str, Any] | None:
    """`quantization_config` of a directory's config.json, or None where there is none to read."""
    try:
        inner = read_json(Path(path) / "config.json").get("quantization_config")
    except FormatError:
        return None
    return inner if isinstance(inner, dict) else None


def config(path: str | Path, method: str) -> dict[str, Any]:
    """config.json of a directory whose quantization is by `method`.

    Raises:
        FormatError: no such file, no JSON, another method.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FormatError(f"there is no {method} directory {path}: it has no config.json")
    found = read_json(file)
    inner = found.get("quantization_config")
    by = inner.get("quant_method") if isinstance(inner, dict) else None
    if by != method:
        raise FormatError(f"{file} describes no {method} model, its quantization is by {by!r}")
    return found


@dataclass
class Tensors:
    """What the safetensors files of a directory hold: their tensors, and what their headers say."""

    values: dict[str, Tensor]
    header: dict[str, str]

    @classmethod
    def of(cls, path: str | Path) -> Tensors:
        """All of its shards.

        Raises:
            FormatError: none, only pickle files, one that is truncated or of another kind, a name that stands in two.
        """
        from safetensors import SafetensorError, safe_open

        out = cls({}, {})
        for file in shards(path):
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    if twice := [name for name in names if name in out.values]:
                        raise FormatError(f"{file}: {twice[0]} stands in another file too; the shards are not of one save")
                    out.values |= {name: opened.get_tensor(name) for name in names}
                    out.header |= opened.metadata() or {}
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise FormatError(f"{file} is no whole safetensors file, truncated or of another kind: {str(error)[:SAID]}") from None
        return out
