#!/usr/bin/env bash
# docs/results.md#exports-asked: stories260K (needs QATLAS_DATA: ckpt/stories260k, text/tinystories_5stories.txt) and the zoo's language model at 4, 3, 2
# and 1.58 bits, written to every target and asked there. Half an hour of one core. What is in docs/evidence/exports is not asked again.
# GPTQ_PYTHON, EXECUTORCH_PYTHON: the pythons of environments with gptqmodel and optimum, and with executorch; without them their rows say so.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/export_matrix.py --out docs/evidence/exports
if [ -n "${GPTQ_PYTHON:-}" ]; then "$GPTQ_PYTHON" runs/export_matrix.py --formats gptq awq --out docs/evidence/exports; fi
if [ -n "${EXECUTORCH_PYTHON:-}" ]; then "$EXECUTORCH_PYTHON" runs/export_matrix.py --formats executorch --out docs/evidence/exports; fi
python runs/export_matrix.py --models --out docs/evidence/exports --page docs/results.md
