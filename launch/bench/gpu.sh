#!/usr/bin/env bash
# How fast one GPU trains an 8B Llama shape, in at most ten minutes; on a CPU the same with a tiny shape.
#   bash launch/bench/gpu.sh [folder for gpu.json]
# Needs torch >= 2.11, transformers, accelerate, peft and this repository; weights are random, nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 600 "${PYTHON:-python}" -m launch.bench.gpu --output "${1:-.}/gpu.json"
