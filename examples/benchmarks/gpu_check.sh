#!/usr/bin/env bash
# Everything that this project has for a GPU, in one command, on a machine that needs no network:
#
#     examples/benchmarks/gpu_check.sh [--device cuda|cpu] [--parts "tests benchmark two_gpus stacked"]
#
# Each part has a limit of its own and writes below examples/results/gpu/<card>/ as it goes; a part that fails does not
# stop the others. summary.txt and summary.json say how each has ended; the exit status is 1 if one has failed, 2 if
# there is no GPU. --device cpu tries the code where there is none.
#
# Environment: PYTHON (python3), OUT (instead of that directory), WHEELS (.gpu-wheels; `make gpu-wheels` fills it), DATA (folder
# of CIFAR-10, for the part stacked), WORKERS (of pytest-xdist), and seconds: LIMIT_TESTS, LIMIT_BENCHMARK,
# LIMIT_TWO_GPUS, LIMIT_STACKED, SECONDS_STACKED.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

device=cuda
parts="tests benchmark two_gpus stacked"
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=${2:?}; shift 2 ;;
        --parts) parts=${2:?}; shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;;
        *) echo "gpu_check.sh: unknown option $1; see --help" >&2; exit 2 ;;
    esac
done
case $device in cuda | cpu) ;; *) echo "gpu_check.sh: --device is cuda or cpu" >&2; exit 2 ;; esac
for part in $parts; do
    case $part in
        tests | benchmark | two_gpus | stacked) ;;
        *) echo "gpu_check.sh: there is no part $part; see --help" >&2; exit 2 ;;
    esac
done

PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.gpu-wheels}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
# Workers are processes: more threads in each only fight over the cores.
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

# What the package needs and this Python lacks comes from the wheels.
missing=$("$PYTHON" - <<'EOF'
from importlib.util import find_spec
wheels = {"hydra": "hydra_core", "omegaconf": "omegaconf", "antlr4": "antlr4_python3_runtime",
          "pytest_timeout": "pytest_timeout"}
print(*(wheel for module, wheel in wheels.items() if find_spec(module) is None))
EOF
) || exit 2
for name in $missing; do
    for wheel in "$WHEELS/$name"-*.whl; do
        if [ ! -f "$wheel" ]; then
            echo "gpu_check.sh: $name is not installed, and not in $WHEELS; run 'make gpu-wheels' where there is a network" >&2
            exit 2
        fi
        "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$temporary/packages" "$wheel" || exit 2
    done
done
export PYTHONPATH="$PWD:$temporary/packages${PYTHONPATH:+:$PYTHONPATH}"

# A line each: whether there is a GPU, how many, the first one's name, whether pytest-xdist is there.
mapfile -t found < <("$PYTHON" - <<'EOF'
from importlib.util import find_spec
import torch
gpu = torch.cuda.is_available()
print(int(gpu), torch.cuda.device_count(), torch.cuda.get_device_name(0) if gpu else "cpu", sep="\n")
print(int(find_spec("xdist") is not None))
EOF
)
if [ ${#found[@]} -ne 4 ]; then
    echo "gpu_check.sh: $PYTHON has no torch that can be imported" >&2
    exit 2
fi
if [ "$device" = cuda ] && [ "${found[0]}" != 1 ]; then
    echo "gpu_check.sh: torch sees no GPU here. 'nvidia-smi' lists those that the driver sees; a torch without CUDA sees" \
        "none (torch.version.cuda is None). --device cpu tries the code without one." >&2
    exit 2
fi
cards=${found[1]}
name=cpu
[ "$device" = cuda ] && name=${found[2]}
slug=$(printf %s "$name" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]' - | sed 's/^-//;s/-$//')
OUT=${OUT:-examples/results/gpu/$slug}
mkdir -p "$OUT" || exit 2
[ "$device" = cuda ] && timeout 30 nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1

names=() states=() seconds=() notes=()

summary() { # written after every part: what is known stays if this script is ended
    local number failed=0
    {
        echo "device: $name"
        for number in "${!names[@]}"; do
            printf '%-10s %-8s %5s s  %s\n' "${names[number]}" "${states[number]}" "${seconds[number]}" "${notes[number]}"
        done
    } >"$OUT/summary.txt"
    {
        printf '{"device": "%s", "gpus": %d, "parts": [' "$name" "$cards"
        for number in "${!names[@]}"; do
            [ "$number" = 0 ] || printf ', '
            printf '{"part": "%s", "status": "%s", "seconds": %d, "note": "%s"}' \
                "${names[number]}" "${states[number]}" "${seconds[number]}" "${notes[number]}"
        done
        printf ']}\n'
    } >"$OUT/summary.json"
    for number in "${!states[@]}"; do
        case ${states[number]} in 0 | skipped) ;; *) failed=1 ;; esac
    done
    return $failed
}

record() { # part, exit status or "skipped", seconds, note
    names+=("$1") states+=("$2") seconds+=("$3") notes+=("$4")
    echo "== $1: $2, $3 s${4:+, $4}"
    summary || true
}

part() { # part, limit, command: its output goes to <part>.log, whose end is shown
    local label=$1 limit=$2 began=$SECONDS status=0 note=""
    shift 2
    echo "== $label: $* (at most $limit s)"
    # Not through a pipe: a process that outlives the limit would keep it open.
    timeout --kill-after=15 "$limit" "$@" >"$OUT/$label.log" 2>&1 </dev/null || status=$?
    tail -n 60 "$OUT/$label.log"
    case $status in
        124 | 137) note="ended at its limit of $limit s" ;;
        5) [ "$label" = two_gpus ] && status=0 note="no test was collected" ;;
    esac
    record "$label" "$status" $((SECONDS - began)) "$note"
}

# A plugin that warns beside pytest-xdist would end the run: warnings are errors here.
pytest=("$PYTHON" -m pytest -v -rs -p no:cacheprovider -p no:benchmark)
small=()
marks=gpu
if [ "$device" = cpu ]; then
    pytest+=(--device cpu)
    marks="gpu and dry" # those that are quick there
    small=(--batch-size 2 --tau 2 --steps 2 --rounds 1)
fi

for each in $parts; do
    case $each in
        tests)
            parallel=()
            if [ "${found[3]}" = 1 ]; then
                parallel=(-n "${WORKERS:-$([ "$device" = cuda ] && echo 8 || nproc)}")
            fi
            rm -f "$OUT/failures.txt"
            EASGD_GPU_FAILURES="$OUT/failures.txt" part tests "${LIMIT_TESTS:-360}" "${pytest[@]}" -m "$marks" tests/gpu ${parallel[@]+"${parallel[@]}"} \
                --junitxml "$OUT/tests.xml"
            ;;
        benchmark)
            part benchmark "${LIMIT_BENCHMARK:-170}" "$PYTHON" examples/benchmarks/run.py gpu --device "$device" \
                --output "$OUT/benchmark" ${small[@]+"${small[@]}"}
            ;;
        two_gpus)
            if [ "$device" = cuda ] && [ "$cards" -ge 2 ]; then
                part two_gpus "${LIMIT_TWO_GPUS:-120}" "${pytest[@]}" -m gpus tests --junitxml "$OUT/two_gpus.xml"
            else
                record two_gpus skipped 0 "needs two GPUs, this machine has $cards"
            fi
            ;;
        stacked)
            if [ -n "${DATA:-}" ]; then
                part stacked "${LIMIT_STACKED:-120}" "$PYTHON" examples/benchmarks/run.py stacked --device "$device" \
                    --output "$OUT/stacked" --seconds "${SECONDS_STACKED:-60}" --data "$DATA"
            else
                record stacked skipped 0 "no data: DATA names a folder with CIFAR-10"
            fi
            ;;
    esac
done

echo
cat "$OUT/summary.txt"
echo "written: $OUT"
summary
