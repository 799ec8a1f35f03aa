#!/usr/bin/env bash
# The one command for a machine with a GPU: builds pixfuse, tests it with the GPU required, measures,
# and runs compute-sanitizer on a short case. Needs no network, and less than ten minutes.
#
#   benchmarks/gpu/run.sh          everything
#   benchmarks/gpu/run.sh STEP     one of machine, build, short, gpu_tests, normalize, standardize,
#                                  convolutions, crops, memcheck, racecheck, tests
#
# OUT     where the results go (default: build/gpu): summary.json, log.txt and a *_cuda.json of each
#         benchmark; what was there by these names is replaced
# PYTHON  the interpreter that has torch with CUDA (default: python3)
# BUDGET  seconds for everything (default: 570)
# ARCH    the architecture to build for (default: that of the GPU)
#
# Each step has a time limit. One that fails does not stop the others, except the build those that
# need it. summary.json is there from the first step on and says of each how it ended, with the end
# of its log if not well; the status is 1 if any failed.
set -uo pipefail
SELF=$(realpath "${BASH_SOURCE[0]}")
cd "$(dirname "$SELF")/../.." || exit 2

OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
mkdir -p "$OUT" build || exit 2
OUT=$(realpath "$OUT")
# Where pixfuse is installed: not among the machine's own packages. By the name the tests know that
# it is not the source folder.
SITE=$PWD/build/gpu-site-packages
export OUT PYTHON BUDGET
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=110
# Where CUDA is installed but not on the path.
command -v nvcc >/dev/null || export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

# ---- the steps ----

describe() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader
  nvcc --version | tail -n 2
  for tool in cmake ninja g++ compute-sanitizer; do
    printf '%s: ' "$tool"
    { "$tool" --version 2>&1 || echo absent; } | head -n 1
  done
  "$PYTHON" - <<'PYTHON_END'
import importlib.metadata as packages
import os
import sys

print("python", sys.version.split()[0], "with", len(os.sched_getaffinity(0)), "cores")
for name in (
    "torch torchvision triton numpy pybind11 scikit-build-core pip pytest pytest-timeout "
    "pytest-xdist hypothesis rich"
).split():
    try:
        print(name, packages.version(name))
    except packages.PackageNotFoundError:
        print(name, "absent")
import torch

print("torch's CUDA", torch.version.cuda)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PYTHON_END
}

# The architecture of this GPU alone: all of them take minutes.
architecture() {
  "$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())' 2>/dev/null ||
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ' | sed 's/$/-real/'
}

build_with_pip() {
  "$PYTHON" -m pip install -v --no-index --no-build-isolation --no-deps --no-cache-dir \
    --disable-pip-version-check --target "$SITE" . \
    --config-settings=build-dir=build/gpu-pip \
    --config-settings=cmake.define.PIXFUSE_CUDA=ON \
    --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$1"
}

has_module() { "$PYTHON" -c "import $1" 2>/dev/null; }

# That of the Python packages, where it is one of them: the system's may be too old.
run_cmake() {
  if has_module cmake; then "$PYTHON" -m cmake "$@"; else cmake "$@"; fi
}

# For a machine whose pip or scikit-build-core does not do.
build_with_cmake() {
  local generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  run_cmake -S . -B build/gpu-cmake "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DPIXFUSE_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$1" \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" &&
    run_cmake --build build/gpu-cmake --parallel "$(nproc)" &&
    run_cmake --install build/gpu-cmake --prefix "$SITE" &&
    cp -r python/pixfuse/. "$SITE/pixfuse/"
}

build() {
  local arch=${ARCH:-}
  [[ -n $arch ]] || arch=$(architecture)
  if [[ ! $arch =~ ^[0-9]+[af]?(-real)?$ ]]; then
    echo "no architecture to build for: '$arch'; set ARCH, as in ARCH=90-real"
    return 1
  fi
  rm -rf "$SITE"
  build_with_pip "$arch" || { rm -rf "$SITE" && build_with_cmake "$arch"; } || return
  "$PYTHON" - <<'PYTHON_END'
import pixfuse
print(pixfuse.__file__)
print(pixfuse.info())
assert pixfuse.info()["cuda"]["loaded"], "the CUDA kernels are not loaded"
PYTHON_END
}

# Every tensor gets its own allocation, so that memcheck sees an access one byte beyond it. Errors
# of API calls are torch's own probing, not ours; torch's own kernels take too long to watch.
sanitize() {
  local ours=()
  # Read to its end: whoever writes to a pipe that nobody reads any more fails, and with it the pipe.
  if [[ $(compute-sanitizer --help 2>&1) == *--kernel-name* ]]; then
    ours=(--kernel-name kns=pixfuse)
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "${ours[@]}" \
    --report-api-errors no --target-processes all "$PYTHON" -m benchmarks.gpu.short_case
}

# benchmark NAME SECONDS: begins no point after so many seconds, and leaves a file in any case.
benchmark() {
  "$PYTHON" -m "benchmarks.bench_$1_cuda" --time-limit "$2" --output "$OUT/$1_cuda.json"
}

# run_pytest WHICH: the tests that need a GPU ("gpu"), or the others ("others"), but for those that
# compile kernels for the CPU. The machine's pytest may be older than the one that the project pins,
# its plugins others, and its libraries warn of other things: so none of these decides.
run_pytest() {
  local options=(-p benchmarks.gpu.choose_tests -p no:cacheprovider -o minversion=7.0 -o addopts= -ra
    --tb=short -W default --ignore-glob='*/test_native*' --ignore-glob='*/test_cuda_on_cpu*')
  if has_module xdist; then
    options+=(-p xdist.plugin -n 8)
    # A kernel that does not end blocks its process where no signal reaches Python. The process is
    # given up, and another one goes on.
    options+=(-o timeout_method=thread)
  fi
  if has_module pytest_timeout; then
    options+=(-p pytest_timeout -o timeout=60)
  fi
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PIXFUSE_REQUIRE_CUDA=1 PIXFUSE_TESTS=$1 OMP_NUM_THREADS=2 \
    "$PYTHON" -m pytest "${options[@]}" tests
}

run_step() {
  case $1 in
    machine) describe ;;
    build) build ;;
    short) "$PYTHON" -m benchmarks.gpu.short_case ;;
    gpu_tests) run_pytest gpu ;;
    tests) run_pytest others ;;
    normalize) benchmark normalize 36 ;;
    standardize) benchmark standardize_per_image 30 ;;
    convolutions) benchmark conv_bias_relu 32 ;;
    crops) benchmark crop_mirror_normalize 22 ;;
    memcheck | racecheck) sanitize "$1" ;;
    *) sed -n '2,/^set /{/^#/p}' "$SELF" >&2 && exit 2 ;;
  esac
}

if [[ -n ${1:-} ]]; then
  run_step "$1"
  exit
fi

# ---- all of them, each within its time ----

LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
rm -f "$OUT"/{summary.json,log.txt} "$OUT"/*_cuda.json
: >"$OUT/log.txt"
failures=0

# record NAME RESULT STATUS LIMIT TOOK: adds a line, and writes summary.json anew.
record() {
  (IFS=$'\t' && printf '%s\n' "$*") >>"$LOGS/steps"
  "$PYTHON" "${SELF%/*}/summary.py" "$LOGS" "$OUT/summary.json" || cp "$LOGS/steps" "$OUT/summary.json"
}

# step NAME SECONDS: runs a step with a time limit.
step() {
  local name=$1 limit=$2 begun=$SECONDS status result
  if ((BUDGET - SECONDS < limit)); then limit=$((BUDGET - SECONDS)); fi
  if ((limit < 5)); then
    failures=$((failures + 1))
    record "$name" "not run: no time was left" "" "$limit" 0
    return 1
  fi
  echo "--- $name (at most $limit s)"
  timeout --kill-after=5 "$limit" bash "$SELF" "$name" >"$LOGS/$name.log" 2>&1
  status=$?
  case $status in
    0) result=passed ;;
    124 | 137) result="timeout" ;;
    *) result=failed ;;
  esac
  if ((status == 0)); then
    tail -n 6 "$LOGS/$name.log"
  else
    tail -n 40 "$LOGS/$name.log"
    failures=$((failures + 1))
  fi
  { echo "=== $name: $result, status $status, $((SECONDS - begun)) s" && cat "$LOGS/$name.log"; } |
    tail -c 1000000 >>"$OUT/log.txt"
  record "$name" "$result" "$status" "$limit" $((SECONDS - begun))
  return "$status"
}

# What is most worth knowing comes first. The limits end what hangs: most steps need half of theirs,
# and what they leave is there for the last ones.
step machine 40
if step build 130; then
  step short 35
  step gpu_tests 150
  step normalize 60
  step standardize 50
  step convolutions 60
  step crops 40
  step memcheck 60
  step racecheck 60
  step tests "$BUDGET" # whatever time is left
else
  for name in short gpu_tests normalize standardize convolutions crops memcheck racecheck tests; do
    record "$name" "not run: pixfuse was not built" "" 0 0
  done
fi

echo
echo "Summary after $SECONDS s:"
awk -F '\t' '{ printf "%-13s %s%s (%s s)\n", $1, $2, ($3 == "" || $3 == 0 ? "" : ", status " $3), $5 }' \
  "$LOGS/steps" | tee -a "$OUT/log.txt"
exit $((failures > 0))
