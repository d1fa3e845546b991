#!/usr/bin/env bash
# Builds, tests, measures and profiles vlpfast on a machine with an NVIDIA GPU, stage by stage.
#
#   benchmarks/gpu.sh                       every stage: env build tests bench profile
#   benchmarks/gpu.sh build tests           these only; stages that need the build say so when it is missing
#   OPS="keep_ids" benchmarks/gpu.sh bench  only these ops (default: all that have a benchmark)
#
# Needs python3 with torch (CUDA build), triton, pybind11, setuptools, pytest, hypothesis, and nvcc. Uses no network.
# Each stage has a time limit, leaves its log in $OUT (default out/gpu) and never stops the next one. At the end, or when
# stopped, rows, plots and traces are packed into $OUT/gpu.tar.gz; bring the rows home, where none were added meanwhile, with
#   tar -xzf gpu.tar.gz benchmarks/results
# Settings: PYTHON (python3), OUT, OPS, TESTS (pytest arguments, tests), QUICK (1: bench only tries, records nothing),
# LIMIT_S (all stages together, 570), DEVICE (cuda; cpu tries the script out), VLPFAST_COMMIT (for a tree without .git).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-$PWD/out/gpu}
DEVICE=${DEVICE:-cuda}
LIMIT_S=${LIMIT_S:-570}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

stage_env() {
  nvidia-smi || echo "no nvidia-smi"
  "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" --version || nvcc --version || echo "no nvcc"
  g++ --version | head -1
  command -v ncu || echo "no ncu"
  "$PYTHON" - "$DEVICE" <<'PY'
import importlib.metadata as metadata, os, platform, sys
import torch
print("python", platform.python_version(), "cores", os.cpu_count())
for name in "torch triton numpy pybind11 setuptools pytest hypothesis matplotlib timm transformers".split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "missing")
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "SMs", f"{p.total_memory / 2**30:.0f} GiB", f"L2 {p.L2_cache_size / 2**20:.0f} MiB")
elif sys.argv[1] == "cuda":
    sys.exit("torch sees no GPU")
PY
}

stage_build() {
  if ! "$PYTHON" -m pip install -e . --no-build-isolation --no-deps; then
    echo "pip install -e failed; building in place, kernels/ linked into the package"
    "$PYTHON" setup.py build_ext --inplace || return 1
    [ -e vlpfast/kernels ] || ln -s ../kernels vlpfast/kernels
  fi
  check_build
}

# What the build must have given.
check_build() {
  "$PYTHON" - "$DEVICE" <<'PY'
import sys
import vlpfast.kernels
from vlpfast import _ext
needed = ["_C", "_host"] + (["_C_cuda"] if sys.argv[1] == "cuda" else [])
reasons = {name: _ext.missing(name) for name in needed}
print(reasons)
sys.exit(any(reason is not None for reason in reasons.values()))
PY
}

stage_tests() {
  local mark=()
  [ "$DEVICE" = cuda ] && mark=(-m gpu)
  # shellcheck disable=SC2086  # TESTS is a list
  "$PYTHON" -m pytest -q -p no:cacheprovider "${mark[@]}" ${TESTS:-tests}
}

stage_bench() {
  local mode=(--record)
  [ "${QUICK:-0}" = 1 ] && mode=(--quick)
  # shellcheck disable=SC2086  # OPS is a list
  "$PYTHON" -m benchmarks.run ${OPS:-} "${mode[@]}" --device "$DEVICE" || return 1
  [ "${mode[0]}" = --quick ] || "$PYTHON" -m benchmarks.plot
}

ops() {
  if [ -n "${OPS:-}" ]; then echo "$OPS"; else "$PYTHON" -c 'from benchmarks.harness import names; print(*names())'; fi
}

stage_profile() {
  local op status=0
  for op in $(ops); do
    # The machine's clocks are left as they are. Where counters cannot be read, the profiler in torch still gives times.
    if command -v ncu >/dev/null && [ "$DEVICE" = cuda ] &&
      ncu --profile-from-start off --clock-control none --set basic --export "$TRACES/$op" --force-overwrite \
        "$PYTHON" -m benchmarks.profile "$op" --device "$DEVICE" --bare &&
      ncu --import "$TRACES/$op.ncu-rep" --page details; then
      continue
    fi
    echo "$op: no hardware counters; torch profiler"
    "$PYTHON" -m benchmarks.profile "$op" --device "$DEVICE" --out "$TRACES" || status=1
  done
  return "$status"
}

limit_of() {
  case $1 in
    env) echo 60 ;;
    build) echo 240 ;;
    tests) echo 240 ;;
    bench) echo 300 ;;
    profile) echo 120 ;;
  esac
}

pack() {
  trap - EXIT
  local items=()
  [ -d benchmarks/results ] && items+=(-C "$PWD" benchmarks/results)
  [ -n "$(ls -A "$TRACES")" ] && items+=(-C "$scratch" traces)
  [ ${#items[@]} -gt 0 ] && tar -czf "$OUT/gpu.tar.gz" "${items[@]}"
  rm -rf "$scratch"
  {
    echo "device $DEVICE, stages: ${stages[*]}, $SECONDS s"
    if [ ${#failed[@]} -gt 0 ]; then echo "FAILED: ${failed[*]}"; else echo "all passed"; fi
  } | tee "$OUT/summary.txt"
  [ ${#failed[@]} -eq 0 ]
}

run_stage() {
  local name=$1 left=$((LIMIT_S - SECONDS)) limit status start=$SECONDS
  limit=$(limit_of "$name")
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    failed+=("$name(no time)")
    return
  fi
  echo "== $name (at most $limit s)"
  # A child of its own, so that `timeout` can end it with all it started.
  timeout -k 10 "$limit" "$BASH" benchmarks/gpu.sh --stage "$name" >"$OUT/$name.log" 2>&1 &
  child=$!
  wait "$child"
  status=$?
  child=
  tail -n 15 "$OUT/$name.log"
  echo "== $name: exit $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || failed+=("$name($status)")
}

if [ "${1:-}" = --stage ]; then
  "stage_$2"
  exit $?
fi

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(env build tests bench profile)
for name in "${stages[@]}"; do
  if [ -z "$(limit_of "$name")" ]; then
    echo "unknown stage '$name': expected env, build, tests, bench or profile" >&2
    exit 2
  fi
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
scratch=$(mktemp -d)
TRACES=$scratch/traces
mkdir "$TRACES"
export OUT DEVICE PYTHON TRACES
failed=() child=
SECONDS=0
trap '[ -z "$child" ] || kill "$child"; failed+=(stopped); pack; exit 1' INT TERM
trap pack EXIT
for name in "${stages[@]}"; do
  run_stage "$name"
done
pack
exit $?
