# `make run` and `make test` do everything on a fresh clone, set-up included.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready

.PHONY: setup run test check sanitize docs format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	touch $@

run: $(READY)
	$(BIN)/attnbench run --device cpu --backends gemm_ref,sdpa,jit_flash

test: $(READY)
	$(BIN)/python -m pytest

# The CPU kernel's tests once more, with every access to memory and all arithmetic checked.
SANITIZERS := $(shell c++ -print-file-name=libasan.so) $(shell c++ -print-file-name=libubsan.so)
sanitize: $(READY)
	ATTNBENCH_CXX=$(CURDIR)/tools/sanitized-c++ LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -q --capture=sys tests/test_jit_flash_cpu.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS_READY)
	$(BIN)/python tools/cli_docs.py --check
	$(BIN)/python tools/backends_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in build/site"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
