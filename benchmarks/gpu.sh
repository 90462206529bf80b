#!/usr/bin/env bash
# What wants a GPU: benchmarks/gpu.sh OUT_DIR [STAGE...]
#
# Stages, each with a time limit, in all about nine minutes, which is less than all of it takes: name
# stages to spread them over several calls.
#   run         every kernel once: does it launch
#   tests       is it right: both ops' kernels and what else is marked for a GPU
#   sanitizer   compute-sanitizer over every kernel
#   tune        launch parameters, which the benchmarks then use
#   benchmarks  rows of ours first, compiled rivals last
# A stage that fails or is interrupted does not stop the others, and loses nothing that it had.
# OUT_DIR gets a log of each stage, stages.json, the device's file of monkey_kernels/configs, and
# benchmarks.json (for python -m benchmarks.record --from OUT_DIR). The exit code is 1 if a stage
# failed.
#
# Rehearsal without a GPU: MONKEY_BENCHMARK_SCALE=tiny TRITON_INTERPRET=1 benchmarks/gpu.sh OUT_DIR
set -uo pipefail
wanted=" ${*:2} "
[ $# -gt 1 ] || wanted=" run tests sanitizer tune benchmarks "
for name in $wanted; do
    case $name in run | tests | sanitizer | tune | benchmarks) ;; *) set -- ;; esac
done
if [ $# -lt 1 ]; then
    echo "usage: benchmarks/gpu.sh OUT_DIR [run|tests|sanitizer|tune|benchmarks]..." >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
stages=()
status=0

# stage NAME SECONDS COMMAND...: INT first, on which pytest ends as after Ctrl-C
stage() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [[ $wanted == *" $name "* ]] || return 0
    echo "== $name: at most $limit s"
    timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || status=1
    echo "== $name: exit code $code after $((SECONDS - start)) s"
    stages+=("\"$name\": {\"exit\": $code, \"seconds\": $((SECONDS - start))}")
    (IFS=, && echo "{${stages[*]}}" >"$out/stages.json")
}

"$python" - <<'PY'
import importlib.util, platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "on",
      torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
names = "triton transformers pytest pytest_benchmark xdist tilelens bitsandbytes deepspeed torchvision"
missing = [n for n in names.split() + ["flash_attn", "cvcuda"] if not importlib.util.find_spec(n)]
print("not installed, what needs it is skipped:", *missing or ["nothing"])
PY
workers=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null) || workers=
export MONKEY_BENCHMARK_SCALE=${MONKEY_BENCHMARK_SCALE:-real}
# The file that the kernels read on this device, so that the benchmarks run with what was found.
config=$("$python" -c 'import torch; from monkey_kernels.tuning import config_path
print(config_path(torch.device("cuda")))' 2>/dev/null) || config=$out/config.json

MONKEY_BENCHMARK_SCALE=tiny stage run "${RUN_LIMIT:-60}" "$python" -m benchmarks.tune --once
# shellcheck disable=SC2086
stage tests "${TESTS_LIMIT:-100}" "$python" -m pytest -q -p no:cacheprovider $workers \
    tests/kernels/test_{crops,resampler_attention}_kernel.py tests/model/test_visual_serving.py
if command -v compute-sanitizer >/dev/null; then
    # Each tensor in an allocation of its own, so that an access beyond it is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 MONKEY_BENCHMARK_SCALE=tiny \
        stage sanitizer "${SANITIZER_LIMIT:-60}" compute-sanitizer --report-api-errors no \
        --error-exitcode 1 "$python" -m benchmarks.tune --once
else
    echo "== sanitizer: compute-sanitizer is not here"
fi
stage tune "${TUNE_LIMIT:-100}" "$python" -m benchmarks.tune --seconds "${TUNE_SECONDS:-75}" \
    --out "$config"
[ ! -s "$config" ] || [ "$config" = "$out/config.json" ] || cp "$config" "$out/"
limit=$((530 - SECONDS))
MONKEY_BENCHMARK_SECONDS=${BENCHMARKS_SECONDS:-$((limit - 45))} \
    stage benchmarks "$limit" "$python" -m pytest -p no:cacheprovider \
    benchmarks --benchmark-only --benchmark-json="$out/benchmarks.json"
exit $status
