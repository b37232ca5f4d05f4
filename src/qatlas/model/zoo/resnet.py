"""A residual net for 32 x 32 images, small enough to train on a CPU.

Kaiming He et al., Deep Residual Learning for Image Recognition, 2015, arXiv 1512.03385; the class is transformers' own, and so is its stem: a 7 x 7
convolution and a max-pool, each of stride 2, so that the first stage sees 8 x 8. The CIFAR nets of the paper keep 32 x 32 there and are more
accurate; they would need code of our own. Each convolution is
followed by a batch norm that can be folded into it.
"""

import torch
from transformers import ResNetConfig, ResNetForImageClassification


def resnet(classes: int = 10, seed: int = 0) -> ResNetForImageClassification:
    """Random weights from `seed`; the global random state stays as it was. In eval mode, as from_pretrained leaves a model.

    Maps pixel_values (batch, 3, 32, 32) to logits (batch, classes); other sizes pass too, and are pooled to one place at the end.

    >>> tuple(resnet(classes=7)(torch.zeros(2, 3, 32, 32)).logits.shape)
    (2, 7)
    """
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 1, 1], layer_type="basic", num_labels=classes)  # type: ignore[call-arg]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ResNetForImageClassification(config).eval()
