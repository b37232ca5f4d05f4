#!/usr/bin/env bash
# docs/results.md#oscillations: oscillations induced, damped and frozen in a pretrained ResNet-20 at 3 bits, three seeds. Needs QATLAS_DATA (cifar10,
# ckpt/cifar10_resnet20.safetensors). About ten minutes on one core. Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/oscillations.py --page docs/results.md "$@"
