# One-command set-up and proof. `make demo` and `make test` each do everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# some image libraries change the locale of the process: read text as UTF-8 all the same
export PYTHONUTF8 := 1
# keep what is compiled: without it every process compiles torch and the rest anew, for seconds
export PYTHONDONTWRITEBYTECODE :=
READY := $(VENV)/.ready
# tests run in this many processes, one thread each: two to four
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 4 ? 4 : n)))
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: help setup demo demo-all test test-slow test-all check notebooks lab bench bench-gpu clean
help:          ## list the commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(READY) ## make .venv and install everything, pinned: by uv in half a minute, else by pip in minutes
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"smartlab needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}. Try: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv -c constraints.txt 2>/dev/null || true
	@# uv does not read pip's settings: what they say of where packages are is handed over
	@PATH="$(PATH):$(CURDIR)/$(BIN)"; if command -v uv >/dev/null; then echo "uv installs the packages of constraints.txt"; \
	  uv pip install -q --python $(BIN)/python --index-strategy unsafe-best-match -c constraints.txt -e '.[dev]' \
	    $(foreach place,$(PIP_FIND_LINKS),--find-links $(place)) $(if $(PIP_INDEX_URL),--default-index $(PIP_INDEX_URL)) \
	    $(foreach place,$(PIP_EXTRA_INDEX_URL),--index $(place)); \
	else echo "pip installs the packages of constraints.txt: some minutes; with uv, half a minute"; \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'; fi
	@touch $@

demo: $(READY) ## the tour: six short notebooks on phantoms, under five minutes; the page is runs/demo/index.html
	@$(BIN)/smartlab demo --out runs/demo

demo-all: $(READY) ## all ten notebooks as they are shipped; the page is runs/demo-all/index.html
	@$(BIN)/smartlab demo --all --out runs/demo-all

test: $(READY) ## the tests that take seconds each: under ten minutes on two quiet cores
	$(TESTS) -m "not slow"

test-slow: $(READY) ## the others: killed and resumed, several processes, learning, coverage, a real browser
	$(TESTS) -m slow

test-all: $(READY) ## every test
	$(TESTS)

check: $(READY) ## formatting, lint, types, who imports whom
	$(BIN)/ruff format --check smartlab data_manifests tests benchmarks notebooks
	$(BIN)/ruff check smartlab data_manifests tests benchmarks notebooks
	$(BIN)/python -m smartlab.notebook_files --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

notebooks: $(READY) ## strip and number the notebooks and format their code, before a commit
	$(BIN)/python -m smartlab.notebook_files
	$(BIN)/ruff format notebooks
	$(BIN)/python -m smartlab.notebook_files

lab: $(READY)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=.

bench: $(READY) ## time what we promise, under ten minutes on two quiet cores; results in runs/bench
	$(BIN)/python -m benchmarks.step --quick --view 64 --only step,parts,memory,data,start_up --out runs/bench/step.json
	$(BIN)/python -m benchmarks.loader --quick --out runs/bench/loader.json
	$(BIN)/python -m benchmarks.viewer --out runs/bench/viewer.json
	$(BIN)/python -m benchmarks.explorer --out runs/bench/explorer.json

bench-gpu: $(READY) ## what only an NVIDIA GPU can tell, in eight minutes: equality, speed, memory
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu.json

.PHONY: docs
docs: $(READY) ## build the documentation site into site/; `make demo-all` before it gives notebooks with pictures
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

clean:         ## remove .venv, the demos and the site; your runs and data stay
	rm -rf $(VENV) runs/demo runs/demo-all site build dist
