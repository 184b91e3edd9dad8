#!/usr/bin/env bash
# Fetches the wheels of vLLM and SGLang, keeps the LoRA kernels' folders in .anchors/ (ignored by git, about 1 MB; both are
# Apache-2.0), and throws the wheels away. Needs pip, a network and 1 GB of free disk. bench/gpu/anchors.py imports what this leaves.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d "${TMPDIR:-/tmp}/anchors.XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch() { "$python" -m pip download --no-deps --no-cache-dir --only-binary :all: --dest "$work" "$1"; }
fetch "vllm==${VLLM_VERSION:-0.33.0}"
fetch "sglang==${SGLANG_VERSION:-0.5.23}"
rm -rf "$root/.anchors"
"$python" - "$work" "$root/.anchors" <<'PY'
import sys, zipfile
from pathlib import Path

work, target = map(Path, sys.argv[1:])
kept = (
    "vllm/lora/ops/triton_ops/lora_", "vllm/lora/ops/triton_ops/kernel_utils.py", "vllm/lora/ops/triton_ops/utils.py",
    "sglang/kernels/ops/lora/common/", "sglang/kernels/ops/lora/dense/chunked_sgmv_",
    "sglang/kernels/ops/lora/dense/lora_tuning_config.py", "sglang/kernels/ops/lora/dense/csgmv_configs/",
    "sglang/srt/lora/dense/plan.py", "sglang/srt/lora/dense/runner.py", "sglang/srt/lora/dense/configs/sm90",
    "sglang/srt/lora/workspace.py",
)
size = 0
for wheel in sorted(work.glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            licence = ".dist-info/" in info.filename and "LICENSE" in info.filename
            if not info.is_dir() and (licence or (info.filename.startswith(kept) and "fp8" not in info.filename)):
                archive.extract(info, target)
                size += info.file_size
print(f"{size / 1e6:.2f} MB in {target}")
if not size or size > 3e6:
    sys.exit("the anchors must be there, and below 3 MB")
PY
