"""BitNet checkpoints of transformers: -1, 0 and 1, four in a byte, one step for a matrix, inputs of 8 bits. Any model whose layers are nn.Linear.

    fitting.py      the targets; which Quants and QTensors they hold exactly
    layout.py       four rows in a byte, and back; checked before it is believed
    directory.py    write, plan; `quantization_config`
    readers.py      what transformers makes of it

Two classes of transformers' integrations.bitnet, two targets:

    bitlinear        BitLinear:      y = (x_q t^T) / (weight_scale input_scale)    weight_scale is the inverse of the step
    autobitlinear    AutoBitLinear:  y = (x_hat t^T) weight_scale                  weight_scale is the step; microsoft's own 2B4T is one

A weight is t / weight_scale or t weight_scale. One in six fp32 numbers is no inverse of an fp32 number, so `fit` trains steps for bitlinear as
1 / (1 / s) (core.scale: inverse), which is BitNet's own formula; both are then equal bit for bit. Both classes quantize every input to 8 bits a
token, max|x| to 127, whether a file says so or not: weights with inputs in full precision are refused. transformers multiplies by 127 / max|x| where
we divide by max|x| / 127, and BitLinear sums integers: logits come close and not equal (`near`).

Not written: AutoBitLinear's online mode. Its file holds latent weights, which each forward quantizes anew by their mean: no codes to store, and no
latent weight of ours to store instead (Q(Q(W)) has a smaller step than Q(W)). Not held: groups and channels; `use_rms_norm`, with which every
quantized layer gets a norm in front, so that SubLN, which stands before output and down projections alone, cannot be said. A model that has these
norms itself (BitNetForCausalLM: attn_sub_norm, ffn_sub_norm) is held as any other: they are its own parameters.
"""

from .directory import plan, write
from .fitting import TARGETS, fit, fit_input, why_not
from .readers import holds, model, near, qtensors, read, types

SUFFIX = ""                                                       # the artefact is a directory

__all__ = ["SUFFIX", "TARGETS", "fit", "fit_input", "holds", "model", "near", "plan", "qtensors", "read", "types", "why_not", "write"]
