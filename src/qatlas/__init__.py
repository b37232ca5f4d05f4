"""qatlas: quantization-aware training; each published method one readable file, on anyone's model, exported bit for bit."""

from .model.hub import QatlasConfig  # importing it registers it, so that AutoModel...from_pretrained knows our models
from .train.callback import QatlasCallback

__all__ = ["QatlasCallback", "QatlasConfig"]
