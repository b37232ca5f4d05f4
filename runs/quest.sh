#!/usr/bin/env bash
# docs/results.md#quest: QuEST against LSQ and largest-value steps, weights and inputs at 4 to 1 bits; three seeds; on stories260K and from scratch
# (both need QATLAS_DATA). Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/quest.py --model stories --page docs/results.md
python runs/quest.py --model scratch --page docs/results.md
