#!/usr/bin/env bash
# docs/results.md#bitnet: b1.58 and b1 from scratch against full precision on the zoo's text, with and without SubLN, two stages against one cosine,
# each at two learning rates and three seeds. No data needed. Some five hours on one core; a run that was broken off goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/bitnet_zoo.py "$@"
