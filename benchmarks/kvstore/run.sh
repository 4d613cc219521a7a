#!/bin/sh
# All results of the KV store, in about 20 minutes on 2 quiet cores: sh benchmarks/kvstore/run.sh [FOLDER]
# `python` is that of .venv/bin.
set -eu
out=${1:-benchmarks/results}
here=$(dirname "$0")
python "$here/copy_bandwidth.py" --json "$out/kvstore-copy-bandwidth.json"
python "$here/control_plane.py" --json "$out/kvstore-control-plane.json"
python "$here/write_through.py" --repeats 2 --json "$out/kvstore-write-through.json"
python "$here/chat.py" --json "$out/kvstore-chat.json"
python "$here/ablation.py" --repeats 2 --json "$out/kvstore-ablation.json"
