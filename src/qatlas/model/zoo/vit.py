"""A vision transformer for 32 x 32 images, small enough to train on a CPU.

Alexey Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, arXiv 2010.11929; the class is transformers' own.

Patches of 4 pixels give 64 tokens and the class token. Width 128, 6 layers, an inner width of 384: every linear has a multiple of 64 columns,
so group sizes 16, 32 and 64 divide all of them.
"""

import torch
from transformers import ViTConfig, ViTForImageClassification


def vit(classes: int = 10, image: int = 32, seed: int = 0) -> ViTForImageClassification:
    """Random weights from `seed`; the global random state stays as it was. In eval mode, as from_pretrained leaves a model.

    Maps pixel_values (batch, 3, image, image) to logits (batch, classes). Raises ValueError where patches of 4 do not tile the image.

    >>> tuple(vit(classes=7)(torch.zeros(2, 3, 32, 32)).logits.shape)
    (2, 7)
    """
    if image < 4 or image % 4:
        raise ValueError(f"an image of {image} x {image} pixels is not tiled by patches of 4; use a multiple of 4")
    config = ViTConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384, image_size=image, patch_size=4,
                       num_labels=classes)  # type: ignore[call-arg]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ViTForImageClassification(config).eval()
