"""The graph of whole models: names are those of the checkpoint, and what onnxruntime computes is what the trained model computes."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from qatlas import keep
from qatlas.core.error import FormatError, QuantError
from qatlas.core.grid import Uniform
from qatlas.core.scheme import scheme, weight
from qatlas.export import onnx as form
from qatlas.export.onnx.signals import address, marks
from qatlas.model import proof
from qatlas.model.graph import graph, inputs
from qatlas.model.pack import checkpoint, pack, save
from qatlas.model.rules import Rule, quantize
from qatlas.model.verify import verify
from qatlas.train.calibrate import calibrate

STATIC = scheme("w4a8-static").input
EMBEDDING = Rule("*word_embeddings", weight=weight(8))


def vit():
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                                               patch_size=4, num_labels=3))


def bert():
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
                                                    max_position_embeddings=32, num_labels=3))


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3))


CASES = {"vit": (vit, "onnx:int4", [Rule("*", weight=weight(4), input=STATIC)]),
         "bert": (bert, "onnx:int8", [EMBEDDING, Rule("@attention:probabilities", signal=STATIC.but(grid=Uniform(8, None))),
                                      Rule("*", weight=weight(8), input=STATIC)]),
         "resnet": (resnet, "onnx:int2", [Rule("*", weight=weight(1.58), input=STATIC.but(grid=Uniform(4, None)))])}


def calibrated(model, rules, target=None):
    """Quantized, static steps taken from random inputs."""
    draw = torch.Generator().manual_seed(1)
    batch = {name: torch.randn(x.shape, generator=draw) if x.is_floating_point() else x for name, x in inputs(model).items()}
    task = SimpleNamespace(extra_rules=(), target=target, calibration=lambda n=8: [batch], logits=lambda model, batch: model(**batch).logits)
    task.calibrate = lambda model: calibrate(model, task)
    return quantize(model, rules, task).eval()


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    """A run's directory with its export, and the trained model."""
    torch.manual_seed(0)
    make, target, rules = CASES[request.param]
    model = pack(calibrated(make(), rules, target))
    out = tmp_path_factory.mktemp(request.param) / "out"
    save(model, out)
    keep.export(out, target, model)
    return SimpleNamespace(name=request.param, model=model, out=out, target=target, path=out / f"exports/{target.replace(':', '-')}/model.onnx")


def test_every_proof_passes(run):
    proofs = verify(run.out, trained=run.model)
    said = [(proof.reader, proof.passed) for proof in proofs]
    theirs, ours = said[4:], proofs[3]
    assert said[:4] == [("transformers from_pretrained", True)] * 2 + [("the format's public reader", True), ("onnxruntime", True)], proofs
    assert "ties of activations" in ours.tolerance and "on 8 of 8 inputs" in ours.result
    if find_spec("openvino") is None or run.name == "resnet":
        assert theirs == [("OpenVINO", None)] and ("INT2" in proofs[4].result or "qatlas[openvino]" in proofs[4].result)
    else:
        assert theirs == [("OpenVINO", True)] * 2, proofs
        assert "equal bit for bit" in proofs[4].result and "on 8 of 8 inputs" in proofs[5].result


def test_a_decoder_in_matmulnbits(tmp_path):
    """The tied head's weight is looked up too, and stays one copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True)).eval()
    model = pack(quantize(model, [Rule("*", weight=weight(2))], target="onnx:int2-matmulnbits"))
    save(model, tmp_path / "out")
    path = keep.export(tmp_path / "out", "onnx:int2-matmulnbits", model)
    assert form.types(path) == {"INT4": 1, "MatMulNBits of 2 bits": 7}
    proofs = verify(tmp_path / "out", trained=model)
    engines = [proof for proof in proofs if "computes" in proof.claim and proof.reader in ("onnxruntime", "OpenVINO")]
    assert all(proof.passed is not False for proof in proofs) and engines, proofs
    assert all("0.0001 of the largest" in proof.tolerance and "on 8 of 8" in proof.result for proof in engines)


def test_token_types_are_asked_of_models_that_have_them():
    """GPT-2 would look type 0 up as its first word, and compute something else than without."""
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    assert list(inputs(gpt2)) == ["input_ids", "attention_mask"]
    assert list(inputs(bert())) == ["input_ids", "attention_mask", "token_type_ids"]


def test_an_engine_that_disagrees_fails_its_proof(run, monkeypatch):
    """Weights first: where those differ, logits would say nothing new."""
    module = form.ENGINES[1]
    monkeypatch.setattr(module, "why_not", lambda path: None)
    monkeypatch.setattr(form, "read", lambda path, engine=None: {})
    proofs = proof._engines(run.model, run.target, run.path, module, [], [])
    assert [(one.reader, one.passed) for one in proofs] == [("OpenVINO", False)] and "tensors differ" in proofs[0].result


def test_the_file_holds_what_was_said(run):
    import onnx

    found = onnx.load(run.path).graph
    ops = [node.op_type for node in found.node]
    layers = sum(".codes" in t.name for t in found.initializer)
    asked = {"vit": (8, 8), "bert": (11, 9), "resnet": (None, None)}[run.name]      # BERT: eight inputs and the probabilities; three embeddings
    assert asked[0] in (None, layers) and asked[1] in (None, ops.count("QuantizeLinear"))
    assert ops.count("DequantizeLinear") == layers + ops.count("QuantizeLinear") and layers > 2
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in found.initializer if t.name.endswith(".codes")}
    assert kinds == {"vit": {"INT4"}, "bert": {"INT8"}, "resnet": {"INT2"}}[run.name]
    assert [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in found.input] == {
        "vit": [["batch", 3, 8, 8]], "bert": [["batch", "tokens"]] * 3, "resnet": [["batch", 3, "height", "width"]]}[run.name]


def test_a_flipped_code_fails_the_proof(run, tmp_path):
    import shutil

    import onnx

    copy = shutil.copytree(run.out, tmp_path / "copy")
    path = copy / run.path.relative_to(run.out)
    proto = onnx.load(path)
    codes = next(t for t in proto.graph.initializer if t.name.endswith(".codes"))
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    path.unlink()
    onnx.save(proto, path)
    assert [proof.passed for proof in verify(copy)][-1] is False


def test_other_batches_and_lengths(run):
    torch.manual_seed(2)
    asked = torch.randint(0, 64, (3, 5)) if run.name == "bert" else torch.randn(3, 3, *((8, 8) if run.name == "vit" else (48, 40)))
    with torch.no_grad():
        ours = run.model(asked).logits
    assert torch.allclose(form.answers(run.path, [asked]), ours, atol=0.02 * float(ours.abs().max()))


def test_the_model_stays_as_it_is_and_the_trainable_form_gives_the_same_graph():
    model = calibrated(resnet(), CASES["resnet"][2])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = graph(model, 21)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and type(next(model.modules())) is type(model)
    quantized = {name for name, tensor in checkpoint(model).tensors.items() if hasattr(tensor, "codes")}
    assert quantized <= set(made.model.graph.initializers)
    assert {address(mark) for mark in marks(made.model.graph)} == set(made.signals) and len(made.signals) == len(quantized)


class Tied(nn.Module):
    """An embedding that is the head too, and a layer that quantizes only its input."""

    def __init__(self):
        super().__init__()
        self.head, self.embed, self.middle = nn.Linear(16, 32, bias=False), nn.Embedding(32, 16), nn.Linear(16, 16)
        self.embed.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)))


def test_tied_weights_have_one_name_and_one_place(tmp_path):
    torch.manual_seed(0)
    model = Tied().eval()
    quantize(model, [Rule("head", weight=weight(4)), Rule("embed", weight=weight(4)), Rule("middle", input=STATIC)])
    model.middle.input_quantizer.observe()
    ids = torch.arange(10).view(2, 5)
    model(ids)
    model.middle.input_quantizer.settle()
    data = checkpoint(model)
    data.graph = graph(model, 21, {"ids": ids})
    assert [name for name in data.graph.model.graph.initializers if name in ("head.weight", "embed.weight")] == ["head.weight"]
    path = form.write(data, tmp_path / "m.onnx", "int4")
    assert torch.equal(form.read(path)["head.weight"], data.tensors["head.weight"].dequantize())
    with torch.no_grad():
        assert torch.allclose(form.answers(path, [ids]), model(ids)[:, -1], atol=1e-5)


def test_dynamic_activations_are_refused_before_training_or_left_out_aloud(tmp_path):
    with pytest.raises(FormatError, match=r"vit.layers.0.*each token a step of its own.*w4a8-static"):
        calibrated(vit(), "w4a8", "onnx:int4")
    model = pack(calibrated(vit(), "w4a8", "onnx:int4-weights"))
    save(model, tmp_path / "out")
    keep.export(tmp_path / "out", "onnx:int4-weights", model)
    last = verify(tmp_path / "out")[-1]
    assert last.passed and "leaves 6 quantizers out" in last.claim and last.tolerance.startswith("0.0001")


def test_what_no_graph_can_be_made_of():
    with pytest.raises(QuantError, match="no quantized layer"):
        graph(vit(), 21)
    with pytest.raises(FormatError, match="does not say what its inputs are"):
        graph(quantize(nn.Sequential(nn.Linear(8, 8)), "w4"), 21)
    with pytest.raises(QuantError, match="never calibrated"):
        graph(quantize(resnet(), "w4a8-static"), 21)
    with pytest.raises(FormatError, match="torch.onnx cannot trace Branching"):
        graph(quantize(Branching(), [Rule("*", weight=weight(4))]), 21, {"x": torch.zeros(2, 8)})


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_a_missing_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(FormatError, match=r"onnxscript.*qatlas\[onnx\]"):
        graph(nn.Sequential(), 21)
