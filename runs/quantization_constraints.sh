#!/usr/bin/env bash
# docs/results.md#quantization-constraints: PD-QAT against straight-through training in a pretrained ResNet-20, W2A4, and bits by its duals, three seeds.
# Needs QATLAS_DATA (cifar10, ckpt/cifar10_resnet20.safetensors). About twelve minutes on one core. A run that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/quantization_constraints.py --page docs/results.md "$@"
