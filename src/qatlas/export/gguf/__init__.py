"""GGUF: the file of llama.cpp, and of all that is built on it. Targets f32, f16, q8_0, q4_0, tq2_0 for Llama models.

    layout.py              bytes of a block
    fitting.py             which Quants and QTensors a block holds exactly
    llama.py               names, keys, the order of q and k rows
    vocab.py               the tokenizer in the header
    file.py                write, read
    llamacpp.py            ask llama.cpp itself
    readers.py             what others read in a file

The weights that a reader gives back are `QTensor.dequantize()`, bit for bit. What llama.cpp then computes with them is close but not equal: it also
quantizes the activations, to 8 bits in groups of 32 (Q4_0, Q8_0) or 256 (TQ2_0); GGUF cannot say otherwise. docs/ and the tests state how close.
"""

from .file import plan, read, write
from .fitting import TARGETS, fit, why_not
from .readers import engine, logits

SUFFIX = "gguf"

__all__ = ["SUFFIX", "TARGETS", "engine", "fit", "logits", "plan", "read", "why_not", "write"]
