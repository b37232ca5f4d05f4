"""AWQ in the GEMM layout: the checkpoints of AutoAWQ, which vLLM, SGLang and transformers (with gptqmodel) read. 4 bits, with zeros.

    layout.py       a layer as qweight, qzeros, scales, and back; the target and what it holds
    directory.py    write, plan, and such a directory, ours or another's, as QTensors
    readers.py      what compressed-tensors, gptqmodel and transformers make of it

The target is w4: integers of 4 bits in groups of 32, 64, 128 or one step a channel, as the Quant says; a layer around zero has all zeros at 8
(grouped.py). AWQ's scaling of activations is folded into the weights that it writes, so a file holds nothing of it.

The weights are `QTensor.dequantize()`, bit for bit in fp32, in the decode of compressed-tensors' converter for these files, and in that of
gptqmodel's layer with its steps in fp32. Engines multiply in fp16, where s (u - z) is rounded once more: so do their kernels with every such file.
"""

from .directory import holds, plan, qtensors, write
from .layout import TARGETS, fit, fit_input, why_not
from .readers import lacks, model, read

SUFFIX = ""                                                       # the artefact is a directory

__all__ = ["SUFFIX", "TARGETS", "fit", "fit_input", "holds", "lacks", "model", "plan", "qtensors", "read", "why_not", "write"]
