#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer into a scratch copy and runs the op tests on it.
# Usage: tests/sanitize.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r "$root"/{setup.py,pyproject.toml,README.md,LICENSE,NOTICE,csrc,kernels,tests} "$scratch"
rm -f "$scratch"/kernels/uma_kernels/_C*.so
cd "$scratch"
UMA_SANITIZE=address,undefined UMA_REQUIRE_EXTENSION=1 "$python" setup.py -q build_ext --inplace
runtime="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
# Python and torch keep memory for the life of the process: leaks are not what is looked for here.
ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  LD_PRELOAD="$runtime" PYTHONPATH="$scratch:$scratch/kernels" "$python" -m pytest -q -p no:cacheprovider tests/ops -m "not slow"
