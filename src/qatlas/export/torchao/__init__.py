"""torchao: integers of 1 to 8 bits as IntxUnpackedToInt8Tensor in a transformers directory. Any transformers model whose layers are nn.Linear.

    fitting.py      the targets; which Quants and QTensors they hold exactly
    layout.py       a layer as qdata, scale and zero_point, and back; checked before it is believed
    directory.py    write, plan; what config.json and the header of model.safetensors say
    readers.py      what torchao and transformers make of it

Targets: w1a16 ... w8a16 (IntxWeightOnlyConfig), w1a8 ... w8a8 (Int8DynamicActivationIntxWeightConfig: inputs are 8 bits a token, with a zero point,
found at run time) and mixed, where each layer is of the smallest kind that holds its numbers (FqnToConfig). A weight takes a byte on disk whatever
its bits: it is the form for torch.export and ExecuTorch, and what torchao's packed kernels are made from.

Only safetensors are written and read, in the form of torchao.prototype.safetensors: three tensors a weight, and its attributes as JSON in the
header. torchao's older way, `torch.save` into pytorch_model.bin, is pickle; such a directory is refused.

torchao computes (q - z) s in the type that a tensor declares, and integers to 255 are exact in all of them, so in fp32 this is s (q - z), bit for
bit. transformers does not move that type when it loads: it stands in the file, and config.json says the same one. It is fp32 here. For bf16 load
the directory as it is and call `.to(torch.bfloat16)`, which moves both; asking `from_pretrained` for another dtype gives a model whose layers
disagree. `fit` makes steps bf16, so that this loses no step. An input's place is found by torchao as round(x (1 / s)) + z, by us as
round(x / s + z): ties fall either way, and logits come close and not equal (`near`); weights alone give equal logits.
"""

from .directory import plan, write
from .fitting import TARGETS, fit, fit_input, why_not
from .readers import holds, lacks, model, near, qtensors, read, types

SUFFIX = ""                                                       # the artefact is a directory

__all__ = ["SUFFIX", "TARGETS", "fit", "fit_input", "holds", "lacks", "model", "near", "plan", "qtensors", "read", "types", "why_not", "write"]
