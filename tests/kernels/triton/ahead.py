"""Compile a kernel for a chip that is not here: what Triton and ptxas say of it, without running it. Run as a program by test_ahead.py, since Triton
decides at its import whether it compiles or interprets.

    python ahead.py 80 90        each line: kernel, chip, fused multiply-adds of fp32, divisions rounded to nearest, in its PTX
"""

from __future__ import annotations

import sys
from typing import Any

import torch

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16",
         torch.int32: "i32", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv"}


class Recorder:
    """Stands in for `launch`: remembers what would run."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = []

    def __call__(self, kernel: Any, grid: Any, *arguments: Any, warps: int = 4, stages: int = 2, fuse: bool = True, **constants: Any) -> None:
        self.calls.append((kernel, arguments, constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse}))


def build(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any], chip: int) -> Any:
    """The compiled kernel for compute capability chip / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, attrs = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], attrs[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif value is None or (value == 1 and isinstance(value, int)):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]]:
    """What would be launched for one of each kind of product and pass."""
    from qatlas.core.codebook import NF4
    from qatlas.core.estimator import Clip, Trust
    from qatlas.core.floats import Float
    from qatlas.core.grain import Group, PerChannel, PerToken
    from qatlas.core.grid import HalfStep, Ternary, Uniform
    from qatlas.core.quantizer import Quant
    from qatlas.core.scale import AbsMax, Learned, MinMax, Rms
    from qatlas.kernels.triton import fake, gemm, gemm8, gemv, rotate
    from qatlas.kernels.triton.matrix import Matrix
    from qatlas.kernels.triton.plan import Plan

    recorder = Recorder()
    for module in (fake, gemm, gemm8, gemv, rotate):
        module.launch = recorder
    fake.why_not_here = rotate.need = lambda device: ""
    x, tokens = torch.zeros(16, 1024, dtype=torch.bfloat16), torch.zeros(16)
    for grid, grain, scale in ((Uniform(4), Group(128), AbsMax(dtype="float16")), (Ternary(), PerChannel(), AbsMax()),
                               (Uniform(3, False), Group(32), MinMax()), (NF4, Group(64), AbsMax())):
        w = Matrix.of(Quant(grid, grain, scale).quantize(torch.randn(64, 1024)))
        gemv.run(x[0], w.floats, None, Plan())
        gemm.run(x, w.floats, None, Plan(bn=64))
        if grid != NF4:
            sums = torch.zeros(64)
            gemm8.run(x.to(torch.int8), tokens, tokens, w.integers, sums, sums, Plan(bn=64, bk=gemm8.widest(w.integers)))
    w = Matrix.of(Quant(Float(4, 3)).quantize(torch.randn(64, 1024)))
    gemm8.run_fp8(x.to(torch.float8_e4m3fn), tokens, w.floats, None, Plan(bn=64))
    for quant in (Quant(Uniform(4), Group(32), Learned(MinMax()), Clip(0.5), clip=3.0), Quant(Ternary(), PerChannel(), Learned(), Clip())):
        view = quant.grain.view(torch.randn(8, 1024))
        formula, place = fake.Fused(quant), quant.measure(view)
        formula.values(view, place, None)
        formula.pull(view, view, place, None, 1.0)
    four = Quant(HalfStep(4), PerToken(), Rms(0.335), Trust(0.5))
    for given in (x, x.float()):
        rotate.quantize(given, four, 128)
        rotate.turn(given, 128)
    return recorder.calls


def main(chips: list[int]) -> None:
    for kernel, arguments, constants, options in calls():
        for chip in chips:
            if kernel.__name__ != "gemm_fp8" or chip >= 89:
                text = build(kernel, arguments, constants, options, chip).asm["ptx"]
                print(kernel.__name__, chip, text.count("fma.rn.f32"), text.count("div.rn.f32"), flush=True)


if __name__ == "__main__":
    main([int(chip) for chip in sys.argv[1:]])
