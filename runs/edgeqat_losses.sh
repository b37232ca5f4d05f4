#!/usr/bin/env bash
# docs/results.md#edgeqat: EdgeQAT's losses one by one and together, both signs of the distribution loss, and tokens of two widths against 8, 6 and 4
# bits for all; three seeds on stories260K (needs QATLAS_DATA: ckpt/stories260k, text/tinystories_5stories.txt). Some twelve minutes of one core; each
# run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/edgeqat_losses.py --out docs/evidence/edgeqat --page docs/results.md
