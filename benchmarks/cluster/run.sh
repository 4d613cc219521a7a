#!/bin/sh
# All cluster results, on an otherwise idle machine: sh benchmarks/cluster/run.sh [FOLDER]
# `tokenflow` and `python` are those of .venv/bin. The trace is a public one, named in
# benchmarks/results/README.md.
set -eu
out=${1:-benchmarks/results}
trace=${TRACE:-../shared/data/traces/azure_conv_peak_output_20min.csv}
here=$(dirname "$0")
run() {
    name=$1
    shift
    tokenflow simulate-cluster "$@" --json "$out/cluster-$name.json"
}

for setting in flat steps; do
    python "$here/cost.py" --settings $setting --repeats 3 --json "$out/cluster-cost-$setting.json"
done
python "$here/router_cost.py" --json "$out/cluster-router-cost.json"
python "$here/burst.py" --share 0.25 --json "$out/cluster-burst.json"
python "$here/overload.py" --share 0.4 --json "$out/cluster-overload.json"
python "$here/tenants.py" --share 1 --flood-share 0.2 --json "$out/cluster-tenants.json"
python -m benchmarks.cluster.kill --json "$out/cluster-kill.json"
run sim-burst --replicas 8,32 --seeds 5 --plot docs/images/burst-routers.svg
run sim-burst-reduced --replicas 8,32,100,320,1000 --seeds 5 --model reduced
for ingresses in 4 16; do
    run sim-burst-reduced-$ingresses --replicas 8,100 --seeds 5 --model reduced \
        --ingresses $ingresses --router burst,power-of-two,least-requests
done
run sim-trace --replicas 8,32 --trace "$trace" --requests 300 --time-scale 0.1
run sim-trace-reduced --replicas 8,32,100,1000 --trace "$trace" --requests 300 --time-scale 0.1 \
    --model reduced
# A million streams on a thousand replicas.
run sim-million --replicas 1000 --trace "$trace" --requests 1000 --time-scale 0.33 \
    --model reduced --router burst,power-of-two,random
