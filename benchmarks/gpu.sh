#!/usr/bin/env bash
# Everything that wants a GPU, in under 9 minutes: benchmarks/gpu.sh OUT_DIR
#
# Stages, each with a time limit: the GPU tests, compute-sanitizer over every kernel, the search for
# launch parameters (which the benchmarks then use), the benchmarks. A stage that fails does not stop
# the others. OUT_DIR gets a log of each stage, stages.json, the device's file of
# monkey_kernels/configs, and benchmarks.json (for python -m benchmarks.record --from). The exit code
# is 1 if a stage failed.
#
# Rehearsal without a GPU: MONKEY_BENCHMARK_SCALE=tiny TRITON_INTERPRET=1 benchmarks/gpu.sh OUT_DIR
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu.sh OUT_DIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
stages=()
status=0

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name: at most $limit s"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || status=1
    echo "== $name: exit code $code after $((SECONDS - start)) s"
    stages+=("\"$name\": {\"exit\": $code, \"seconds\": $((SECONDS - start))}")
}

"$python" -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
stage tests "${TESTS_LIMIT:-120}" "$python" -m pytest -q -p no:cacheprovider -m gpu
if command -v compute-sanitizer >/dev/null; then
    # Each tensor in an allocation of its own, so that an access beyond it is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 MONKEY_BENCHMARK_SCALE=tiny \
        stage sanitizer "${SANITIZER_LIMIT:-60}" \
        compute-sanitizer --error-exitcode 1 "$python" -m benchmarks.tune --once
else
    echo "== sanitizer: compute-sanitizer is not here"
    stages+=('"sanitizer": {"exit": null, "seconds": 0}')
fi
# The file that the kernels read on this device, so that the benchmarks run with what was found.
config=$("$python" -c 'import torch; from monkey_kernels.tuning import config_path
print(config_path(torch.device("cuda")))' 2>/dev/null) || config=$out/config.json
stage tune "${TUNE_LIMIT:-100}" "$python" -m benchmarks.tune --seconds "${TUNE_SECONDS:-75}" \
    --out "$config"
[ ! -s "$config" ] || [ "$config" = "$out/config.json" ] || cp "$config" "$out/"
# The benchmarks have what is left, none starts in the last 45 seconds of it, and what needs a GPU
# most comes first.
limit=$((530 - SECONDS))
MONKEY_BENCHMARK_SECONDS=${BENCHMARKS_SECONDS:-$((limit - 45))} \
    stage benchmarks "$limit" "$python" -m pytest -p no:cacheprovider \
    benchmarks/test_bench_{crops,resampler,encoder,vit,memory,whole_model}.py \
    --benchmark-only --benchmark-json="$out/benchmarks.json"
(
    IFS=,
    echo "{${stages[*]}}" >"$out/stages.json"
)
exit $status
