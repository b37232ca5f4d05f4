#!/usr/bin/env bash
# docs/results.md#bitnet: b1.58 and b1 from scratch against full precision on the zoo's text, with and without SubLN, two stages against one cosine,
# three seeds, the learning rate of each row chosen among two at the first. No data needed. Some seventy minutes of one core; each run is kept as a
# small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/bitnet_zoo.py --out docs/evidence/bitnet --page docs/results.md
python runs/bitnet_zoo.py --out docs/evidence/bitnet --control 100
