#!/usr/bin/env bash
# docs/results.md#lsq: LSQ against round-to-nearest on stories260K at 8, 4, 3 and 2 bits, three seeds where it is taught, exported and read back by llama.cpp.
# Needs QATLAS_DATA (ckpt/stories260k, text/tinystories_5stories.txt). About a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/lsq_stories260k.py "$@"
