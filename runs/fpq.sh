#!/usr/bin/env bash
# docs/results.md#fpq: FPQ against LSQ and its own halves in a pretrained ResNet-20, W2A4, three seeds. Needs QATLAS_DATA (cifar10,
# ckpt/cifar10_resnet20.safetensors). About ten minutes on one core. Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/fpq.py --page docs/results.md "$@"
