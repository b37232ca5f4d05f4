"""GPTQ: the checkpoints of AutoGPTQ and GPTQModel, which vLLM, SGLang, ExLlama and transformers (with gptqmodel and optimum) read.

    layout.py       a layer as qweight, qzeros, scales, g_idx, and back; targets and what they hold
    directory.py    write, plan; config.json and quantize_config.json
    checkpoint.py   such a directory, ours or another's, as QTensors
    readers.py      what gptqmodel and transformers make of it

Targets: w2, w3, w4, w8 in checkpoint format "gptq" (v1), which all readers know, and w2_v2 ... w8_v2 in "gptq_v2", which GPTQModel knows and vLLM
reads. v1 stores the zero less one, so a zero at code 0 has no place there; it is refused, and v2 holds it. Symmetric and asymmetric layers, groups of
32, 64, 128 or one step a channel, as the Quant says (grouped.py). Conv1D of GPT-2 is a layer of this format too.

The weights that gptqmodel's own decode gives are `QTensor.dequantize()`, bit for bit in fp32; it multiplies in the type of the steps, so `read` hands
it the steps in fp32. Engines multiply in fp16, where s (u - z) is rounded once more: so do their kernels with every such file.
"""

from .checkpoint import holds, qtensors
from .directory import plan, write
from .layout import TARGETS, fit, fit_input, why_not
from .readers import lacks, model, read

SUFFIX = ""                                                       # the artefact is a directory

__all__ = ["SUFFIX", "TARGETS", "fit", "fit_input", "holds", "lacks", "model", "plan", "qtensors", "read", "why_not", "write"]
