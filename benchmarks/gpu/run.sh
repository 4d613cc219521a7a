#!/bin/sh
# The GPU benchmarks and tests, unattended, within $LIMIT seconds (540) in all:
#   sh benchmarks/gpu/run.sh PIECE [PIECE ...] [flags of the pieces]
# PIECE: tests ceilings decode prefill transfers throughput calibrate paper-a paper-b paper-c paper-d
# simulate. One that fails or takes too long costs the others nothing. Run paper-* again until every
# policy has a result. `--device cpu --tiny` after them tries pieces without a GPU. Results: gpu-*.json
# in $OUT, or in benchmarks/results. From the environment:
#   LIMIT              seconds of all pieces together (540)
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
deadline=$(($(date +%s) + ${LIMIT:-540}))

pieces=
for name in "$@"; do
  case $name in
    -*) break ;;
    tests | ceilings | decode | prefill | transfers | throughput | calibrate | simulate) ;;
    paper-[abcd]) ;;
    *)
      echo "no such piece: $name; see the head of benchmarks/gpu/run.sh" >&2
      exit 2
      ;;
  esac
  pieces="$pieces $name"
  shift
done
[ -n "$pieces" ] || { echo "which pieces? See the head of $0" >&2; exit 2; }

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
  # Not csrc/flash_attn. The egg-info beside it says which version this is, for those who ask.
  package=$(dirname "$(find "$extra/unpacked" -path '*/flash_attn/__init__.py' | head -n 1)")
  cp -r "$package" "$package.egg-info" "$extra/flash/"
  path=$path:$extra/flash
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$out"

# Seconds a piece may take while others wait; unless it could have its share of what is left anyway.
most() {
  case $1 in
    tests) echo 200 ;;
    decode) echo 160 ;;
    throughput) echo 130 ;;
    calibrate) echo 140 ;;
    *) echo 90 ;;
  esac
}

# one PIECE SECONDS [flags]
one() {
  name=$1 seconds=$2
  shift 2
  case $name in
    paper-*) set -- paper.py "${name#paper-}" "$@" ;;
    simulate) set -- calibrate.py --compare "$@" ;;
    tests)
      workers=
      "$python" -c 'import xdist' 2>/dev/null && workers="-n 4"
      # What else is in the folder, and the cluster's fixtures, need packages that may not be here.
      # shellcheck disable=SC2086
      (cd "$root" && timeout -k 10 "$seconds" "$python" -m pytest --noconftest -p no:cacheprovider \
        -m gpu -ra $workers tests/unit/executor/test_on_gpu.py >"$out/gpu-tests.txt" 2>&1) && code=0 || code=$?
      tail -n 30 "$out/gpu-tests.txt"
      return "$code"
      ;;
    *) set -- "$name.py" "$@" ;;
  esac
  script=$1
  shift
  timeout -k 10 "$seconds" "$python" "$here/$script" --out "$out" --seconds $((seconds - 15)) "$@"
}

failed=
left=$(echo "$pieces" | wc -w)
for name in $pieces; do
  seconds=$((deadline - $(date +%s)))
  share=$((seconds / left))
  enough=$(most "$name")
  [ "$share" -gt "$enough" ] && enough=$share
  [ "$seconds" -gt "$enough" ] && seconds=$enough
  left=$((left - 1))
  echo "== $name, at most $seconds s"
  if [ "$seconds" -lt 20 ]; then
    failed="$failed $name (out of time)"
    continue
  fi
  begun=$(date +%s)
  one "$name" "$seconds" "$@" || failed="$failed $name"
  echo "== $name took $(($(date +%s) - begun)) s"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
