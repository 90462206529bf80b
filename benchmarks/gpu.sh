#!/usr/bin/env bash
# What wants a GPU: benchmarks/gpu.sh OUT_DIR [STAGE...]
#
#   run         each kernel once, against plain torch: does it launch
#   tests       is it right: both ops' kernels and what else is marked for a GPU
#   tune        launch parameters, which the benchmarks then use
#   benchmarks  compiled rivals last
# Each has a time limit, in all about nine minutes, which is less than all of it takes: name stages
# to spread them over several calls. A stage that fails, is interrupted or runs out of time loses
# nothing that it had, and stops no other.
# OUT_DIR gets a log of each stage, stages.txt, the device's file of monkey_kernels/configs, and
# benchmarks.json: python -m benchmarks.record OUT_DIR turns it into pages. The exit code is 1 if a
# stage failed.
#
# Rehearsal without a GPU: MONKEY_BENCHMARK_SCALE=tiny TRITON_INTERPRET=1 benchmarks/gpu.sh OUT_DIR
set -uo pipefail
wanted=${*:2}
wanted=" ${wanted:-run tests tune benchmarks} "
for name in $wanted; do
    case $name in run | tests | tune | benchmarks) ;; *) set -- ;; esac
done
if [ $# -lt 1 ]; then
    echo "usage: benchmarks/gpu.sh OUT_DIR [run|tests|tune|benchmarks]..." >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
status=0

# stage NAME SECONDS COMMAND...: INT first, on which pytest ends as after Ctrl-C
stage() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [[ $wanted == *" $name "* ]] || return 0
    echo "== $name: at most $limit s"
    timeout --signal=INT --kill-after=30 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || status=1
    echo "== $name: exit code $code after $((SECONDS - start)) s" | tee -a "$out/stages.txt"
}

"$python" - <<'PY' | tee "$out/machine.txt"
import importlib.util, platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "on",
      torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
names = """triton transformers pytest pytest_benchmark xdist peft tilelens bitsandbytes deepspeed
torchvision torchao kernels flash_attn cvcuda""".split()
missing = [n for n in names if not importlib.util.find_spec(n)]
print("not installed, what needs it is skipped:", *missing or ["nothing"])
PY
workers=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null) || workers=
# The file that the kernels read on this device, so that the benchmarks run with what was found.
config=$("$python" -c 'import torch; from monkey_kernels.tuning import config_path
print(config_path(torch.device("cuda")))' 2>/dev/null) || config=$out/config.json

MONKEY_BENCHMARK_SCALE=tiny stage run "${RUN_LIMIT:-60}" "$python" -m benchmarks.tune --seconds 0 \
    --out "$out/config.json"
# shellcheck disable=SC2086
stage tests "${TESTS_LIMIT:-120}" "$python" -m pytest -q -p no:cacheprovider $workers \
    --continue-on-collection-errors tests/kernels/test_{crops,resampler_attention}_kernel.py tests/model/test_visual_serving.py
stage tune "${TUNE_LIMIT:-120}" "$python" -m benchmarks.tune --seconds "${TUNE_SECONDS:-100}" \
    --out "$config"
[ ! -s "$config" ] || [ "$config" = "$out/config.json" ] || cp "$config" "$out/"
stage benchmarks "${BENCHMARKS_LIMIT:-$((530 - SECONDS))}" "$python" -m pytest -p no:cacheprovider \
    benchmarks --continue-on-collection-errors --benchmark-only --benchmark-json="$out/benchmarks.json"
exit $status
