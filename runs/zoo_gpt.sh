#!/usr/bin/env bash
# The weights in src/qatlas/model/zoo/gpt, made anew. Half an hour on two cores that compute in bf16 (AVX512-BF16, AMX);
# on others leave out --bf16 and allow an hour and a half.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/zoo_gpt.py --out src/qatlas/model/zoo/gpt --bf16 --look 20 "$@"
