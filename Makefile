# `make demo` on a bare machine (Linux, Python 3.11 or newer, git, make) does everything itself.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help install demo serve weights test test-all test-edge test-playground edge-types parity-clicks screenshots chaos soak check fix bench parity bento audit pins

BIN := .venv/bin
# Set on make's command line alone: some systems export HOST, and that must not open the service to the network.
PORT = 8000
HOST = 127.0.0.1
export BENTOML_DO_NOT_TRACK ?= true
# Reach recipes through the environment, as typed: no quoting can go wrong, and a $ is not make's.
override IMAGE := $(value IMAGE)
override PROMPT := $(value PROMPT)
export IMAGE PROMPT PYTHON

help: ## What there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

install: ## .venv with the pinned packages; every target below does this first
	@scripts/setup.sh

demo: install ## Segment examples/shapes.jpg through the real API (IMAGE=photo.jpg PROMPT="blue square")
	@$(BIN)/python examples/demo.py

serve: install ## The service on http://127.0.0.1:8000 (HOST=, PORT=)
	@$(BIN)/python scripts/check_port.py $(HOST) $(PORT)
	@exec $(BIN)/bentoml serve service:S3Backend --host $(HOST) --port $(PORT)

weights: install ## Fetch the real SAM3 (3.4 GB, gated: HF_TOKEN) into weights/sam3
	@$(BIN)/python -m sam3_runner fetch $(ARGS)

test: install ## The tests (ARGS="-k urls" for some of them)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --ignore=tests/chaos --ignore=tests/edge --ignore=tests/playground -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-all: install ## The slow ones too
	@$(BIN)/python -m pytest $(ARGS)

test-edge: install ## The Edge's client and Worker, end to end in the Workers runtime (Node 20)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/edge $(ARGS)

test-playground: install ## The playground in a real browser (installs Debian's Chromium if it may)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/playground $(ARGS)

edge-types: install ## The TypeScript types of the API anew
	@$(BIN)/python -m tests.edge.schema

parity-clicks: install ## Clicks compared with those of Meta's own code, full size (ARGS=--reduced: small)
	@$(BIN)/python -m bench.parity_clicks $(ARGS)

screenshots: install ## The pictures of the playground
	@$(BIN)/python -m tests.playground.screenshots

CHAOS = full
chaos: install ## Kill it, cut it off, fill its disk, and count what is lost: 15 minutes (CHAOS=small: 4; see tests/chaos)
	@CHAOS=$(CHAOS) CHAOS_TABLE=$(if $(filter full,$(CHAOS)),bench/results/chaos) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/chaos $(ARGS)

soak: install ## Half an hour at twice what it can do (ARGS="--minutes 3" for less)
	@$(BIN)/python -m bench.soak $(ARGS)

check: install ## Lint, format, types, import directions; writes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_import_directions.py

fix: install ## Mend what lint and format can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install ## All that is measured, half an hour (ARGS="model service" for some of it)
	@$(BIN)/python -m bench $(ARGS)

parity: install ## Answers compared with those of Meta's own code, full size, on a CPU (ARGS=--reduced: small)
	@$(BIN)/python -m bench.parity $(ARGS)

bento: install ## Build the bento
	@$(BIN)/bentoml build

audit: install ## Known vulnerabilities of the pinned packages, as PyPI tells them
	@$(BIN)/uv tool run pip-audit==2.10.1 --requirement requirements.txt --require-hashes --disable-pip --progress-spinner off $(ARGS)

# The pins in place are kept where they still fit: `make pins ARGS=--upgrade`, or ARGS="-P httpx", for newer ones.
COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --annotation-style line
pins: ## requirements*.txt anew from requirements*.in
	@$(BIN)/uv $(COMPILE) $(ARGS) requirements.in -o requirements.txt
	@$(BIN)/uv $(COMPILE) $(ARGS) requirements-dev.in -o requirements-dev.txt
	@$(BIN)/uv $(COMPILE) $(ARGS) requirements-parity.in -o requirements-parity.txt
