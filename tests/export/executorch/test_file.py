"""A program written, read back and run by ExecuTorch; what is refused leaves nothing. Skipped where the package is absent, as in CI."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_llama import llama
from torch import nn

pytest.importorskip("executorch.exir")
pytest.importorskip("flatbuffers")

from qatlas.core.error import FormatError
from qatlas.core.grain import Group
from qatlas.core.grid import Ternary, Uniform
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMean
from qatlas.core.scheme import scheme
from qatlas.export import executorch as form
from qatlas.export.checkpoint import Checkpoint
from qatlas.export.executorch import runtime
from qatlas.export.executorch.fitting import IMAGE, INPUT
from qatlas.keep import export
from qatlas.model.pack import checkpoint, pack, save
from qatlas.model.program import program
from qatlas.model.rules import Rule, keep_full, of_scheme, quantize
from qatlas.model.verify import verify


class Net(nn.Module):
    """A layer of each kind, one of an odd width, one in full precision; norms between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.grouped, self.channel, self.ternary = nn.Linear(64, 96), nn.Linear(96, 33, bias=False), nn.Linear(33, 64)
        self.norm, self.wide, self.full, self.spare = nn.LayerNorm(64), nn.Linear(64, 40), nn.Linear(40, 7), nn.Linear(3, 3)

    def forward(self, x):
        x = self.ternary(self.channel(self.grouped(x).relu()))
        return self.full(self.wide(self.norm(x)).sigmoid())


class Pictures(nn.Module):
    """Convolutions with a shortcut, whose inputs are quantized image by image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1, bias=False)
        self.c, self.head = nn.Conv2d(8, 8, 1, 2), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head((self.b(x) + self.c(x)).relu().mean((2, 3)))


RULES = [Rule("grouped", weight=Quant(Uniform(4), Group(32)), input=INPUT), Rule("channel", weight=Quant(Uniform(4)), input=INPUT),
         Rule("ternary", weight=Quant(Ternary(), scale=AbsMean()), input=INPUT), Rule("wide", weight=Quant(Uniform(8)), input=INPUT)]
X = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net():
    return pack(quantize(Net(), RULES, target="executorch:int4")).eval()


@pytest.fixture(scope="module")
def data(net):
    made = checkpoint(net)
    made.graph = program(net, {"x": X})
    return made


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    return form.write(data, tmp_path_factory.mktemp("program") / "model.pte", "int4")


@pytest.fixture(scope="module")
def found(path):
    return runtime.constants(path)


def test_every_tensor_comes_back_bit_for_bit(found, data):
    used = {name: t for name, t in data.tensors.items() if not name.startswith("spare")}
    assert set(found[0]) == set(used)
    for name, tensor in used.items():
        assert torch.equal(found[0][name], tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()), name


def test_the_program_says_its_types_and_what_it_lacks(found, data):
    assert found[1]["types"] == {"qbint4": 1, "qcint4": 2, "qcint8": 1} and found[1]["left_out"] == []
    assert found[1]["unused"] == ["spare.weight", "spare.bias"] and found[1]["target"] == "executorch:int4"
    plan = form.plan(data, "int4")
    assert (plan["grouped.weight"], plan["ternary.weight"], plan["wide.weight"], plan["full.weight"]) == ("qbint4", "qcint4", "qcint8", "fp32")


def test_the_engine_computes_what_the_model_computes(path, net):
    asked = [X, 3 * X.flip(1), torch.zeros_like(X)]
    with torch.no_grad():
        ours = torch.cat([net(x)[:, -1] for x in asked])
    theirs = form.answers(path, asked)
    assert float((ours - theirs).abs().max()) < 1e-3 * float(ours.abs().max())


def test_refused_inputs_and_files(path, tmp_path):
    with pytest.raises(FormatError, match="inputs that it does not take|did not take"):
        form.answers(path, [torch.zeros(1, 5, 63)])
    with pytest.raises(FormatError, match="there is no ExecuTorch program"):
        form.read(tmp_path / "gone.pte")
    with pytest.raises(FormatError, match="exists"):
        form.write(Checkpoint({}, {}), path, "int4")


@pytest.mark.parametrize("spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"PK" + raw[2:],
                                   lambda raw: raw.replace(b"qbint4", b"qbint5"), lambda raw: raw[:2000] + bytes(600) + raw[2600:]],
                         ids=["cut", "empty", "foreign", "another type", "zeros"])
def test_a_spoilt_file_is_refused_and_nobody_crashes(path, spoil, tmp_path):
    (tmp_path / "m.pte").write_bytes(spoil(path.read_bytes()))
    with pytest.raises(FormatError, match="no whole program|did not take"):
        form.read(tmp_path / "m.pte")


def test_one_flipped_code_is_another_constant(path, tmp_path, data):
    raw = bytearray(path.read_bytes())
    code = data.tensors["wide.weight"].values().to(torch.int8).numpy().tobytes()
    raw[raw.find(code)] ^= 1
    (tmp_path / "m.pte").write_bytes(bytes(raw))
    with pytest.raises(FormatError, match="wide.weight"):
        form.read(tmp_path / "m.pte")


def test_a_program_of_somebody_else(tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    made = torch.export.export(nn.Linear(4, 4), (torch.ones(1, 4),))
    (tmp_path / "m.pte").write_bytes(to_edge_transform_and_lower(made, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
    with pytest.raises(FormatError, match="not written by qatlas"):
        form.read(tmp_path / "m.pte")


@pytest.mark.parametrize("spoil, words", [
    (lambda d: d.tensors.update({"full.bias": torch.full((7,), torch.nan)}), "full.bias: it holds NaN"),
    (lambda d: d.tensors.update({"wide.weight": Quant(Uniform(8), Group(32)).quantize(torch.randn(40, 64))}), "wide.weight.*4 bits alone"),
    (lambda d: d.inputs.pop("wide"), "wide.weight.*full precision"), (lambda d: d.inputs.update({"wide": scheme("w4a8-static").input}), "wide:input"),
    (lambda d: setattr(d, "graph", None), "qatlas.model.program.program")])
def test_refused_by_name_and_nothing_left(data, spoil, words, tmp_path):
    other = dataclasses.replace(data, tensors=dict(data.tensors), inputs=dict(data.inputs))
    spoil(other)
    with pytest.raises(FormatError, match=words):
        form.write(other, tmp_path / "m.pte", "int4")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_changes_constants_is_found_out(data, tmp_path, monkeypatch):
    from qatlas.export.executorch import lower

    monkeypatch.setattr(lower, "_plain", lambda tensor: {"plain": "0" * 64, "shape": list(tensor.shape), "dtype": "float32"})
    with pytest.raises(FormatError, match="has changed what it was given"):
        form.write(data, tmp_path / "m.pte", "int4")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_convolution_net(tmp_path):
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rules = [Rule("head", weight=Quant(Uniform(8)), input=INPUT), Rule("*", weight=Quant(Uniform(8)), input=IMAGE)]
    model = pack(quantize(Pictures(), rules, target="executorch:int8")).eval()
    data = checkpoint(model)
    data.graph = program(model, {"x": x})
    path = form.write(data, tmp_path / "m.pte", "int8")
    found = form.read(path)
    assert form.types(path) == {"qcint8": 4} and form.unused(path) == ([], [])
    for name, tensor in data.tensors.items():
        assert torch.equal(found[name], tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()), name
    asked = [x, 3 * x.flip(3)]
    with torch.no_grad():
        ours = torch.cat([model(image) for image in asked])
    assert float((ours - form.answers(path, asked)).abs().max()) < 1e-2 * float(ours.abs().max())


@pytest.mark.parametrize("layer, words", [(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "of 4 groups"),
                                          (nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), "has changed what it was given.*1.weight")])
def test_convolutions_that_are_refused(layer, words, tmp_path):
    model = pack(quantize(layer.eval(), [Rule("*", weight=Quant(Uniform(8)), input=IMAGE)], target="executorch:int8")).eval()
    data = checkpoint(model)
    data.graph = program(model, {"input": torch.randn(1, 4, 8, 8)})
    with pytest.raises(FormatError, match=words):
        form.write(data, tmp_path / "m.pte", "int8")
    assert not list(tmp_path.iterdir())


def bert():
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                                                    max_position_embeddings=32, num_labels=3))


def vit():
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                                               patch_size=4, num_labels=3))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0))


@pytest.mark.slow
@pytest.mark.parametrize("make, count", [(bert, 8), (vit, 8), (gpt2, 4)])
def test_other_models(make, count, tmp_path):
    torch.manual_seed(0)
    w8 = Quant(Uniform(8))
    full = [] if make is vit else keep_full("@embedding", *(["@head"] if make is gpt2 else []))
    rules = [*full, *([Rule("*projection", weight=w8, input=IMAGE)] if make is vit else []), Rule("*", weight=w8, input=INPUT)]
    save(pack(quantize(make().eval(), rules, target="executorch:int8")), tmp_path)
    export(tmp_path, "executorch:int8")
    proofs = [proof for proof in verify(tmp_path, "executorch:int8") if proof.claim.startswith("executorch")]
    assert [proof.passed for proof in proofs] == [True, True] and f"{count} qcint8" in proofs[0].result, proofs


@pytest.mark.slow
def test_a_llama_is_trained_for_it_written_and_verified(tmp_path):
    model = llama(tied=True, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    quantize(model, [*keep_full("@embedding", "@head"), *of_scheme("w4a8-g32")], target="executorch:int4")
    save(pack(model), tmp_path)
    assert export(tmp_path, "executorch:int4").name == "model.pte"
    proofs = [proof for proof in verify(tmp_path, "executorch:int4") if proof.claim.startswith("executorch")]
    assert [proof.passed for proof in proofs] == [True, True] and "7 quantized" in proofs[0].result, proofs
    assert proofs[1].reader == "ExecuTorch" and "8 of 8" in proofs[1].result
