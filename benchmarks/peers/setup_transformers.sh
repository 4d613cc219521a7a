#!/bin/sh
# transformers with what its server needs, as a peer to measure beside:
# sh benchmarks/peers/setup_transformers.sh VENV
set -eu
venv=${1:?say where: sh benchmarks/peers/setup_transformers.sh VENV}
python3.11 -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet "transformers[serving]==5.23.0" accelerate
"$venv/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
