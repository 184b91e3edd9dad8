#!/usr/bin/env bash
# Tests, sanitizers and benches on an NVIDIA GPU, from the source tree, in under nine minutes.
#
#   bench/gpu.sh [PART...]     parts: ceilings tests sanitizer gemm lora attention topk runner; `all` (default) is all of them
#
# Each part has its share of BUDGET seconds (default 520) and is stopped when it is spent; a part that fails does not stop
# the rest. Where OUT names a folder, log and rows go there as two files; else to build/gpu and bench/results.
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
declare -A weight=([ceilings]=8 [tests]=26 [sanitizer]=14 [gemm]=14 [lora]=16 [attention]=14 [topk]=12 [runner]=34)
total=0
for part in "${parts[@]}"; do
  [[ -n ${weight[$part]:-} ]] || { echo "unknown part '$part'; parts are: all ${!weight[*]}" >&2; exit 2; }
  total=$((total + weight[$part]))
done


run_tests() {
  # A process for each file: the kernels of one op are compiled in one process, ops beside each other.
  local file scratch failed
  scratch=$(mktemp -d)
  for file in tests/ops/test_*.py; do
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
    test_file "$file" "$scratch" &
  done
  wait
  failed=$(find "$scratch" -name '*.failed' | wc -l)
  rm -rf "$scratch"
  return $((failed > 0))
}

test_file() {
  local output code
  output=$("$python" -m pytest -q "$1" -k triton -p no:cacheprovider -o addopts= -W ignore --tb=short --maxfail=5 2>&1)
  code=$?
  if [[ $code != 0 && $code != 5 ]]; then # 5: the file has no such tests
    touch "$2/$(basename "$1").failed"
    echo "$output" | tail -n 80
  fi
  echo "tests $(basename "$1"): $(tail -n 1 <<<"$output")"
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

summary=()
begun=$SECONDS
for part in "${parts[@]}"; do
  limit=$((budget * weight[$part] / total))
  start=$SECONDS
  echo "=== $part (at most ${limit} s)"
  GPU_SH_PART=$part timeout -k 5 "$limit" "$0" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) word=passed ;;
    124 | 137) word="stopped after ${limit} s" ;;
    *) word="FAILED ($code)" ;;
  esac
  summary+=("$(printf '%-10s %4d s  %s' "$part" $((SECONDS - start)) "$word")")
  if [[ -n $out ]]; then
    cat "$OUT"/*.jsonl >>"$out/rows.jsonl" 2>/dev/null
    rm -f "$OUT"/*.jsonl
  fi
done
{
  echo "=== summary, $((SECONDS - begun)) s"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log"
printf '%s\n' "${summary[@]}" | grep -qvE ' passed$' && exit 1
exit 0
