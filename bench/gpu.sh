#!/usr/bin/env bash
# Tests, sanitizers and benches on an NVIDIA GPU, from the source tree, in under nine minutes.
#
#   bench/gpu.sh [PART...]     parts: ceilings tests sanitizer gemm lora attention topk runner; `all` (default) is all of them;
#                              `tune` races tile sizes, of which the tables in the kernels' modules hold the best
#
# Each part has its share of BUDGET seconds (default 520) and is stopped when it is spent; a part that fails does not stop
# the rest. Where OUT names a folder, log and rows go there as two files; else to build/gpu and bench/results.
# REHEARSE=1 runs the parts at once, each with all of BUDGET, and throws its numbers away: it finds what fails, and leaves
# compiled kernels in Triton's cache (TRITON_CACHE_DIR) for the run that counts.
# PYTHON names the interpreter (default python3), JOBS how many processes run the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
budget=${BUDGET:-520}
jobs=${JOBS:-$(nproc)}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET

parts=("$@")
[[ $# -eq 0 || ${parts[0]} == all ]] && parts=(ceilings tests sanitizer gemm lora attention topk runner)
declare -A weight=([ceilings]=6 [tests]=30 [sanitizer]=14 [gemm]=16 [lora]=18 [attention]=12 [topk]=12 [runner]=44 [tune]=24)
total=0
for part in "${parts[@]}"; do
  [[ -n ${weight[$part]:-} ]] || { echo "unknown part '$part'; parts are: all ${!weight[*]}" >&2; exit 2; }
  total=$((total + weight[$part]))
done


run_tests() {
  "$python" -m pytest tests/ops -q -k triton -n "$jobs" --dist worksteal -p no:cacheprovider -o addopts= -W ignore --tb=short \
    --maxfail=40
}

run_sanitizer() {
  local tool found status=0
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
    { echo "compute-sanitizer is not installed"; return 1; }
  "$python" -m bench.gpu.sanitize || status=1 # compiles every kernel, so that the checked runs only launch
  for found in memcheck racecheck; do
    echo "== $found"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$found" --error-exitcode 9 "$python" -m bench.gpu.sanitize || status=1
  done
  return $status
}

run_part() {
  case $1 in
    ceilings) "$python" -m bench.gpu.harness ;;
    tests) run_tests ;;
    sanitizer) run_sanitizer ;;
    runner)
      "$python" -m pytest -q tests/engine/test_device_runner.py tests/engine/test_step_graphs.py -p no:cacheprovider -o addopts= \
        -W ignore --tb=short &&
        "$python" -m bench.gpu.runner --quick
      ;;
    lora) "$python" -m bench.gpu.lora --quick && "$python" -m bench.gpu.lora_limits --quick ;;
    tune)
      "$python" -m bench.gpu.gemm --tune
      "$python" -m bench.gpu.attention --tune
      "$python" -m bench.gpu.topk --sweep --quick
      ;;
    *) "$python" -m "bench.gpu.$1" --quick ;;
  esac
}

if [[ ${GPU_SH_PART:-} ]]; then # this script again, inside `timeout`
  run_part "$GPU_SH_PART"
  exit
fi

out=${OUT:-}
log=${out:-build/gpu}/gpu.log
mkdir -p "$(dirname "$log")"
if [[ -n $out ]]; then
  OUT=$(mktemp -d) # one file of rows goes out, however many the parts write
  export OUT
  trap 'rm -rf "$OUT"' EXIT
else
  unset OUT
fi

timed_part() { # PART LIMIT; SIGINT, so that tests and benches still say what they have
  GPU_SH_PART=$1 env --default-signal=INT timeout -s INT -k 8 "$2" "$0" 2>&1
}

summary=()
begun=$SECONDS
end_part() { # PART STATUS SECONDS LIMIT
  local word
  case $2 in
    0) word=passed ;;
    124 | 137) word="stopped after $4 s" ;;
    *) word="FAILED ($2)" ;;
  esac
  summary+=("$(printf '%-10s %4d s  %s' "$1" "$3" "$word")")
}

if [[ ${REHEARSE:-} ]]; then
  scratch=$(mktemp -d)
  OUT=$scratch
  export OUT
  for part in "${parts[@]}"; do
    { timed_part "$part" "$budget" >"$scratch/$part.log"; echo "$? $((SECONDS - begun))" >"$scratch/$part.end"; } &
  done
  wait
  for part in "${parts[@]}"; do
    { echo "=== $part"; cat "$scratch/$part.log"; } >>"$log"
    { echo "=== $part"; tail -n 25 "$scratch/$part.log" | cut -c1-400; }
    read -r code took <"$scratch/$part.end"
    end_part "$part" "$code" "$took" "$budget"
  done
  rm -rf "$scratch"
else
  for part in "${parts[@]}"; do
    limit=$((budget * weight[$part] / total))
    start=$SECONDS
    echo "=== $part (at most ${limit} s)"
    timed_part "$part" "$limit" | tee -a "$log"
    end_part "$part" "${PIPESTATUS[0]}" $((SECONDS - start)) "$limit"
    if [[ -n $out ]]; then
      cat "$OUT"/*.jsonl >>"$out/rows.jsonl" 2>/dev/null
      rm -f "$OUT"/*.jsonl
    fi
  done
fi
{
  echo "=== summary, $((SECONDS - begun)) s"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log"
printf '%s\n' "${summary[@]}" | grep -qvE ' passed$' && exit 1
exit 0
