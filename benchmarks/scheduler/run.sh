#!/bin/sh
# All scheduler results, in well over an hour on 2 idle cores: sh benchmarks/scheduler/run.sh [FOLDER]
# `tokenflow` and `python` are those of .venv/bin. The trace is a public one, named in
# benchmarks/results/README.md.
set -eu
out=${1:-benchmarks/results}
trace=${TRACE:-../shared/data/traces/burstgpt2_gpt4_894s.csv}
here=$(dirname "$0")
run() {
    name=$1
    shift
    tokenflow simulate --jobs 2 --seed-base 101 "$@" --json "$out/scheduler-$name.json"
}

run settings --setting all --seeds 5 --plots "$out/plots"
few=rtx4090-a,rtx4090-b,rtx4090-c,rtx4090-d,h200-a,h200-b
for rates in 25 30 15@0.4,20@0.6; do
    run "rates-$rates" --seeds 3 --setting $few --policy fcfs,andes,tokenflow,slack --rates $rates
done
for seconds in 0.25 0.5 1 1.5; do
    run "interval-$seconds" --setting rtx4090-b --seeds 2 --policy tokenflow \
        --param tokenflow.interval_s=$seconds
done
for mu in 1 2 5 10 20; do
    run "conservativeness-$mu" --setting rtx4090-b --seeds 2 --policy tokenflow \
        --param tokenflow.conservativeness=$mu
done
run ablation-none --setting rtx4090-b --seeds 2 --policy tokenflow,slack
for part in offload write_through overlap_transfers; do
    run "ablation-$part" --setting rtx4090-b --seeds 2 --policy tokenflow,slack \
        --engine $part=false
done
run limits-4 --setting rtx4090-a,rtx4090-c --seeds 2 --policy fcfs,tokenflow,slack \
    --limit-factor 4
for scale in 1 0.2 0.05; do
    run "burstgpt-$scale" --trace "$trace" --memory-fraction 0.55 --time-scale $scale
done
python "$here/bounds.py" --json "$out/scheduler-bounds.json"
python "$here/sensitivity.py" --json "$out/scheduler-sensitivity.json"
python "$here/pass_cost.py" --json "$out/scheduler-pass-cost.json" --plot docs/images/pass-cost.svg
