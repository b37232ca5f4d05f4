#!/usr/bin/env bash
# docs/results.md#lowrank: LR-QAT and L4Q beside LoRA, PEQA, QAT-LoRA and LSQ on stories260K, three seeds. A run that is there is not repeated.
# Needs QATLAS_DATA (ckpt/stories260k, text/tinystories_5stories.txt, text/tinyshakespeare.txt). About twelve minutes of one core.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/lowrank.py "$@"
