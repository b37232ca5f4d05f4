"""What the runs of several papers on ResNet-20 and CIFAR-10 share: the model, the data, how it is judged, and the ends that stay full.

The model is the trained checkpoint of cifar_resnet.py, batch norms in place. First convolution and classifier stay in full precision. 25,000 images
train (mirrored and moved); 750 of the other 25,000 choose what has to be chosen; the first 1,500 test images judge.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from cifar_resnet import NORMED, cifar_resnet
from cifar_vit import cifar_task
from torch import nn

from qatlas.model.rules import keep_full
from qatlas.train.evaluate import evaluate
from qatlas.train.labelled import Images
from qatlas.train.run import Run

ENDS = ("conv1", "linear")
TEST, CHOICE = 1500, 750


class Cifar:
    """The images, read once."""

    def __init__(self, batch: int = 32) -> None:
        torch.set_num_threads(1)
        self.training = cifar_task(batch=batch, extra_rules=keep_full(*ENDS), **NORMED)
        self.test, self.choice = cifar_task(batch=250, **NORMED), cifar_task(batch=250, held_out=self._other(), **NORMED)
        self.test.held_rows, self.choice.held_rows = TEST, CHOICE

    @staticmethod
    def _other() -> str:
        return str(Path(os.environ["QATLAS_DATA"]) / "cifar10" / "train1.parquet")

    def task(self, seed: int, tactics: tuple[Any, ...] = ()) -> Images:
        """The training task under a seed."""
        self.training.run = Run(None, seed=seed, progress=False)
        self.training.run.tactics = tactics
        return self.training

    @staticmethod
    def model() -> nn.Module:
        """The checkpoint."""
        return cifar_resnet()

    def accuracy(self, model: nn.Module) -> float:
        """Per cent of the test images."""
        return 100 * evaluate(model, self.test)["accuracy"]

    def chosen(self, model: nn.Module) -> float:
        """Per cent of the images that choose."""
        return 100 * evaluate(model, self.choice)["accuracy"]
