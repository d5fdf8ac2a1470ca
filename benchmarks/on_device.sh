#!/usr/bin/env bash
# The tests and the benchmark that need a GPU, in one command, each stage within a time of its own.
#
#     bash benchmarks/on_device.sh tests     # tests/gpu and a short training from the command line; 150 s at most
#     bash benchmarks/on_device.sh bench     # benchmarks/train.py: 0.6B, then 8B; 440 s at most
#     bash benchmarks/on_device.sh all       # both
#     bash benchmarks/on_device.sh smoke     # the same stages, tiny and on the CPU, to test this script
#
# Runs from the tree, uninstalled. Wheels in .whl, where there are any, are put before what is installed. Logs, JSON
# and tables go to $OUT (runs/on_device if unset), eight files at most; the tables are printed last.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stage=${1:-all}
out=${OUT:-runs/on_device}
python=${PYTHON:-python3}
site=${SITE:-/tmp/site}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
started=$SECONDS
say() { echo "== $((SECONDS - started)) s: $*"; }

wheels() {
    if [ ! -d "$site" ] && compgen -G '.whl/*.whl' >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 1
    fi
    [ -d "$site" ] && PYTHONPATH="$site:${PYTHONPATH:-}"
    export PYTHONPATH="$PWD:${PYTHONPATH:-}"
    say "wheels: $(ls "$site" 2>/dev/null | wc -l) entries in $site"
}

machine() {
    {
        nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,temperature.gpu --format=csv 2>&1
        nproc && free -g && df -h /tmp /dev/shm
        "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|lightning|pytorch-lightning|transformers|peft|trl|accelerate|datasets|tokenizers|huggingface.hub|flash.attn|liger.kernel) '
    } >"$out/machine.txt" 2>&1
    cat "$out/machine.txt"
}

# Tests in several processes where pytest-xdist is there: the imports take most of the time.
gpu_tests() {
    local options=(-p no:cacheprovider -q --durations=15)
    "$python" -c 'import xdist' 2>/dev/null && options+=(-n "${WORKERS:-4}" --dist worksteal)
    "$python" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout "${TEST_TIMEOUT:-75}")
    timeout -k 5 "$1" "$python" -m pytest -m gpu tests/gpu "${options[@]}" "${@:2}" >"$out/tests.log" 2>&1
    say "tests/gpu: exit $?"
}

# The demonstration's configuration from the command line, cut short.
command_line() {
    timeout -k 5 "$1" "$python" -m shadowlit fit --config configs/demo_lora.yaml --trainer.accelerator="$2" \
        --trainer.precision="$3" --trainer.max_epochs=1 --trainer.val_check_interval=1.0 \
        --trainer.enable_progress_bar=false --run.root="$(mktemp -d)" >"$out/fit.log" 2>&1
    say "shadowlit fit: exit $?"
}

tests() {
    gpu_tests "$1" "${@:4}" &
    local running=$!
    command_line "$1" "$2" "$3"
    wait $running
}

show_tests() {
    grep -E '^(FAILED|ERROR|E  )|^[0-9.]+s (call|setup)' "$out/tests.log" | head -60
    tail -n 3 "$out/tests.log"
    grep -E 'export: reloaded|graft:|val/.*/loss|Error' "$out/fit.log" | tail -n 12
}

# The folder of the models lies in memory where there is room.
bench() {
    local limit=$1 profile=$2 workdir=/tmp
    shift 2
    [ "$(df --output=avail -BG /dev/shm 2>/dev/null | tail -n 1 | tr -dc 0-9)" -ge 24 ] 2>/dev/null && workdir=/dev/shm
    timeout -k 5 "$limit" "$python" benchmarks/train.py --profile "$profile" --deadline $((limit - 10)) --workdir "$workdir" \
        --out "$out/$profile" "$@" 2>&1 | tee "$out/$profile.log" | grep -vE '^(INFO|WARNING)' | tail -n 80
    say "benchmark $profile: exit ${PIPESTATUS[0]}"
}

wheels
machine
case $stage in
tests | all | smoke)
    if [ "$stage" = smoke ]; then
        SHADOWLIT_GPU_TESTS=cpu tests "${SMOKE_SECONDS:-900}" cpu 32-true -k "equation or evaluators"
    else
        tests 125 gpu bf16-mixed
    fi
    show_tests
    ;;
esac
case $stage in
bench | all)
    bench 235 gpu-0.6b --fork --repetitions 2 --limit 75
    bench 200 gpu-8b --fork --repetitions 1 --limit 120
    ;;
smoke)
    bench "${SMOKE_SECONDS:-900}" smoke --fork --repetitions 1
    ;;
esac
say "done: $(ls "$out" | tr '\n' ' ')"
