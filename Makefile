# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/parsit_tiny

# With 4 KiB pages the kernel spends a fifth of a training step on handing XLA its buffers (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow lint clean

# One stamp per set of extras, so that `make demo` does not install PyTorch and a second call installs nothing.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-cpu: setup.py | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cpu]'
	touch $@

$(VENV)/.installed-test: setup.py | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cpu,test]'
	touch $@ $(VENV)/.installed-cpu

demo: $(VENV)/.installed-cpu
	JAX_PLATFORMS=cpu $(BIN)/python train.py --config configs/parsit_tiny.yaml
	JAX_PLATFORMS=cpu $(BIN)/python eval.py --checkpoint $(RUN)

# The TPU compiler of this JAX, for tests that compile for chips that are not here. In a folder of its own: JAX on a
# machine without TPUs would look for them, and say so, wherever it could import it.
$(VENV)/.installed-libtpu: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --target $(VENV)/libtpu "$$($(BIN)/python -c \
		'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("jax") if "libtpu" in r))')"
	touch $@

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m "not slow and not real_weights" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.installed-libtpu
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
