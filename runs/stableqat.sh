#!/usr/bin/env bash
# docs/results.md#stableqat: StableQAT against LSQ at 4, 3 and 2 bits over a range of learning rates; three seeds; on stories260K (needs QATLAS_DATA).
# Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/stableqat.py --page docs/results.md
