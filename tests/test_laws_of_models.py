"""The laws of DESIGN section 7 that speak of layers, models, training and files; those of numbers are in test_laws.py. Parts are found by listing."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
from parts import classes, every
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qatlas import export, papers
from qatlas.core.error import FormatError, QatlasError
from qatlas.core.grain import Group, PerChannel
from qatlas.core.noun import from_json
from qatlas.core.qtensor import QTensor
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax
from qatlas.core.scheme import scheme, weight
from qatlas.layers.adapter import AdapterSpec
from qatlas.layers.linear import QLinear
from qatlas.layers.packed import Packed
from qatlas.layers.quantized import KEEP, Layer, Quantized, Slots
from qatlas.model.graph import graph
from qatlas.model.pack import checkpoint, load_packed, pack, save
from qatlas.model.program import program
from qatlas.model.roles import Role
from qatlas.model.rules import Rule, keep_full, quantize
from qatlas.model.serving import cache
from qatlas.train import data
from qatlas.train.run import Run
from qatlas.train.tactic import Tactic
from qatlas.train.task import LanguageModelling

A8 = scheme("w4a8").input
IDS = torch.arange(24).view(2, 12) * 7 % 96
WORDS = "the cat sat on a mat and the dog ran to the red barn while it rained on us all day "
ADAPTERS = [spec.but(place=place) if hasattr(spec, "place") else spec
            for spec in every(AdapterSpec) for place in (("inside", "shift", "after", "beside") if hasattr(spec, "place") else ("",))]
HELD = {(1.58, "tq2_0"), (1.58, "q4_0"), (2, "q4_0"), (3, "q4_0"), (4, "q4_0"), (2, "q8_0"), (4, "q8_0"), (8, "q8_0"), (1, "f32"), (8, "f32"),
        *((bits, f"w{bits}a16") for bits in (2, 3, 4, 8)), (1, "w2a16"), (1.58, "w2a16"), *((bits, "mixed") for bits in (1, 1.58, 2, 3, 4, 8)),
        (1.58, "tq1_0"), (2, "q2_k"), (1.58, "q2_k"), (3, "q3_k"), (4, "q4_1"), (4, "q5_0"), (4, "q5_1"), (4, "q4_k"), (4, "q5_k"), (4, "q6_k"),
        (2, "mxfp4"), *((bits, f"w{bits}{end}") for bits in (2, 3, 4, 8) for end in ("", "_v2")), (1, "w2"), (1.58, "w2"), (1.58, "w4")}
TARGETS = [tuple(name.split(":")) for name in export.targets()]
FOR_Q4_0 = {name: {"bits": 3, "hadamard": None} for name in ("quest", "cage")}          # what it holds of papers whose defaults it refuses
HELD |= {(bits, kind) for bits in (1, 1.58, 2, 3, 4, 8) for _, kind in TARGETS if kind.startswith("int")}


def llama(width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64)).eval()


def task(**more: Any) -> LanguageModelling:
    text = data.Text(WORDS * 20, WORDS * 4)
    return LanguageModelling(text, lambda t: [ord(c) % 96 for c in t], length=16, batch=4, run=more.pop("run", Run(progress=False)), **more)


# ---- law 4: merging an adapter does not move the output, and the merged codes are the trained codes ------------------------------------------------

@pytest.mark.parametrize("spec", ADAPTERS, ids=str)
def test_law_4_merge_moves_nothing_or_is_refused(spec: Any) -> None:
    torch.manual_seed(0)
    layer, x = QLinear.of(nn.Linear(64, 16), Slots(weight(4), A8, adapter=spec)), torch.randn(5, 64)
    for parameter in layer.adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    before, codes = layer(x), layer.quantize().codes
    try:
        layer.merge()
    except QatlasError:
        assert torch.equal(layer(x), before) and layer.adapter is not None
        return
    assert torch.equal(layer.quantize().codes, codes) and (layer(x) - before).abs().max() < 1e-5


# ---- law 5: tests/train/test_tactic.py holds it over all tactics; here, that the list is not empty -------------------------------------------------

def test_law_5_has_tactics_to_hold() -> None:
    assert {"Watch", "Freeze"} <= {kind.__name__ for kind in classes(Tactic)}


# ---- law 6: rules -> JSON -> rules -> reload: the same logits --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["w4", "w1.58a8", "w1", "w2a8-g16", "w8-tensor", "w3a4", "w4a8kv4z"])
def test_law_6_rules_and_reload_give_the_same_logits(text: str, tmp_path: Path) -> None:
    model = quantize(llama(), text)
    again = quantize(llama(), from_json(json.loads(json.dumps([rule.to_json() for rule in model.qatlas_rules]))))
    logits = model(IDS).logits
    assert torch.equal(again(IDS).logits, logits)
    save(model, tmp_path / "saved")
    assert torch.equal(load_packed(tmp_path / "saved")(IDS).logits, logits)


# ---- law 7: export, read back by the public reader: the same weights; what cannot be held is refused -----------------------------------------------

class Projections(nn.Module):
    """Two matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"up_proj": nn.Linear(256, 512), "down_proj": nn.Linear(512, 256, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["down_proj"](self.model["up_proj"](x).relu())


@lru_cache
def traced(opset: int | None) -> Any:
    """The graph holds names and shapes; the numbers come with the checkpoint. None: as torch.export has it, inputs quantized for each token."""
    if opset is None:
        shown = quantize(Projections(), [Rule("*proj", weight=weight(4), input=A8)], target="executorch:int4")
        return program(shown, {"x": torch.zeros(1, 3, 256)})
    pytest.importorskip("onnxruntime")
    return graph(quantize(Projections(), [Rule("*proj", weight=weight(4))]), opset, {"x": torch.zeros(2, 3, 256)})


@pytest.mark.parametrize(("form", "kind"), TARGETS)
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
def test_law_7_the_formats_own_reader_gives_the_trained_weights(form: str, kind: str, bits: float, tmp_path: Path) -> None:
    module = export.target(f"{form}:{kind}")[0]
    compiled = hasattr(module, "TRACED")                          # the file holds the computation: a small one, as tracing takes seconds
    whole = hasattr(module, "OPSETS") or compiled
    if compiled and module.lacks():
        pytest.skip(module.lacks())                               # nothing is written without it
    entry = A8 if compiled else None
    model, trainer = Projections() if whole else llama(256), task(target=f"{form}:{kind}")
    grain = Group(256) if bits in (1.58, 4) else PerChannel()
    rules = [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*proj", weight=weight(bits, grain), input=entry)]
    try:
        quantize(model, rules, trainer)
        made = checkpoint(model)
        made.graph = traced(None if compiled else module.OPSETS[kind]) if whole else None
        file = module.write(made, tmp_path / f"model.{module.SUFFIX}" if module.SUFFIX else tmp_path / "model", kind)
    except FormatError as refusal:
        coarse = compiled and kind == "int8" and bits in (1.58, 4)                        # XNNPACK has groups of 4 bits alone
        assert (bits, kind) not in HELD or coarse, "this format holds these bits exactly"
        assert "model." in str(refusal) and form in str(refusal), "a refusal names the tensor, and what can hold it"
        assert not list(tmp_path.iterdir())
        return
    if hasattr(module, "lacks") and module.lacks():
        pytest.skip(module.lacks())
    found = module.read(file)
    for name, tensor in checkpoint(model).tensors.items():
        assert torch.equal(found[name], tensor.dequantize() if isinstance(tensor, QTensor) else tensor), name
    for name, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, Quantized)):
        assert torch.equal(found[f"{name}.weight"], layer.hard()), name


# ---- law 8: a kernel agrees with dequantize then matmul --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 5, 6, 7, 8])
def test_law_8_a_packed_product_is_dequantize_then_matmul(bits: float) -> None:
    packed = QLinear.of(nn.Linear(64, 16), Slots(weight(bits))).pack()
    x = torch.randn(3, 64)
    assert torch.equal(packed(x), nn.functional.linear(x, packed.qtensor().dequantize(), packed.bias))


# ---- law 9: every paper runs three steps on a small model: finite, resumable, exports --------------------------------------------------------------

UNHELD = {"pb_llm"}                                               # two kinds of codes in one tensor: every format refuses it


@pytest.mark.parametrize("name", papers.names())
def test_law_9_every_paper_runs_resumes_and_exports(name: str, tmp_path: Path) -> None:
    paper = papers.paper(name)

    class Stop(Tactic):
        """Break off after so many steps of all fits together."""

        def __init__(self, at: int = 99) -> None:
            self._left = at

        def after(self, loop: Any) -> None:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt

    def trained(out: Path, resume: bool = False, at: int = 99) -> nn.Module:
        run = Run(out, resume=resume, save_every=1, progress=False)
        run.tactics = (Stop(at),)
        target = None if name in UNHELD else "gguf:q4_0"
        return paper(llama(256), task(target=target, run=run), steps=3, **FOR_Q4_0.get(name, {}))

    model = trained(tmp_path / "whole")
    assert all(p.isfinite().all() for p in model.parameters()) and any(isinstance(m, Layer) for m in model.modules())
    points = sorted((tmp_path / "whole/state").rglob("*"))
    assert points, "a run leaves resume points until it is finished"
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", at=2)
    for out in ("whole", "broken"):
        again = trained(tmp_path / out, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)), out
    module, kind = export.target("gguf:q4_0")
    if name in UNHELD:
        with pytest.raises(FormatError, match="model.layers.0.self_attn.q_proj"):
            paper(llama(256), task(target="gguf:q4_0"), steps=3)
        with pytest.raises(FormatError, match="made of several parts"):
            module.write(checkpoint(model), tmp_path / "model.gguf", kind)
        return
    file = module.write(checkpoint(model), tmp_path / "model.gguf", kind)
    assert torch.equal(module.read(file)["model.layers.0.mlp.down_proj.weight"], model.model.layers[0].mlp.down_proj.hard())


@pytest.mark.parametrize("name", papers.names())
def test_a_paper_is_one_file_with_an_essay_and_one_function(name: str) -> None:
    module = papers.module(name)
    essay = module.__doc__ or ""
    assert len(essay.splitlines()) > 10, "the head is an essay of more than ten lines: the idea, formulas, sources, what is done otherwise"
    assert "arXiv" in essay, 'the essay gives the arXiv number, or says "not on arXiv"'
    signature = inspect.signature(getattr(module, name))
    assert list(signature.parameters)[:2] == ["model", "task"]
    rest = list(signature.parameters.values())[2:]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not inspect.Parameter.empty for p in rest)
    described = inspect.getdoc(getattr(module, name)) or ""
    assert all(f"{p.name}:" in described for p in rest), "every argument is documented: the docstring is the flag's help"
    told = {p.arg_name for p in docstring_parser.parse(described).params if p.description}
    assert told == {p.name for p in rest}, "the docstring can be read by the parser that makes the flags' help"


# ---- law 11: a kept buffer equals a fresh quantization, also through a training --------------------------------------------------------------------

@pytest.mark.parametrize("text", ["w4", "w1.58a8", "w2-g16"])
@pytest.mark.parametrize("keep", KEEP[1:])
def test_law_11_a_training_does_not_depend_on_how_weights_are_kept(text: str, keep: str) -> None:
    fit, adamw = importlib.import_module("qatlas.train.fit").fit, importlib.import_module("qatlas.train.optim").AdamW
    ends = []
    for how in ("each", keep):
        model = quantize(llama(), text)
        for layer in (m for m in model.modules() if isinstance(m, Quantized)):
            layer.keep = how
        fit(model, task(), optimizer=adamw(lr=1e-2), steps=4)
        ends.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


# ---- law 12: in a decoder neither a later token nor another row moves an earlier logit; prefill then decode is the whole forward -------------------

@pytest.mark.parametrize("text", ["w4a8", "w1.58a8", "w2a4-g16", "w4a8kv4"])
@pytest.mark.parametrize("form", ["trained", "packed"])
def test_law_12_no_token_hears_the_future_or_its_neighbour(text: str, form: str) -> None:
    model = quantize(llama(), text)
    model = pack(model) if form == "packed" else model
    whole = model(IDS).logits
    later = IDS.clone()
    later[:, 8:] = 5
    assert torch.equal(model(later).logits[:, :8], whole[:, :8])
    neighbour = IDS.clone()
    neighbour[1] = 3
    assert torch.equal(model(neighbour).logits[0], whole[0])
    prefill = model(IDS[:, :8], use_cache=True)
    rest = model(IDS[:, 8:], past_key_values=prefill.past_key_values).logits
    assert (torch.cat([prefill.logits, rest], 1) - whole).abs().max() < 1e-4 * whole.abs().max() + 1e-4


@torch.no_grad()
@pytest.mark.parametrize("text", ["w4a8kv8", "w4a8kv4", "w2a8kv3z", "w1.58a8kv2z"])
@pytest.mark.parametrize("form", ["trained", "packed"])
def test_law_12_keys_and_values_are_quantized_once_where_they_are_made(text: str, form: str) -> None:
    model = quantize(llama(), text)
    trained = copy.deepcopy(model).train()(IDS, use_cache=False).logits
    model = pack(model) if form == "packed" else model

    def stored(ids: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits, computed in so many parts; what the cache then holds, (B, G, tokens, ...)."""
        kept = cache(model)
        logits = torch.cat([model(part, past_key_values=kept).logits for part in ids.split(sizes, 1)], 1)
        return logits, [t for layer in kept.layers for side in layer.sides for t in side.parts.values()]

    whole, codes = stored(IDS, 12)
    assert torch.equal(whole, trained), "training and prefill: the same bits"
    for sizes in ((8, 4), (8, 1, 1, 1, 1), (1,) * 12, (5, 3, 4)):
        logits, again = stored(IDS, *sizes)
        assert all(map(torch.equal, again, codes)) and (logits - whole).abs().max() < 1e-6 * whole.abs().max() + 1e-6
    later, neighbour = IDS.clone(), IDS.clone()
    later[:, 8:], neighbour[1] = 5, 3
    assert all(torch.equal(a[:, :, :8], b[:, :, :8]) for a, b in zip(stored(later, 12)[1], codes, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(stored(neighbour, 12)[1], codes, strict=True))


def test_a_static_activation_scale_is_the_known_exception() -> None:
    """One scale a tensor, learned, is the same for all tokens and does not break law 12; a fresh one would: later tokens move it."""
    model = llama()
    quantize(model, [*keep_full(Role.EMBEDDING, Role.HEAD), Rule("*proj", weight=weight(4), input=Quant(A8.grid, importlib.import_module(
        "qatlas.core.grain").PerTensor(), AbsMax()))])
    later = IDS.clone()
    later[:, 8:] = 5
    assert not torch.equal(model(later).logits[:, :8], model(IDS).logits[:, :8])


def test_every_packed_layer_has_a_trainable_one() -> None:
    made = {layer.__name__.removeprefix("Packed") for layer in Packed.__subclasses__()}
    assert {"Linear", "Conv1d", "Conv2d", "Embedding", "Stack"} <= made
