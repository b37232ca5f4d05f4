#!/usr/bin/env bash
# docs/results.md#cage: CAGE against the same without on stories260K at 3 and 2 bits, three paired seeds. Needs QATLAS_DATA (ckpt/stories260k,
# text/tinystories_5stories.txt). About twelve minutes on one core. Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/cage.py --page docs/results.md "$@"
