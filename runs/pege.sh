#!/usr/bin/env bash
# docs/results.md#pege: PEGE against the plain straight-through gradient on handwritten digits at 2 bits, and without each of its parts; five seeds
# (needs QATLAS_DATA). Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/pege.py --page docs/results.md
