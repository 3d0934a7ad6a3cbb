#!/usr/bin/env bash
# The learning figures of the README: three seeds trained for 400 s on two cores each, then compared
# with every hand-written policy on 300 unseen episodes, paired.
#   benchmarks/learning.sh [SCENARIO]       h200-24 unless given; about 25 minutes
set -eu
scenario=${1:-h200-24}
runs=()
for seed in 0 1 2; do
  [ -e "runs/$scenario-s$seed" ] ||
    mmrl train "$scenario" --seed "$seed" --time 400s --steps 30M --set eval_every=600000 --name "$scenario-s$seed"
  runs+=("runs/$scenario-s$seed")
done
rules="slack,setup-index@tuned,gdsf@tuned,lru@tuned,idle-cost@tuned,drain-first@tuned,static@tuned,full-swap"
mmrl evaluate --policies "$(IFS=,; echo "${runs[*]}"),$rules" --scenarios "$scenario" \
  --episodes 300 --out "runs/figures-$scenario"
