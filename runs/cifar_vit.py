"""A small vision transformer that was really trained on CIFAR-10, built of transformers' own parts.

The checkpoint (smmk47/CIFAR10-Classification, 811,146 parameters: patches of 4, width 128, 6 layers, 8 heads, inner width 256) is a
torch.nn.TransformerEncoder, post-norm with ReLU. torch's own attention shows nothing of its inside. A BERT encoder with hidden_act="relu" and
layer_norm_eps=1e-5 computes the same; its attention goes through AttentionInterface, so its signals have addresses and can be quantized. The rows of
torch's in_proj are those of query, key and value, in this order.

    python runs/cifar_vit.py                      # expected: 71.72 % on the 10,000 test images of QATLAS_DATA/cifar10

Those images were re-compressed as JPEG; on raw CIFAR-10 the checkpoint's authors report 73.72 %. Compare runs with one another, not with published
numbers. The checkpoint was trained with dropout 0.1 (torch's default), which the configuration keeps.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.bert.modeling_bert import BertEncoder

from qatlas.train.evaluate import evaluate
from qatlas.train.labelled import Images
from qatlas.train.run import Run

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# names of the checkpoint -> names here
NAMES = {"transformer.layers.": "body.encoder.layer.", "self_attn.out_proj.": "attention.output.dense.", "norm1.": "attention.output.LayerNorm.",
         "linear1.": "intermediate.dense.", "linear2.": "output.dense.", "norm2.": "output.LayerNorm.", "patch_embed.proj.": "body.embeddings.patch.",
         "cls_token": "body.embeddings.cls_token", "pos_embed": "body.embeddings.pos_embed", "mlp_head.0.": "norm.", "mlp_head.1.": "classifier."}


class Patches(nn.Module):
    """pixel_values (batch, 3, 32, 32) -> (batch, 65, width): 64 patches behind the class token, positions added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)                               # (batch, 64, width)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed      # (batch, 65, width)


class Body(nn.Module):
    """Patches and encoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = Patches(config.hidden_size), BertEncoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.embeddings(pixel_values)).last_hidden_state


class CifarViT(BertPreTrainedModel):
    """pixel_values (batch, 3, 32, 32) -> logits (batch, 10). It answers to roles: @embedding is the patch convolution, @classifier the last layer."""

    config_class = BertConfig
    main_input_name = "pixel_values"
    base_model_prefix = "body"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.body = Body(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body.embeddings

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.norm(self.body(pixel_values)[:, 0])))


def cifar_vit(path: str | Path | None = None, **changes) -> CifarViT:
    """The trained model, in eval mode. path: the checkpoint, by default that of QATLAS_DATA. changes: to its configuration, for instance
    attn_implementation="eager", or hidden_dropout_prob=0.0."""
    torches = load_file(path or Path(os.environ["QATLAS_DATA"]) / "ckpt" / "cifar10_vit_d128_l6.safetensors")
    given = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 256, "hidden_act": "relu",
             "layer_norm_eps": 1e-5, "num_labels": 10, "vocab_size": 1} | changes
    model = CifarViT(BertConfig(**given))
    model.load_state_dict(mapped(torches))
    return model.eval()


def mapped(torches: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the checkpoint under the names of CifarViT."""
    found = {}
    for name, tensor in torches.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        before, fused, kind = name.partition("self_attn.in_proj_")
        if fused:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            found |= {f"{before}attention.self.{part}.{kind}": rows.clone() for part, rows in parts}
        else:
            found[name] = tensor
    return found


def cifar_task(batch: int = 64, run: Run | None = None, train: str = "train0", **given) -> Images:
    """CIFAR-10 as it lies in QATLAS_DATA: 25,000 training images (train="train0" or "train1"), mirrored and moved by up to 4 pixels; the 10,000 test
    images held out; normalised as for the checkpoint. given: other arguments of Images (held_out, mirror, shift, target, extra_rules)."""
    folder = Path(os.environ["QATLAS_DATA"]) / "cifar10"
    usual = {"held_out": str(folder / "test.parquet"), "mean": MEAN, "std": STD, "mirror": True, "shift": 4}
    return Images(str(folder / f"{train}.parquet"), batch=batch, run=run, **(usual | given))


if __name__ == "__main__":
    scores = evaluate(cifar_vit(), cifar_task(batch=500))
    print(f"full precision: {100 * scores['accuracy']:.2f} % of 10,000 test images, loss {scores['loss']:.4f}")
