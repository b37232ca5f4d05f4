#!/usr/bin/env bash
# docs/atlas.md and docs/atlas.html: all papers on stories260K (needs QATLAS_DATA) and on the zoo's model, 4 to 1.58 bits, three seeds, equal steps.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/atlas.py --model stories --page docs/atlas.md
python runs/atlas.py --model zoo --steps 60 --page docs/atlas.md
