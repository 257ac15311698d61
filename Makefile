# make quickstart   environment, tokenizer, tokens, a small trained model, a sample
# make test         environment, then every check that takes seconds
# make test-slow    the tests that take minutes
# ACCEL=cuda        install JAX's CUDA build instead of the CPU's

PYTHON ?= python3
ACCEL ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
EXTRA_cuda := [cuda]

ifneq ($(words $(filter cpu cuda,$(ACCEL))),1)
$(error ACCEL is '$(ACCEL)': it must be cpu or cuda)
endif

.PHONY: quickstart test test-slow check format clean

# Its batch is for one GPU.
quickstart: export CUDA_VISIBLE_DEVICES ?= 0
quickstart: $(VENV)/.$(ACCEL)
	$(RUN) -m llm.train --config configs/llm/quickstart.yaml --resume
	$(RUN) -m llm.generate --run runs/quickstart --prompt "def read_file(path):" --max-new-tokens 120 --temperature 0.6

test: check
	$(RUN) -m pytest -n 2

test-slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy core llm export launch
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

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
