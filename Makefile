PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow zoo clean

# The stamp is newer than what it was installed from, or the installation runs again.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/fitsmall train experiment=deep_compression

test: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=25

test-slow: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# timm by itself, since its registration asks for torchvision, which its networks do not use.
zoo: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[zoo]'
	$(BIN)/python -m pip install --quiet --no-deps 'timm>=1.0.20'
	$(BIN)/python -m fitsmall.experiments.zoo --output docs/zoo.md $(ZOO)

clean:
	rm -rf .venv runs build
