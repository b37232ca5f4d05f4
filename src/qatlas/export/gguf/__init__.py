"""GGUF: the file of llama.cpp, and of all that is built on it, for Llama models. Targets f32, f16, bf16; q8_0, q4_0, q4_1, q5_0, q5_1; tq1_0, tq2_0;
q2_k, q3_k, q4_k, q5_k, q6_k; mxfp4.

    layout.py              blocks as QTensors, and their bytes
    order.py               which byte holds which code
    hold.py                a trained QTensor in a block's own form, without moving a value
    fitting.py             which Quants a block holds exactly
    llama.py               names, keys, the order of q and k rows
    vocab.py               the tokenizer in the header
    file.py                write, read
    llamacpp.py            ask llama.cpp itself
    readers.py             what others read in a file
    qtensors.py            anyone's file as QTensors, and its config

The weights that a reader gives back are `QTensor.dequantize()`, bit for bit. What llama.cpp then computes with them is close but not equal: it also
quantizes the activations, to 8 bits in groups of 32 (Q4_0, Q8_0 ...) or 256 (TQ and K types); GGUF cannot say otherwise. docs/ and the tests state
how close.
"""

from .file import plan, read, types, write
from .fitting import TARGETS, fit, why_not
from .qtensors import config, holds, qtensors, tokenizer
from .readers import engine, logits

SUFFIX = "gguf"

__all__ = ["SUFFIX", "TARGETS", "config", "engine", "fit", "holds", "logits", "plan", "qtensors", "read", "tokenizer", "types", "why_not", "write"]
