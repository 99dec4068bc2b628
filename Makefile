# make demo | test | bench | lint | gates; each sets up .venv first if it has to.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint format bench gates clean

demo: $(READY)
	$(BIN)/mrl-fast demo --out demo-out

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

bench: $(READY)
	$(BIN)/pytest benchmarks

gates: $(READY)
	$(BIN)/python benchmarks/static_gates.py

# Rebuilt when what is installed changes; Python sources are used in place.
$(READY): pyproject.toml constraints.txt setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info mrl_fast/*.so demo-out
