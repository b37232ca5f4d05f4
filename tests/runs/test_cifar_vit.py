"""The CIFAR ViT of transformers' parts computes what torch's own encoder computes."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import script
from torch import nn

from qatlas.model.roles import Role, roles
from qatlas.model.signals import attentions
from qatlas.model.taps import read

DATA = Path(os.environ.get("QATLAS_DATA", "none"))
pytestmark = pytest.mark.skipif(not (DATA / "ckpt" / "cifar10_vit_d128_l6.safetensors").is_file(), reason="QATLAS_DATA has no CIFAR ViT")


@pytest.fixture(scope="module")
def runs():
    return script("cifar_vit")


@pytest.fixture(scope="module")
def model(runs):
    return runs.cifar_vit()


@torch.no_grad()
def theirs(x):
    """The checkpoint as its authors run it."""
    kept = load_file(DATA / "ckpt" / "cifar10_vit_d128_l6.safetensors")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 8, 256, batch_first=True), 6, enable_nested_tensor=False).eval()
    encoder.load_state_dict({name.removeprefix("transformer."): t for name, t in kept.items() if name.startswith("transformer.")})
    patches = nn.functional.conv2d(x, kept["patch_embed.proj.weight"], kept["patch_embed.proj.bias"], 4).flatten(2).transpose(1, 2)
    tokens = torch.cat([kept["cls_token"].expand(len(x), -1, -1), patches], 1) + kept["pos_embed"]
    first = nn.functional.layer_norm(encoder(tokens)[:, 0], (128,), kept["mlp_head.0.weight"], kept["mlp_head.0.bias"])
    return nn.functional.linear(first, kept["mlp_head.1.weight"], kept["mlp_head.1.bias"])


@torch.no_grad()
def test_it_is_the_same_computation(model):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x).logits, theirs(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_its_signals_have_addresses(model):
    found = attentions(model)
    assert len(found) == 6 and all(one.parts is not None and one.out.endswith("attention.output.dense") for one in found.values())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = model(x).logits
    with read(model, ["*:probabilities", "*:projected"]) as signals:
        torch.testing.assert_close(model(x).logits, plain, rtol=1e-4, atol=1e-4)
    maps = [s for address, s in signals.items() if address.endswith(":probabilities")]
    assert len(signals) == 12 and {tuple(m.shape) for m in maps} == {(2, 8, 65, 65)}
    assert all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps)


def test_it_answers_to_roles(model):
    told = roles(model)
    assert [name for name, role in told.items() if Role.EMBEDDING in role] == ["body.embeddings.patch"]
    assert [name for name, role in told.items() if Role.CLASSIFIER in role] == ["classifier"]


@torch.no_grad()
def test_it_knows_the_test_images(runs, model, tmp_path):
    """The first 512 of them; the whole 10,000 give 71.72 %."""
    import pyarrow.parquet as pq

    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(DATA / "cifar10" / "test.parquet").slice(0, 512), few)
    task = runs.cifar_task(batch=128, train="test", held_out=str(few))
    assert task.score(model)["accuracy"] == pytest.approx(0.7172, abs=0.04)
