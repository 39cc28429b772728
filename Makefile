# Set-up, checks and runs. Every target does all the set-up that it needs.
#   make demo      answer a question about a real video, from a fresh clone
#   make test      all tests but those that need a GPU
#   make check     lint, formatting, types, import directions
# Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests; each takes about 2 GB.
JOBS ?= 2
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup tiny-model tiny-eval tiny-streams demo test check bench gpu-check fmt test-oldest llama-test test-lmms clean

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

setup: $(VENV)/.stamp  ## Make the virtual environment; again only when the requirements change.

# The stamp is written last, so that an interrupted installation is repeated.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "av_llava needs Python 3.11 or later, not %d.%d: make PYTHON=python3.12 setup" % sys.version_info[:2])'
	@echo "Installing into $(VENV) (several GB: PyTorch) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install -e ".[dev]" -c constraints.txt
	@touch $@

demo: setup  ## Answer a question about a real video with sound.
	$(BIN)/python scripts/demo.py

test: setup  ## Run all tests but those that need a GPU.
	$(BIN)/python -m pytest -m "not gpu" -n $(JOBS)

check: setup  ## Lint, formatting, types, import directions.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

TINY ?= runs/tiny
TINY_TRAIN = $(BIN)/torchrun --standalone --nproc_per_node 2 -m av_llava.cli train \
  scripts/tiny/recipe.yaml
tiny-model: setup  ## Train the small model that ships, from nothing (docs/tiny.md; an hour).
	$(BIN)/python scripts/tiny/build.py $(TINY)/start
	{ $(BIN)/python scripts/tiny/make_data.py $(TINY)/data && \
	  for name in events conversations looks; do \
	    $(BIN)/av-llava data index $(TINY)/data/$$name.json --model $(TINY)/start || exit; \
	  done; } & data=$$!; \
	  trap "kill $$data 2>/dev/null" EXIT; \
	  $(BIN)/python scripts/tiny/pretrain_towers.py $(TINY)/start && wait $$data
	$(BIN)/python scripts/tiny/pretrain_events.py $(TINY)/start
	$(TINY_TRAIN) data.train=$(TINY)/data/events.json model.path=$(TINY)/start output=$(TINY)/events \
	  training.max_steps=500 batch.max_samples=16
	$(TINY_TRAIN) data.train=$(TINY)/data/conversations.json model.path=$(TINY)/events/final \
	  output=$(TINY)/answers training.max_steps=1500
	$(TINY_TRAIN) data.train=$(TINY)/data/looks.json model.path=$(TINY)/answers/final output=$(TINY)/run \
	  training.max_steps=700
	@echo "The model is in $(TINY)/run/final: make tiny-eval MODEL=$(TINY)/run/final"

tiny-eval: setup  ## Held-out accuracy of the small model, whole, muted and blanked.
	$(BIN)/python scripts/tiny/evaluate.py $(if $(MODEL),--model $(MODEL))

tiny-streams: setup  ## Slow, fast and both streams at equal tokens (docs/tiny.md; about an hour).
	$(BIN)/python scripts/tiny/streams.py $(or $(MODEL),av_llava/av-llava-tiny)

fmt: setup  ## Format, and repair what can be repaired.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Measure splice, decoding, preprocessing, sessions, log-mel.
	$(BIN)/python -m bench

gpu-check: setup  ## Compare CUDA with the CPU and measure on the GPU.
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m bench.gpu

test-oldest: .venv-oldest/.stamp  ## Run the tests with the oldest allowed dependencies.
	.venv-oldest/bin/python -m pytest -m "not gpu" -n $(JOBS)

.venv-oldest/.stamp: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) install -e ".[dev]" -c constraints-oldest.txt
	@touch $@

llama-test: setup .venv-llama/.stamp  ## Compare exported GGUF files with llama.cpp (builds it once).
	$(BIN)/python -m pytest tests/checkpoints/test_llama_cpp.py

# llama.cpp from source, in an environment of its own: it is called as a program.
.venv-llama/.stamp:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python $(PIP) install llama-cpp-python==0.3.36
	@touch $@

test-lmms: .venv-lmms/.stamp  ## Run the real lmms-eval with this model (1.5 GB more).
	.venv-lmms/bin/python -m pytest tests/lmms

# lmms-eval pins an older PyAV, which converts colours wrongly; ours is installed over it.
.venv-lmms/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lmms
	grep -E "^(torch|torchaudio|torchvision|transformers|tokenizers|huggingface_hub|accelerate|peft|numpy|pillow)==" \
	  constraints.txt > .venv-lmms/constraints.txt
	.venv-lmms/bin/python $(PIP) install lmms-eval==0.7.3 pytest hypothesis -c .venv-lmms/constraints.txt
	.venv-lmms/bin/python $(PIP) install -e . -c .venv-lmms/constraints.txt
	@touch $@

clean:  ## Remove the virtual environments and caches.
	rm -rf $(VENV) .venv-oldest .venv-llama .venv-lmms .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
