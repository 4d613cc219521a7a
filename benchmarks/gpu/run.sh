#!/bin/sh
# The GPU benchmarks and tests, unattended, in pieces of at most 9 minutes each:
#   sh benchmarks/gpu/run.sh PIECE [flags of the piece]
# PIECE: ceilings decode prefill transfers paper-a paper-b paper-c paper-d throughput calibrate
# simulate tests, or all of them in that order. Run paper-* again until every policy has a result.
# `--device cpu --tiny` after it tries a piece without a GPU. Results: gpu-*.json in $OUT, or in
# benchmarks/results. From the environment:
#   PYTHON             the interpreter that has torch and transformers (python3)
#   WHEELS             a folder of wheels to use beside what that interpreter has (pydantic,
#                      pydantic-core, annotated-types, typing-inspection, where it lacks them)
#   FLASH_ATTN_BINARY  a .tar.xz with flash-attn's extension module compiled for this machine, and
#   FLASH_ATTN_SOURCE  the same version's source archive; both or none
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/benchmarks/gpu
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
limit=540
piece=${1:?"which piece? See the head of $0"}
shift

extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
# The packages of this checkout under their import name, where they are not installed.
path=$root/typings-root
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$extra/site" "$WHEELS"/*.whl
  path=$path:$extra/site
fi
if [ -n "${FLASH_ATTN_BINARY:-}" ]; then
  mkdir -p "$extra/flash" "$extra/unpacked"
  tar -xf "$FLASH_ATTN_BINARY" -C "$extra/unpacked"
  tar -xf "${FLASH_ATTN_SOURCE:?"the source archive of the same flash-attn version"}" -C "$extra/unpacked"
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  cp "$(find "$extra/unpacked" -name '*.so' | head -n 1)" "$extra/flash/flash_attn_2_cuda$suffix"
  cp -r "$(find "$extra/unpacked" -type d -name flash_attn | head -n 1)" "$extra/flash/"
  path=$path:$extra/flash
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

one() {
  name=$1
  shift
  case $name in
    paper-*) set -- paper.py "${name#paper-}" "$@" ;;
    simulate) set -- calibrate.py --compare "$@" ;;
    ceilings | decode | prefill | transfers | throughput | calibrate) set -- "$name.py" "$@" ;;
    tests)
      cd "$root"
      timeout "$limit" "$python" -m pytest -m gpu -p no:cacheprovider tests/unit/executor
      return
      ;;
    *)
      echo "no such piece: $name; see the head of benchmarks/gpu/run.sh" >&2
      exit 2
      ;;
  esac
  script=$1
  shift
  timeout "$limit" "$python" "$here/$script" --out "$out" "$@"
}

if [ "$piece" != all ]; then
  one "$piece" "$@"
  exit
fi
failed=
for name in ceilings tests decode prefill transfers paper-a paper-b paper-c paper-d throughput \
  calibrate simulate; do
  echo "== $name"
  one "$name" "$@" || failed="$failed $name"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
