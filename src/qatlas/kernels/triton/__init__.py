"""Kernels for GPUs, in Triton: packed weights that stay packed, integers on tensor cores, fused rotation and fake quantization.

    matrix.py    a packed weight made ready for the kernels (`Matrix.of`), and what they cannot take (`why_not`)
    linear.py operators.py     the face: linear, linear_int8, linear_fp8; torch's operators behind it
    gemv.py gemm.py gemm8.py tile.py     the kernels and how codes are unpacked
    rotate.py    QuEST's rotation, scale, rounding and mask in one kernel
    fake.py snap.py     fake quantization: one pass forward, one backward
    plan.py      how large tiles are: a table, or measured once (`tune`)
    lang.py      Triton itself, where it is there

Importing this folder needs no Triton: what is missing is said when a kernel is asked for. Everything is checked in Triton's interpreter on CPU
(TRITON_INTERPRET=1), and compiled for two chips without having them; what a compiler may do to a sum is not believed there either: `fake.check`
holds a device against the eager lines, as kernels/compiled.py does.
"""
