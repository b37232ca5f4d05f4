"""Every kernel compiles for chips that are not here (compute capability 8.0 and 9.0), and what must not be fused is not. In a process of its own:
Triton decides at its import whether it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_all_compile_for_other_chips(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    told = subprocess.run([sys.executable, str(Path(__file__).with_name("ahead.py")), "80", "90"], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    lines = told.stdout.splitlines()
    assert len(lines) >= 20 and {line.split()[1] for line in lines} == {"80", "90"}
    for line in lines:
        kernel, _, fused, divided = line.split()
        assert kernel in ("gemv", "gemm", "gemm_fp8", "rotate") or fused == "0", line
        assert kernel not in ("fake_forward", "fake_backward", "rotate_quantize") or int(divided) > 0, line
