# Every target sets itself up: a virtual environment, the package, and what the target needs.
PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
CONSTRAINTS ?= .constraints.txt

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP = $(VENV)/.installed

.PHONY: demo bench paper test test-slow test-newest compatibility tutorials lint clean

demo: $(STAMP)
	$(VENV)/bin/python tutorials/demo.py

# All, one after the other, hours; BENCH=steps picks one, and BENCH_OPTIONS=--quick is handed on.
# IMAGES=path/to/t10k-images-idx3-ubyte.gz saves the download of digits.
BENCH ?= digits steps scaling mcmc posteriors
bench: $(STAMP)
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[bench]"
	$(foreach name,$(BENCH),$(VENV)/bin/python benchmarks/$(name).py \
	  $(and $(filter digits,$(name)),$(IMAGES),--images $(IMAGES)) $(BENCH_OPTIONS) &&) true

# The experiments of Margossian & Blei (2024), an hour and a half on two cores; PAPER=linear picks one, and
# PAPER_OPTIONS=--quick is handed on.
PAPER ?= linear nonlinear saw hmm closed_forms digits
paper: $(STAMP)
	$(foreach name,$(PAPER),$(VENV)/bin/python -m benchmarks.paper.$(name) $(PAPER_OPTIONS) &&) true

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" -n 2
	PYRO_AMORTIZE_SMOKE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --nbmake -n 2 tutorials

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m slow

# The newest Python at hand with the newest torch and ArviZ; several gigabytes.
test-newest:
	@for python in $(PYTHON) python3.13 python3.12 $(foreach v,3.13 3.12,$(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python3)); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    $(MAKE) VENV=.venv-newest CONSTRAINTS=/dev/null PYTHON=$$python .venv-newest/.installed && \
	    OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -m "not slow" -n 2; exit $$?; \
	  fi; \
	done; echo "This needs python3 >= 3.12; say which: make test-newest PYTHON=/path/to/python3"; exit 1

# Pyro's own examples and autoguide tests with our guide; PYRO=path/to/checkout saves the clone.
compatibility: $(STAMP)
	-OMP_NUM_THREADS=1 $(VENV)/bin/python tests/compatibility/autoguide.py $(if $(PYRO),--pyro $(PYRO))
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/compatibility/run.py --again $(if $(PYRO),--pyro $(PYRO))

tutorials: $(STAMP)
	$(VENV)/bin/python -m pytest --nbmake --nbmake-timeout=600 tutorials

lint: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(STAMP): setup.cfg $(wildcard $(CONSTRAINTS))
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "This needs python3 >= 3.10 with its venv module; say which: make PYTHON=/path/to/python3"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c $(CONSTRAINTS) torch
	$(PIP) install --quiet -c $(CONSTRAINTS) -e ".[test,demo]"
	touch $(STAMP)

clean:
	rm -rf .venv .venv-newest build dist *.egg-info
