# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := numpyro,arviz,plot,progress,data,test,dev

# The tensors here are small: more threads cost more than they give, above all on a busy machine.
export OMP_NUM_THREADS ?= 1

# Test files are shared out over so many processes.
WORKERS ?= 2

.PHONY: demo test test-all lint format bench docs wheel clean

demo: $(VENV)/installed
	$(BIN)/python examples/negative_binomial.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow or not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/semi_implicit.py
	$(BIN)/python benchmarks/importance_weighted.py
	$(BIN)/python benchmarks/discrete.py
	$(BIN)/python benchmarks/vector_quantized.py
	$(BIN)/python benchmarks/cavi.py
	$(BIN)/python benchmarks/logistic_regression.py
	$(BIN)/python benchmarks/compiled.py

docs: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/sphinx-build -W -b html docs docs/_build

wheel: $(VENV)/installed
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist runs docs/_build *.egg-info

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "pyro_vi_ext needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
