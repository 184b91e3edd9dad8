#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer into a scratch copy and runs on it: the op tests,
# recorded decode steps of whole models, and random cases on every instruction set.
# Usage: tests/sanitize.sh PYTHON [CASES]
set -euo pipefail
python=$(realpath -s "$1")
cases=${2:-1500}
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r "$root"/{setup.py,pyproject.toml,README.md,LICENSE,NOTICE,csrc,kernels,uma_engine,tests,bench} "$scratch"
rm -f "$scratch"/kernels/uma_kernels/_C*.so
cd "$scratch"
# What this machine cannot run cannot be tested here: it is not built.
most=portable
for isa in avx2 avx512vl; do
  if [ "$(uname -m)" = x86_64 ] && grep -qw "$isa" /proc/cpuinfo; then most=${isa%vl}; fi
done
UMA_MOST_ISA=$most UMA_SANITIZE=address,undefined UMA_REQUIRE_EXTENSION=1 "$python" setup.py -q build_ext --inplace
# Python and torch keep memory for the life of the process: leaks are not what is looked for here.
export ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$scratch:$scratch/kernels"
sanitized() {
  LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$python" "$@"
}
sanitized -m pytest -q -p no:cacheprovider tests/ops tests/parity/test_tape.py -m "not slow and not interpreted"
sanitized -m tests.fuzz --cases "$cases"
