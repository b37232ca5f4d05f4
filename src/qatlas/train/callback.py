"""QatlasCallback: what quantization-aware training needs and a transformers Trainer does not do by itself.

    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=QatlasConfig("w4-g32"))
    Trainer(model, args, ..., callbacks=[QatlasCallback(pack="out/packed")])

    before     a model that cannot be trained is refused when the Trainer is made: packed, without quantized layers, masters in 16 bits, or with
               quantizers that wait for calibration. A model that `quantize` made is given its quantization_config, which its checkpoints need
    step       scales never decay, and have a learning rate of their own
    after      kept weights are refreshed; at the end the packed model is saved beside the checkpoints, where `pack` says so

The Trainer puts scales among the weights, in a group that decays. The callback takes them out for the length of `optimizer.step()` and puts them
back, so the groups of the optimizer are the Trainer's own at all other times: schedules, checkpoints and resuming see nothing of it, and an optimizer
that was given to the Trainer is served alike (its moments belong to parameters, not to groups).

Static activations (a scheme with "-static", or an open signedness) have no scale before they have seen data, and no parameter that an optimizer
could have been given. Calibrate before the Trainer is made: `calibrate_on(model, batches)` (calibrate.py) with a few batches as the collator makes
them. The callback refuses a model where this was forgotten. Dynamic activations ("w4a8") need nothing.

bf16=True and fp16=True are autocast, and leave the masters in fp32. `bf16_full_eval` would write them in bf16 for good, and is refused; so are FSDP
and DeepSpeed, which cut parameters into pieces that the quantizers here have not been tested with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..core.error import CheckpointError, QuantError, RunError
from ..layers.packed import Packed
from ..layers.quantized import Quantized
from ..model import hub
from ..model.artefact import holds
from ..model.pack import save
from ..model.quantized import quantizers
from .calibrate import pending
from .optim import role, unit

WIDE = (torch.float32, torch.float64)


class QatlasCallback(TrainerCallback):
    """Makes a Trainer's run quantization-aware; see the head of this file.

    pack: a new directory for the packed model, written when training ends; None writes the Trainer's checkpoints only.
    scale_lr: peak learning rate of the scales as a share of each scale's own size, under the Trainer's schedule (Adam moves every number by its
        learning rate, and the step of an 8-bit grid is a hundredth of its weights); None takes the Trainer's rate.
    """

    def __init__(self, pack: str | Path | None = None, scale_lr: float | None = 0.01) -> None:
        if scale_lr is not None and not scale_lr >= 0:
            raise RunError(f"scale_lr={scale_lr}: a share of each scale's own size, for instance 0.01, or None for the Trainer's rate")
        self.pack, self.scale_lr = None if pack is None else Path(pack), scale_lr
        self._units: dict[nn.Parameter, torch.Tensor] = {}
        self._whole: list[tuple[dict[str, Any], list[nn.Parameter]]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check(args, model)
        if self.pack is not None and self.pack.exists() and (not self.pack.is_dir() or any(self.pack.iterdir())):
            raise CheckpointError(f"pack={str(self.pack)!r} exists and is not an empty directory; give another path, or remove it first")
        if hasattr(model, "save_pretrained") and getattr(model, "hf_quantizer", None) is None:
            hub.adopt(model, hub.in_training(model))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check(args, model)                                        # the model may have been made anew (model_init), or cast since
        self._units = {p: unit(model, name) for name, p in model.named_parameters() if role(model, name, p) == "scales"}
        refresh(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._whole = [(group, group["params"]) for group in optimizer.param_groups]
        for group, params in self._whole:
            group["params"] = [p for p in params if p not in self._units]
            for p in params:
                if p in self._units:
                    optimizer.param_groups.append({**group, "params": [p], "weight_decay": 0.0, "lr": self._rate(group, p)})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        del optimizer.param_groups[len(self._whole):]
        for group, params in self._whole:
            group["params"] = params
        refresh(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any) -> None:
        refresh(model)                                            # load_best_model_at_end may have written the weights
        if self.pack is not None and state.is_world_process_zero:
            save(model, self.pack, processing_class if hasattr(processing_class, "save_pretrained") else None)

    @torch.no_grad()
    def _rate(self, group: dict[str, Any], scale: nn.Parameter) -> Any:
        if self.scale_lr is None or not group.get("initial_lr"):
            return group["lr"]
        return self.scale_lr * float(group["lr"]) / float(group["initial_lr"]) * float(self._units[scale].abs().mean())


def refresh(model: nn.Module) -> None:
    """Forget every kept weight: an optimizer that writes through `.data` is seen by no version counter."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.refresh()


def check(args: Any, model: nn.Module) -> None:
    """Whether a Trainer can train this model.

    Raises:
        RunError: no quantized layer, a packed model, masters or scales in 16 bits, arguments that would cast or cut them.
        QuantError: quantizers that wait for calibration, by name.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, Packed)]
    if packed:
        raise RunError(f"{packed[0]} is packed, and {len(packed) - 1} more layers: codes cannot be trained. Start from the trainable checkpoint or "
                       "from the full-precision model")
    if not holds(model):
        raise RunError(f"this {type(model).__name__} has no quantized layer: load it with quantization_config=QatlasConfig('w4-g32'), or call "
                       "quantize(model, rules) before the Trainer is made")
    waiting = list(pending(model))
    if waiting:
        raise QuantError(f"{len(waiting)} quantizers wait for calibration, first {waiting[0]}: their scales must exist before the optimizer does. "
                         'Call qatlas.train.calibrate.calibrate_on(model, batches) before the Trainer is made, or take dynamic activations ("w4a8")')
    masters = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, Quantized) and m.slots.frozen is None}
    scales = {f"{name}.scale": q.scale for name, q in quantizers(model).items() if q.scale is not None}
    narrow = [(name, t.dtype) for name, t in (masters | scales).items() if t.dtype not in WIDE]
    if narrow:
        raise RunError(f"{narrow[0][0]} is {str(narrow[0][1]).removeprefix('torch.')}, and {len(narrow) - 1} more: masters and scales are fp32, or "
                       "small steps are lost. Load with dtype=torch.float32; mixed precision is bf16=True of the TrainingArguments")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, False):
            raise RunError(f"{name}=True casts the model, masters and all, when it is evaluated; leave it out (bf16=True is autocast, and is fine)")
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise RunError(f"{name}: parameters in pieces are not supported under quantizers yet; use one process, or plain data parallelism")
