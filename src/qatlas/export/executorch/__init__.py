"""ExecuTorch: the whole computation as one program (.pte) for phones and boards, its quantized products in XNNPACK. Targets int4, int8.

    fitting.py      which Quants and QTensors XNNPACK holds exactly
    lower.py        a traced computation with codes and q/dq nodes in it, compiled
    file.py         write, plan, read
    process.py      a program's constants, and ExecuTorch's runtime, in a process of their own
    runtime.py      how that process is asked

    int8            nn.Linear (GPT-2's Conv1D too) and nn.Conv2d of 8 bits, one step a channel
    int4            nn.Linear of 4 bits, one fp32 step a channel or one bf16 step for a group of 32, 64, ...; as int8 where 4 bits are too few

XNNPACK multiplies 8-bit inputs alone. Their place is found at run time: one for each token (8da4w, 8da8w), before a convolution one for each image.
So nothing is calibrated, and a bias stays fp32. Quantization with static steps (XNNPACK's qs8) is not written: there XNNPACK wants every product's
output quantized too, and rounds biases to 32-bit integers of the product's step, so that they would not come back as they were trained; `onnx:int8`
holds static steps. Refused as well: weights with inputs in full precision (XNNPACK has no such product), zeros and offsets of
weights, groups of 8 bits, embeddings, depthwise and grouped convolutions, quantized outputs and signals inside attention. A batch norm behind a
quantized convolution would be folded by the compiler after training: the writer finds that out and refuses; fold it before (`--fold`).

The order of XNNPACK's operations, found by products with the identity on x86: with low = min(x, 0), high = max(x, 0) over the token, in fp32,

    up = 255 / (high - low)
    z  = round(-128 - low up), or round(127 - high up) where that loses less; from -128 to 127
    q  = round(x up) + z, from -128 to 127
    y  = sum over inputs of (q - z) code, an integer; times 1 / up and the step of the weight (of groups: for each group, then added up), plus bias

These give the engine's q - z for all but one of 262144 normal numbers and for all of as many whole numbers, but not for 0.3 % of half-integers, where
z itself lies at a tie; and its y to the last bit or two. Ours (MinMax) is s = (high - low) / 255, z = -128 - round(low / s), q = round(x / s + z): it
differs from the engine in one of the normal numbers too, and in 1 % of the whole ones and halves, which often lie at a tie. So logits come close and
not equal: to 1e-6 of the largest where no tie is met. Weights are constants of the program and equal `QTensor.dequantize()` bit for bit.

The program takes one sentence of 2 to 512 tokens, with memory planned for the longest, or one image; it gives all logits. It has no cache. Compiling
takes about a minute for a layer of a Llama on a busy core, all of it the package's. executorch is an extra that the tests do not install, for its
requirements keep pip's resolver busy without an end; `pip install --no-deps executorch` with flatbuffers and torchao works.

A .pte is a flatbuffer and is never unpickled. Reader and runtime are asked in a process of their own, since the runtime may end on a spoilt file and
the serializer believes what lengths a file states: there memory and time are bounded.
"""

from . import runtime
from .file import answers, plan, read, types, unused, write
from .fitting import TARGETS, fit, fit_input, why_not
from .runtime import lacks

SUFFIX = "pte"
ENGINES = (runtime,)
TRACED = True                                                     # `write` takes the computation as model.program gives it

__all__ = ["ENGINES", "SUFFIX", "TARGETS", "TRACED", "answers", "fit", "fit_input", "lacks", "plan", "read", "types", "unused", "why_not", "write"]
