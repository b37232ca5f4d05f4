#!/usr/bin/env bash
# docs/results.md#paretoq: ParetoQ against LSQ and round-to-nearest at 4, 3, 2, 1.58 and 1 bits, its grids against each other, and a checkpoint against
# a random start; three seeds; on stories260K (needs QATLAS_DATA: ckpt/stories260k, text/tinystories_5stories.txt) and on the zoo's language model.
# Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/paretoq_bits.py --model stories --out docs/evidence/paretoq --page docs/results.md
python runs/paretoq_bits.py --model zoo --steps 60 --batch 4 --out docs/evidence/paretoq --page docs/results.md
