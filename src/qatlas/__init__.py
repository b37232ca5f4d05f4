"""qatlas: quantization-aware training; each published method one readable file, on anyone's model, exported bit for bit."""

from .model import hub as _registration  # noqa: F401  so that AutoModel...from_pretrained knows packed models
