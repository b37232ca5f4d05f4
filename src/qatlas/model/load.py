"""Where models come from: the zoo, a directory, the Hub. `load(name)` gives the model and its tokenizer, ready for training.

    load("zoo:gpt")                                   small models of this package: gpt, vit, resnet
    load("runs/out")                                  a qatlas directory, packed or in training (pack.py, trainable.py), or any Hugging Face directory
    load("theirs"), load("model.gguf")                what others have quantized, in a format that we read (foreign.py): packed, as the file says
    load("Qwen/Qwen3-0.6B")                           a model of the Hub, downloaded once
    load("google/vit-base-patch16-224", task="image")

Weights are loaded as fp32 masters, whatever the file holds: a bf16 master does not move at learning rate 1e-5. Only safetensors are read; a model
that exists as a pickle only is refused, and so is code that comes with a model (`trust_remote_code` is never set).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.error import CheckpointError, unknown
from ..export import holder, readable
from . import artefact, foreign, pack

TASKS = {"lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LINES = 3                                                         # lines of another library's message that an error quotes


def load(name: str | Path, task: str = "lm", **config: Any) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer or image processor or None).

    name: "zoo:NAME", a directory, or a Hub id.
    task: lm, classification or image: which of transformers' Auto classes builds it (not asked for the zoo and for packed directories).
    config: for the zoo its arguments (`classes=100`), else changes to the model's configuration (`num_labels=3`, `attn_implementation="eager"`).

    Raises:
        CheckpointError: an unknown name or task, no network and not in the cache, a truncated or mismatched file, pickles only.
    """
    text = str(name)
    if text.startswith("zoo:"):
        return _zoo(text.removeprefix("zoo:"), config)
    if task not in TASKS:
        raise CheckpointError(unknown("task", task, TASKS))
    path = Path(text).expanduser()
    if holder(path) is not None:
        _unchanged(path, config)
        return foreign.load(path), _vocabulary(path, task)
    if not path.is_dir():
        if path.is_file():
            raise CheckpointError(f"{path} is a file; give the directory that holds config.json and model.safetensors, or a GGUF file")
        if text.startswith(("/", ".", "~")) or text.count("/") > 1:
            raise CheckpointError(f"there is no directory {text}; a name is a directory, a Hub id (owner/name), or zoo:gpt, zoo:vit, zoo:resnet")
        return _from(text, task, config, text)
    if _check(path):
        _unchanged(path, config)
        return pack.load_packed(path), _tokenizer(str(path), task)
    return _from(str(path), task, config, f"the directory {path}")


def start(name: str | Path, task: str = "lm", **config: Any) -> tuple[nn.Module, Any]:
    """As `load`, for a paper that quantizes by rules of its own: what others have quantized comes in full precision, dequantized.

    Raises:
        CheckpointError, FormatError: as `load`.
    """
    path = Path(str(name)).expanduser()
    if holder(path) is None:
        return load(name, task, **config)
    _unchanged(path, config)
    return foreign.whole(path), _vocabulary(path, task)


def speciality(name: str | Path) -> str:
    """What a model is for, by its configuration: lm, classification or image; lm where nothing says otherwise.

    >>> speciality("zoo:gpt"), speciality("zoo:vit")
    ('lm', 'image')
    """
    text = str(name)
    if text.startswith("zoo:"):
        return "image" if text in ("zoo:vit", "zoo:resnet") else "lm"
    import transformers

    try:
        found = transformers.AutoConfig.from_pretrained(text).architectures or [""]
    except Exception:                                             # what is wrong with the model `load` says in full
        return "lm"
    return next((task for task, auto in TASKS.items() if found[0].endswith(auto.removeprefix("AutoModel"))), "lm")


def _zoo(name: str, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    try:
        from . import zoo  # type: ignore[attr-defined]
    except ImportError as error:
        raise CheckpointError(f"this installation has no zoo ({error}); install the whole package") from None
    known = {key: getattr(zoo, key) for key in ("gpt", "vit", "resnet") if hasattr(zoo, key)}
    if name not in known:
        raise CheckpointError(unknown("zoo model", name, known))
    takes = inspect.signature(known[name]).parameters
    for key in config:
        if key not in takes:
            raise CheckpointError(f"zoo:{name}: " + unknown("argument", key, takes))
    made = known[name](**config)
    return made if isinstance(made, tuple) else (made, None)


def _unchanged(path: Path, config: dict[str, Any]) -> None:
    if config:
        raise CheckpointError(f"{path} is quantized: its configuration cannot be changed by {', '.join(config)}")


def _check(path: Path) -> bool:
    """Whether a directory is a packed one of ours; raises where nothing can be loaded from it."""
    found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; found: {found}. Give the directory that holds config.json and model.safetensors"
                              + (", or the GGUF file itself" if any(path.glob("*.gguf")) else ""))
    config = artefact.read_json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [p.name for kind in PICKLES for p in path.glob(kind)]
        why = f"only pickle files ({', '.join(pickles)}), which are never opened; convert them where they were made" if pickles else f"found: {found}"
        raise CheckpointError(f"{path} has no safetensors weights: {why}")
    artefact.within(path)
    artefact.header(files)
    said = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(said, dict) and said.get("quant_method") == artefact.METHOD


def _from(where: str, task: str, config: dict[str, Any], told: str) -> tuple[nn.Module, Any]:
    import transformers

    try:
        plan = transformers.AutoConfig.from_pretrained(where)
        if getattr(plan, "quantization_config", None) is not None:
            method = plan.quantization_config.get("quant_method") if isinstance(plan.quantization_config, dict) else "another library"
            if method != artefact.METHOD:
                raise CheckpointError(_quantized(told, str(method)))
        model, report = getattr(transformers, TASKS[task]).from_pretrained(where, dtype=torch.float32, use_safetensors=True,
                                                                           output_loading_info=True, ignore_mismatched_sizes=True, **config)
    except CheckpointError:
        raise
    except Exception as error:                                    # transformers raises OSError, ValueError, RuntimeError or KeyError for one fault
        raise CheckpointError(_told(error, told)) from error
    _complete(model, report, told, None if task == "lm" else getattr(model, "base_model_prefix", None), "num_labels" in config)
    return model.eval(), _tokenizer(where, task)


def _quantized(told: str, method: str) -> str:
    """What to say of a model that another library has quantized."""
    if method in readable():
        return f"{told} is quantized ({method}), which is read from a directory: hf download {told} --local-dir DIR, then give DIR"
    return (f"{told} is quantized by {method!r}, which qatlas does not read; it reads {', '.join(readable())} and its own. "
            "Start from the model in full precision")


def _complete(model: nn.Module, report: dict[str, Any], told: str, body: str | None, new_head: bool) -> None:
    """A tensor that the files lack would be random: only a head outside of `body` may be, and have another shape when other labels are asked for."""
    missing = sorted(key for key in report.get("missing_keys", ()) if body is None or key.startswith(f"{body}."))
    wrong = sorted((key, tuple(there), tuple(here)) for key, there, here in report.get("mismatched_keys", ())
                   if body is None or not new_head or key.startswith(f"{body}."))
    if wrong:
        key, there, here = wrong[0]
        raise CheckpointError(f"{told} does not fit its config.json: {len(wrong)} tensors have another shape, first {key}: {there} in the file, "
                              f"{here} in the model. The two must come from the same save")
    if missing:
        raise CheckpointError(f"{told} lacks {len(missing)} tensors of {type(model).__name__} ({', '.join(missing[:3])}, ...); they would be random. "
                              "The files belong to another model, or some are missing")


def _told(error: Exception, told: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    short = " ".join(lines[:LINES])[:400] or type(error).__name__
    if isinstance(error, OSError) and not told.startswith("the directory"):
        return (f"{told} cannot be fetched and is not in the cache: no network, no such model, no right to read it, or no safetensors in it. "
                f"Give a local directory instead. transformers says: {short}")
    return f"{told} cannot be loaded: {short}"


def _vocabulary(path: Path, task: str) -> Any:
    """The tokenizer of a foreign artefact: what lies beside it, else what the artefact itself says."""
    if path.is_dir() or any((path.parent / name).is_file() for name in pack.TOKENIZER):
        return _tokenizer(str(path if path.is_dir() else path.parent), task)
    form = readable()[str(holder(path))]
    return form.tokenizer(path) if hasattr(form, "tokenizer") else None


def _tokenizer(where: str, task: str) -> Any:
    """The tokenizer (or image processor) that lies beside the weights, else None."""
    import transformers

    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in pack.TOKENIZER):
        return None                                               # transformers would make an empty one up

    auto = transformers.AutoImageProcessor if task == "image" else transformers.AutoTokenizer
    try:
        return auto.from_pretrained(where)
    except Exception as error:                                    # what a missing tokenizer raises differs from model to model
        there = [name for name in pack.TOKENIZER if (Path(where) / name).is_file()]
        if there:
            raise CheckpointError(f"{where} has {', '.join(there)}, which transformers cannot read ({str(error)[:200]}); save it again") from error
        return None
