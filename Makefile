# `make demo` and `make test` each work as the first command on a fresh clone.
PYTHON ?= python3.11
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: install demo test check format slow gpu kernels faults properties soak coverage wheel clean

install: $(DEV_STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@echo "Installing into $(VENV). The bulk of it is torch; README.md says how to get a smaller build, without CUDA."
	$(PIP) -e .
	@touch $@

# What only tests and checks need.
$(DEV_STAMP): $(STAMP)
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/ragkv demo

test: install
	$(VENV)/bin/python -m pytest

slow: install
	$(VENV)/bin/python -m pytest -m slow

gpu: install
	$(VENV)/bin/python -m pytest -m gpu

kernels: install
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/test_kernels.py tests/test_fused.py tests/test_paged_kernels.py

faults: install
	$(VENV)/bin/python -m tests.stress.store_faults

properties: install
	RAGKV_PROPERTY_EXAMPLES=500 $(VENV)/bin/python -m pytest tests/test_store_properties.py

soak: install
	$(VENV)/bin/python -m tests.stress.store_soak --minutes 10

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p ragkv
	$(VENV)/bin/lint-imports

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

coverage: install
	$(VENV)/bin/python -m pytest --cov --cov-report=term-missing

wheel: install
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
