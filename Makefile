# Everything a person or CI does with a checkout. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint types fuzz study one-shot bench hostile deploy figures gpu wheel clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "fedmerge needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install one and name it: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

install: $(STAMP) ## Make .venv and install fedmerge with everything (demo, test and check do it too)

demo: $(STAMP) ## Compare the methods on a small non-IID federation: table, curves, records
	$(BIN)/fedmerge compare simulations/demo.toml --out runs/demo --overwrite

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not study'

check: lint types test ## Lint, format check, types and tests: what CI asks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

fuzz: $(STAMP) ## Search 100,000 damaged replies, files and settings, and 20,000 rounds with a hostile client (half an hour)
	$(BIN)/python -m pytest -q -s tests/fuzz tests/hostile -m study

study: $(STAMP) ## Run the slow studies (minutes; want real data in FEDMERGE_DATA)
	$(BIN)/python -m pytest -m study

one-shot: $(STAMP) ## Run the one-shot comparisons of simulations/ (an hour and more, on real data), and draw them
	for config in simulations/one-shot-*.toml; do \
	  $(BIN)/fedmerge compare $$config --out runs/$$(basename $$config .toml) || exit 1; done
	$(BIN)/python plots/one_shot.py

bench: $(STAMP) ## Measure speed and memory of rounds beside a plain PyTorch loop (minutes; real data in FEDMERGE_DATA)
	$(BIN)/fedmerge bench

hostile: $(STAMP) ## Run the study of hostile clients (minutes, on digits), and draw it
	$(BIN)/python simulations/hostile.py
	$(BIN)/python plots/hostile.py

deploy: $(STAMP) ## Run three methods on a SuperLink and two SuperNodes with TLS, and compare with the simulation (minutes)
	$(BIN)/python simulations/deploy.py simulations/deploy.toml --check --stranger --out runs/deploy

figures: demo ## Draw the README's and the matching page's pictures and tables anew
	$(BIN)/python plots/convergence.py
	$(BIN)/fedmerge compare simulations/matching-digits.toml --out runs/matching-digits --overwrite
	$(BIN)/python plots/matching_digits.py
	$(BIN)/python plots/matching.py

gpu: $(STAMP) ## Check results and speed on this machine's GPU, in eight minutes; without one, say so
	$(BIN)/python benchmarks/gpu.py

wheel: $(STAMP) ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## Remove what was built; records under runs/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
