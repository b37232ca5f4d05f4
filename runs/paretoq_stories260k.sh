#!/usr/bin/env bash
# docs/results.md#paretoq: ParetoQ against LSQ and round-to-nearest on stories260K at 4, 3, 2, 1.58 and 1 bits, three seeds, and its grids against each other.
# Needs QATLAS_DATA (ckpt/stories260k, text/tinystories_5stories.txt). 56 trainings of 150 steps.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/paretoq_stories260k.py "$@"
