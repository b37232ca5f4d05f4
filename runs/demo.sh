#!/usr/bin/env bash
# docs/results.md#demo: the demo at three seeds, and the boring control: the full-precision model trained for as many steps on the same text.
# A quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
for seed in 0 1 2; do
  [ -e "out/demo-s$seed/report.html" ] || qatlas demo --out "out/demo-s$seed" --seed "$seed"
done
python runs/demo_control.py
