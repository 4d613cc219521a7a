#!/bin/sh
# aiperf, the load generator that ours is checked against: sh benchmarks/peers/setup_aiperf.sh VENV
set -eu
venv=${1:?say where: sh benchmarks/peers/setup_aiperf.sh VENV}
python3.11 -m venv "$venv"
"$venv/bin/pip" install --quiet aiperf==0.13.0
"$venv/bin/aiperf" --version
