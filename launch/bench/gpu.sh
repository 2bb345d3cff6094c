#!/usr/bin/env bash
# How fast one GPU trains an 8B Llama shape, in at most ten minutes; on a CPU the same with a tiny shape.
#   bash launch/bench/gpu.sh [folder for gpu.json]
# Needs torch >= 2.13, transformers 5.23, accelerate 1.15, peft 0.21, and of this repository's other requirements only
# jaxtyping, omegaconf, pydantic and xxhash; nothing has to be installed from here. Weights are random, and nothing is
# downloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
PYTHON="${PYTHON:-python}"
for package in torch transformers accelerate peft jaxtyping omegaconf pydantic xxhash; do
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || missing+=" $package"
done
[ -z "${missing:-}" ] || { echo "error: not installed:$missing; pip install them first" >&2 && exit 1; }
exec timeout 600 "$PYTHON" -m launch.bench.gpu --output "${1:-.}/gpu.json"
