"""Compile a kernel for a chip that is not here: what Triton and ptxas say of it, without running it. Run as a program by test_ahead.py, since Triton
decides at its import whether it compiles or interprets.

    python ahead.py 80 90        each line: kernel, chip, registers, spilled bytes
"""

from __future__ import annotations

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
