"""ResNet-20 as it was trained on CIFAR-10, its batch norms to be folded.

The checkpoint (akamaster/pytorch_resnet_cifar10, 269,722 parameters) has the paper's form for CIFAR: a convolution, three stages of three blocks of
two convolutions, widths 16, 32, 64, a norm behind each convolution; where a stage halves the image, the shortcut takes every second pixel and fills
the new channels with zeros (option A).

    python runs/cifar_resnet.py                   # expected: 81.03 % on the 10,000 test images of QATLAS_DATA/cifar10

Those images were re-compressed as JPEG; on raw CIFAR-10 the checkpoint has 91.78 %. Compare runs with one another, not with published numbers.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_vit import cifar_task
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig
from transformers.modeling_outputs import ImageClassifierOutput

from qatlas.train.evaluate import evaluate

NORMED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, came: int, width: int) -> None:
        super().__init__()
        self.halves, self.more = came != width, (width - came) // 2
        self.conv1 = nn.Conv2d(came, width, 3, 2 if self.halves else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.halves:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class CifarResNet(PreTrainedModel):
    """pixel_values (batch, 3, 32, 32) -> logits (batch, 10)."""

    config_class = ResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        came = 16
        for stage, width in enumerate(WIDTHS, 1):
            blocks = [Block(came if at == 0 else width, width) for at in range(3)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            came = width
        self.linear = nn.Linear(64, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return ImageClassifierOutput(logits=self.linear(x.mean((2, 3))))


def cifar_resnet(path: str | Path | None = None) -> CifarResNet:
    """The trained model, in eval mode. path: the checkpoint, by default that of QATLAS_DATA."""
    config = ResNetConfig(num_labels=10)
    config.image_size = 32
    model = CifarResNet(config)
    model.load_state_dict(load_file(path or Path(os.environ["QATLAS_DATA"]) / "ckpt" / "cifar10_resnet20.safetensors"))
    return model.eval()


if __name__ == "__main__":
    with torch.no_grad():
        scores = evaluate(cifar_resnet(), cifar_task(batch=500, **NORMED))
    print(f"full precision: {100 * scores['accuracy']:.2f} % of 10,000 test images, loss {scores['loss']:.4f}")
