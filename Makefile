# `make train` and `make test` do all their own set-up; they need python3 (3.11 to 3.13), make and the network's package index.
PYTHON ?= python3
BIN := .venv/bin

QUICK := $(addprefix tests/,advantages objectives transitions statistics sampling test_doors.py test_images.py)

.PHONY: train test quick lint browser clean
train: .venv/ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no trainers/flow_grpo.py $(ARGS)

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The rooms of pure functions and what holds them together, in under a minute: for the inner loop.
quick: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -x -m "not slow" $(QUICK) $(ARGS)

# Debian's Chromium, in which the workbench is tested; where it cannot be had, those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || { timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || echo "chromium: could not be installed; the tests in a browser will be skipped"

# Types are checked in the layout of an installed wheel, or visalign.rewards would be unknown to all who import it.
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/visalign
	ln -s $(CURDIR)/visalign/* $(CURDIR)/rewards $(CURDIR)/trainers $(CURDIR)/demos build/types/visalign/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --package visalign

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable .[dev]
	touch $@

clean:
	rm -rf .venv build *.egg-info
