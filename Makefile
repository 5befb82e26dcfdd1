# make demo | test | lint | bench | gpu | sanitize: each sets itself up in .venv, once.
.PHONY: demo test lint bench gpu sanitize clean
.DEFAULT_GOAL := test
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV := .venv
RECORD ?=
RECORDED = $(if $(RECORD),--record $(RECORD))  # make bench RECORD=bench/results/NAME.jsonl
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
HAS_SETUPTOOLS := import setuptools as s; assert tuple(map(int, s.__version__.split(".")[:2])) >= (70, 1)
# Imported by the target; what is there is left alone, so a machine without network is served too.
# setuptools >= 70.1 brings what it needs of packaging and wheel itself, and torch its packaging.
BUILD := setuptools ninja pybind11
RUN := pytest pytest_benchmark numpy
EXTRA := hypothesis xdist sklearn matplotlib rich
# A file a worker: what one builds for its tests is built once.
WORKERS := -n auto --maxprocesses 4 --dist loadfile
LINT := ruff mypy clang_format pre_commit
SOURCES := setup.py pyproject.toml lwkd/_version.py $(wildcard csrc/* csrc/cuda/*)

demo: $(VENV)/examples
	$(PY) -m lwkd demo

test: $(VENV)/examples
	$(PY) -m pytest $(WORKERS)
	$(PY) -m pytest bench --benchmark-only --quick -q

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/**/*.cu' 'csrc/**/*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy

# Everything that needs a GPU: correctness, then time. A skipped GPU test is a failure.
gpu: $(VENV)/built
	LWKD_REQUIRE_GPU=1 $(PY) -m pytest -m gpu
	LWKD_REQUIRE_GPU=1 $(PY) -m pytest bench --benchmark-only -m gpu $(RECORDED)

bench: $(VENV)/built
	$(PY) -m pytest bench --benchmark-only $(RECORDED)

# The CPU kernels under AddressSanitizer and UBSan: every test that runs them, on a second build.
sanitize: $(VENV)/examples
	./tests/sanitize.sh $(PY) $(WORKERS)

clean:
	rm -rf $(VENV) build dist out lwkd.egg-info lwkd/*.so

# --- set-up ------------------------------------------------------------------------------------

# `need` installs the modules that are not importable: $(call need,modules)
MISSING = $$($(PY) -c 'import importlib.util as u, sys; n = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}; \
	print(*(n.get(m, m.replace("_", "-")) for m in sys.argv[1:] if u.find_spec(m) is None))' $(1))
need = missing="$(call MISSING,$(1))"; test -z "$$missing" || $(PIP) -c requirements-dev.txt $$missing

# Bytecode on all cores, where pip would use one; some files that packages carry do not compile.
# Of the venv's own packages only pip stays: Python 3.11's setuptools is old, and would hide yours.
$(VENV)/torch:
	if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
		$(PY) -m pip uninstall --quiet --yes setuptools; \
		$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
			> $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth; \
	else \
		$(PYTHON) -m venv $(VENV); \
		$(PIP) --no-compile -r requirements-dev.txt; \
		$(PY) -m compileall -q -q -j 0 $(VENV)/lib || true; \
	fi
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(call need,$(BUILD) $(RUN))
	$(PY) -c '$(HAS_SETUPTOOLS)' 2>/dev/null \
		|| $(PIP) -c requirements-dev.txt --upgrade setuptools
	$(PIP) --no-build-isolation --no-deps --no-index -e .
	touch $@

$(VENV)/examples: $(VENV)/built
	$(call need,$(EXTRA))
	touch $@

$(VENV)/lint: $(VENV)/torch
	$(call need,$(LINT))
	touch $@
