#!/usr/bin/env bash
# docs/results.md#pb_llm: partial binarization of stories260K at 10, 20 and 50 % salient weights, against all signs; by size and by the Hessian; rounded,
# compensated, trained; three seeds. Needs QATLAS_DATA (ckpt/stories260k, text/tinystories_5stories.txt). A run that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/pb_llm.py --page docs/results.md
