#!/usr/bin/env bash
# docs/results.md#efficientqat: Block-AP and E2E-QP, together and alone, against rounding and LSQ at equal cost; on stories260K (needs QATLAS_DATA:
# ckpt/stories260k, text/tinystories_5stories.txt; three seeds) and on the zoo's language model with groups of 64 and 128 (one seed). Each run is kept
# as a small file: one that is there is not repeated. And docs/performance.md: the memory of block-by-block training at 4, 8 and 16 blocks.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/efficientqat.py --model stories --page docs/results.md
python runs/efficientqat.py --model zoo --page docs/results.md
python benchmarks/block_ap.py --width 256 --steps 2 --batches 4 --json docs/evidence/efficientqat/memory.json --page docs/performance.md
