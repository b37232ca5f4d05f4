"""The part of the build that pyproject.toml cannot say: the CPU kernels, in C++ (src/qatlas/kernels/native). All else stands in pyproject.toml.

    pip install .                              builds them where a compiler is, and installs without them where none is
    python setup.py build_ext --inplace        builds them in a source tree
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path("src/qatlas/kernels/native")
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]     # no -march: each variant says what it needs

setup(ext_modules=[Extension(
    "qatlas.kernels.native._native", sorted(str(path) for path in HERE.glob("*.cpp")), depends=sorted(str(path) for path in HERE.glob("*.h")),
    language="c++", optional=True, extra_compile_args=["/O2", "/std:c++17"] if sys.platform == "win32" else FLAGS,
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"])])
