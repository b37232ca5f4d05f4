"""`push_to_hub`, offline: what it would send is what `save_pretrained` writes, and comes back bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from qatlas import QatlasConfig
from qatlas.layers.packed import Packed
from qatlas.layers.quantized import Quantized
from qatlas.model.pack import pack


class Offline:
    """The Hub's API that keeps what it is sent, in a folder a repository."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as sent:
                (self.folder / repo_id / operation.path_in_repo).write_bytes(sent.read())
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def sent(tmp_path, monkeypatch):
    def absent(*_, **__):
        raise LocalEntryNotFoundError("no card there")

    monkeypatch.setattr(hub, "_hf_api", Offline(tmp_path / "hub"))
    monkeypatch.setattr(ModelCard, "load", absent)
    return tmp_path / "hub" / "me" / "small"


@pytest.mark.parametrize("kind", ["packed", "trainable"])
def test_what_is_pushed_comes_back(kind, sent, tiny, tmp_path):
    torch.manual_seed(0)
    tiny.models["llama"]().save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=QatlasConfig("w4-g32"))
    model = pack(model) if kind == "packed" else model
    assert "me/small" in str(model.push_to_hub("me/small"))
    assert {path.name for path in sent.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    again = AutoModelForCausalLM.from_pretrained(sent)
    assert any(isinstance(part, Packed if kind == "packed" else Quantized) for part in again.modules())
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(tiny.answer(again, "llama"), tiny.answer(model.eval(), "llama"))
