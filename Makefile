# What a user types: `make run` and `make test`. Everything lands in .venv and store/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run ui test test-fast lint clean

setup: .venv/.installed

# Exact versions from the lock file first; the project itself then needs nothing from the network. Where there is a GPU,
# the attention kernels that the measured speeds are of come last.
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@if command -v nvidia-smi >/dev/null; then $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[gpu]'; fi
	touch $@

run: setup
	@$(BIN)/gpt2 run

ui: setup
	@$(BIN)/gpt2 ui

# Two files at a time: most of the slow tests wait for processes that they have started. A test that hangs ends it all.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
