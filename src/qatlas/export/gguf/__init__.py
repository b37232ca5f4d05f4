"""GGUF: the file of llama.cpp, and of all that is built on it, for Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3 (text) and BERT.

Targets f32, f16, bf16; q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl; tq1_0, tq2_0; q2_k, q3_k, q4_k, q5_k, q6_k; mxfp4.

    layout.py              blocks as QTensors, and their bytes
    order.py               which byte holds which code
    hold.py                a trained QTensor in a block's own form, without moving a value
    fitting.py             which Quants a block holds exactly
    architecture.py        the architectures: names, keys, what each refuses
    llama.py               the first of them: and the order of q and k rows
    bert.py                the one that is an encoder
    vocab.py               the tokenizer in the header
    file.py                write, read
    header.py              a header looked over before it is believed
    llamacpp.py            ask llama.cpp itself
    readers.py             what others read in a file
    qtensors.py            anyone's file as QTensors
    described.py           and the config of its model

The weights that a reader gives back are `QTensor.dequantize()`, bit for bit. What llama.cpp then computes with them is close but not equal: it also
quantizes the activations, to 8 bits in groups of 32 (Q4_0, Q8_0 ...) or 256 (TQ and K types); GGUF cannot say otherwise. docs/ and the tests state
how close.

Not written: IQ1 to IQ3 and IQ4_XS, whose codes no grid of single values gives. NVFP4: its steps are E4M3 numbers, which end at 2^-9, so weights of
usual size need the further scale of a tensor that llama.cpp keeps in a tensor beside it and that the gguf package does not multiply in. Q1_0: the
package has no decoder for it, so nothing could be proved.
"""

from .described import config
from .file import kept, plan, read, types, write
from .fitting import TARGETS, fit, why_not
from .qtensors import holds, qtensors, tokenizer
from .readers import engine, logits

SUFFIX = "gguf"

__all__ = ["SUFFIX", "TARGETS", "config", "engine", "fit", "holds", "kept", "logits", "plan", "qtensors", "read", "tokenizer", "types", "why_not",
           "write"]
