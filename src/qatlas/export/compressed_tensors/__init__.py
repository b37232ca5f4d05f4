"""compressed-tensors: the directory of llm-compressor, which vLLM, SGLang and transformers read. Any transformers model whose layers are nn.Linear.

    kinds.py        the targets: what each says of weights and inputs, and its JSON
    fitting.py      which Quants and QTensors a kind holds exactly
    layout.py       codes, steps and zeros as tensors
    directory.py    write, plan
    readers.py      what the compressed-tensors package and transformers make of it
    qtensors.py     anyone's directory as QTensors

Targets: w2a16, w3a16, w4a16, w8a16 (weights alone, packed), w8a8 and w4a8 (one byte a weight, inputs 8 bits a token, steps found at run time),
fp8a16 and fp8_dynamic (E4M3), mxfp4a16, nvfp4a16, and mixed, where each layer is of the smallest kind that holds its numbers. Layers of different
numbers are groups of config.json with their names as targets; layers in full precision stand in `ignore`. vLLM fuses q, k, v and gate, up, and
wants one scheme for all that it fuses: give those one Quant.

The weights that the package's own decompression gives are `QTensor.dequantize()`, bit for bit in fp32: integers times the stored step, which it
multiplies in the type of the step, so `read` hands it the step in fp32, as transformers does for a model in fp32. The FP4 kinds it answers in bf16,
where every product of theirs is exact. Inputs are quantized as it does it (127.5 steps to the largest), so transformers gives the trained logits
bit for bit, inputs quantized. vLLM computes in bf16 or fp16: bf16 steps, which `fit` gives to weights-only kinds, it reads without loss in both.
"""

from .directory import plan, write
from .fitting import TARGETS, fit, fit_input, why_not
from .qtensors import holds, inputs, qtensors
from .readers import lacks, model, read

SUFFIX = ""                                                       # the artefact is a directory

__all__ = ["SUFFIX", "TARGETS", "fit", "fit_input", "holds", "inputs", "lacks", "model", "plan", "qtensors", "read", "why_not", "write"]
