# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/parsit_tiny
WORKERS := -n auto --maxprocesses 4 --dist loadfile

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

# The TPU's and the GPU's compilers of this JAX, for tests that compile for chips that are not here. In a folder of their
# own: JAX would look for such chips, and say that there are none, wherever it could import them.
$(VENV)/.installed-targets: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --target $(VENV)/targets --no-deps --upgrade "$$($(BIN)/python -c \
		'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("jax") if "libtpu" in r))')" \
		$$($(BIN)/python -c 'import jax; print(f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}")') \
		'nvidia-cuda-nvcc==13.*' 'nvidia-nvvm==13.*'
	touch $@

test: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m "not slow and not real_weights" $(WORKERS)

test-slow: $(VENV)/.installed-targets
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/targets $(BIN)/python -m pytest -q -m slow $(WORKERS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
