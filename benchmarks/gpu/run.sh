#!/usr/bin/env bash
# The one command for a machine with a GPU: builds pixfuse, runs every test with the GPU required,
# runs compute-sanitizer on a short case, and measures. Needs no network.
#
#   benchmarks/gpu/run.sh          everything
#   benchmarks/gpu/run.sh STEP     one of machine, build, memcheck, racecheck, benchmark, crops,
#                                  convolutions, tests
#
# OUT     where the logs and the measured *_cuda.json go (default: build/gpu)
# PYTHON  the interpreter that has torch with CUDA (default: python3)
# BUDGET  seconds for everything (default: 570)
#
# A failing step does not stop the others; the status at the end is 1 if any failed.
set -uo pipefail
SELF=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$SELF")/../.." || exit 2

OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
SITE=$PWD/build/gpu-site # where pixfuse is installed: not into the machine's own packages
export OUT PYTHON BUDGET
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# ---- the steps ----

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  "$PYTHON" - <<'PYTHON_END'
import torch
print("torch", torch.__version__, "with CUDA", torch.version.cuda)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PYTHON_END
}

# The architecture of this GPU alone: all of them take minutes.
architecture() {
  "$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())'
}

build_with_pip() {
  "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --no-cache-dir \
    --disable-pip-version-check --target "$SITE" . \
    --config-settings=build-dir=build/gpu-pip \
    --config-settings=cmake.define.PIXFUSE_CUDA=ON \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$1"
}

# For a machine whose scikit-build-core is older than the one that the project asks for.
build_with_cmake() {
  cmake -S . -B build/gpu-cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DPIXFUSE_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$1" -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
    cmake --build build/gpu-cmake &&
    cmake --install build/gpu-cmake --prefix "$SITE" &&
    cp -r python/pixfuse/. "$SITE/pixfuse/"
}

build() {
  local arch
  arch=$(architecture) || return
  rm -rf "$SITE"
  build_with_pip "$arch" || build_with_cmake "$arch" || return
  "$PYTHON" - <<'PYTHON_END'
import pixfuse
print(pixfuse.info())
assert pixfuse.info()["cuda"]["loaded"], "the CUDA kernels are not loaded"
PYTHON_END
}

# Every tensor gets its own allocation, so that memcheck sees an access one byte beyond it. Errors
# of API calls are torch's own probing, not ours.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    --report-api-errors no --target-processes all "$PYTHON" -m benchmarks.gpu.short_case
}

measure() {
  "$PYTHON" -m benchmarks.bench_normalize_cuda --time-limit 90 \
    --output "$OUT/normalize_cuda.json"
}

measure_crops() {
  "$PYTHON" -m benchmarks.bench_crop_mirror_normalize_cuda --time-limit 50 \
    --output "$OUT/crop_mirror_normalize_cuda.json"
}

measure_convolutions() {
  "$PYTHON" -m benchmarks.bench_conv_bias_relu_cuda --time-limit 50 \
    --output "$OUT/conv_bias_relu_cuda.json"
}

run_tests() {
  local workers=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  # The machine's pytest may be older than the one that the project pins.
  PIXFUSE_REQUIRE_CUDA=1 "$PYTHON" -m pytest "${workers[@]}" -p no:cacheprovider \
    -o minversion=7.0 tests
}

case "${1:-}" in
  "") ;;
  machine) describe; exit ;;
  build) build; exit ;;
  memcheck | racecheck) sanitize "$1"; exit ;;
  benchmark) measure; exit ;;
  crops) measure_crops; exit ;;
  convolutions) measure_convolutions; exit ;;
  tests) run_tests; exit ;;
  *) sed -n '2,/^set /{/^#/p}' "$SELF" >&2; exit 2 ;;
esac

# ---- all of them, each within its time ----

summary=()
failures=0

# step NAME SECONDS: runs a step with a time limit, its output in $OUT/NAME.log.
step() {
  local name=$1 limit=$2 begun=$SECONDS status
  if ((BUDGET - SECONDS < limit)); then limit=$((BUDGET - SECONDS)); fi
  if ((limit < 5)); then
    summary+=("NOT RUN  $name: no time was left")
    failures=$((failures + 1))
    return 1
  fi
  echo "--- $name (at most $limit s)"
  timeout --kill-after=5 "$limit" bash "$SELF" "$name" >"$OUT/$name.log" 2>&1
  status=$?
  case $status in
    0) summary+=("passed   $name ($((SECONDS - begun)) s)") ;;
    124 | 137) summary+=("TIMEOUT  $name after $limit s") ;;
    *) summary+=("FAILED   $name, status $status ($((SECONDS - begun)) s)") ;;
  esac
  if ((status == 0)); then
    tail -n 5 "$OUT/$name.log"
  else
    tail -n 40 "$OUT/$name.log"
    failures=$((failures + 1))
  fi
  return "$status"
}

step machine 60
if step build 200; then
  step memcheck 60
  step racecheck 60
  step benchmark 120
  step crops 80
  step convolutions 80
  step tests 300 # last: whatever time is left
else
  summary+=("NOT RUN  memcheck, racecheck, benchmark, crops, convolutions, tests: pixfuse was not built")
fi

printf '%s\n' "" "Summary after $SECONDS s:" "${summary[@]}" | tee "$OUT/summary.log"
exit $((failures > 0))
