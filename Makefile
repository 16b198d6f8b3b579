# Two front doors, each doing all set-up from nothing: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.11.*
TRANSFORMERS ?= transformers==5.17.*
VENV := .venv
BIN := $(VENV)/bin
NEWEST := build/newest-transformers
# The stamp names what was asked for, so that another TORCH or TRANSFORMERS is installed.
INSTALLED := $(VENV)/.installed-$(shell printf '%s+%s' '$(TORCH)' '$(TRANSFORMERS)' | tr -c 'A-Za-z0-9.+' '-')
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench lint format clean

demo: $(VENV)/.built
	$(BIN)/rtpurbo demo $(if $(FAST),--fast) $(if $(MODEL),--model $(MODEL)) $(if $(OUT),--output $(OUT))

test: $(VENV)/.test-ready $(NEWEST)/.installed
	$(BIN)/python -m pytest
	PYTHONPATH=$(CURDIR)/$(NEWEST) $(BIN)/python -m pytest -m families

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

lint: $(VENV)/.lint-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.lint-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Debian packages are installed only when what they bring is missing.
$(INSTALLED): pyproject.toml
	@PYTHON=$(PYTHON) sh tools/debian_packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "$(TORCH)" "$(TRANSFORMERS)" "setuptools>=77" wheel
	$(BIN)/pip install -q "cmake>=3.26" ninja "pybind11>=2.13"
	rm -f $(VENV)/.installed-*
	touch $@

$(VENV)/.built: $(INSTALLED) setup.py CMakeLists.txt $(shell find csrc cmake -type f)
	$(BIN)/pip install -q --no-build-isolation -e ".[demo]"
	touch $@

# The same build folder, so that only what the tests need comes on top.
$(VENV)/.test-ready: $(VENV)/.built $(shell find tests/cpp -type f)
	@PYTHON=$(PYTHON) sh tools/debian_packages.sh catch2
	RTPURBO_TESTS=1 $(BIN)/pip install -q --no-build-isolation -e ".[demo,train,plots,notebooks,dev]"
	touch $@

$(VENV)/.lint-ready: $(VENV)/.built
	@PYTHON=$(PYTHON) sh tools/debian_packages.sh clang-format
	$(BIN)/pip install -q ruff mypy
	touch $@

# The model families are tested on the floor of transformers and on its newest release.
$(NEWEST)/.installed: $(INSTALLED)
	$(BIN)/pip install -q --upgrade --target $(NEWEST) transformers
	touch $@

clean:
	rm -rf $(VENV) build out rtpurbo/lib rtpurbo/include rtpurbo/share rtpurbo/_C*.so
