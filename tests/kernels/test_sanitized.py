"""The C++ core under the compiler's sanitizers: random shapes in buffers that end where their contents end, and several callers at once."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qatlas.kernels.library as library

HERE = Path(__file__).parent
SOURCE = library.HERE
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-O0", "-w", "-std=c++17", "-ffp-contract=off", "-pthread", "-fno-sanitize-recover=all", f"-I{SOURCE}"]      # -O0: seconds, not minutes
PARTS = ["native", "tokens", "pool", "prepare", "variant_scalar",
         *(["variant_avx2", "variant_vbmi"] if platform.machine() in ("x86_64", "AMD64") else ["variant_neon"])]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("sanitizer", "cases", "callers"), [("address,undefined", 120, 1), ("thread", 40, 3)])
def test_the_core_is_clean_under(sanitizer: str, cases: int, callers: int, tmp_path: Path) -> None:
    flags = [*FLAGS, f"-fsanitize={sanitizer}"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    tried = subprocess.run([str(COMPILER), *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if tried.returncode or subprocess.run([str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip(f"this compiler or kernel has no -fsanitize={sanitizer}")

    def compiled(source: Path) -> str:
        to = tmp_path / f"{source.stem}.o"
        done = subprocess.run([str(COMPILER), *flags, "-c", str(source), "-o", str(to)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(to)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*(SOURCE / f"{part}.cpp" for part in PARTS), HERE / "native_fuzz.cpp"]))
    done = subprocess.run([str(COMPILER), *flags, *objects, "-o", str(tmp_path / "fuzz")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([str(tmp_path / "fuzz"), "1", str(cases), str(callers)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout.startswith(f"ok {cases} scalar"), ran.stdout + ran.stderr[-3000:]
