"""Small models on which everything can be tried without a network.

Three families, because each breaks a quantizer in its own way: a decoder (outliers in few channels, a tied head, keys and values to cache), an
encoder of images (attention in both directions, layer norms, GELU), a convolutional net (batch norms to fold, ReLU). The classes are transformers'
own, so that what works here works on the large ones; only the configurations are ours.

`gpt` was trained and its weights are in the package, because nothing can be learned about two bits from weights that never knew anything.
`vit` and `resnet` come with random weights: a few minutes on CIFAR-10 or MNIST teach them enough.

    gpt()        LlamaForCausalLM, 3.4 M parameters, Python's documentation, with its tokenizer; text("train"), text("heldout")
    vit()        ViTForImageClassification, 1.0 M parameters, 32 x 32 images
    resnet()     ResNetForImageClassification, 0.3 M parameters, 32 x 32 images
"""

from .gpt import gpt, text
from .resnet import resnet
from .vit import vit

__all__ = ["gpt", "resnet", "text", "vit"]
