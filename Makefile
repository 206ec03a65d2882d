# Needs Python >= 3.11 with pip:
#   make demo        pretrain, evaluate, export and use a small BERT (3 minutes on two cores); or MODEL=gpt1, MODEL=elmo
#   make study       compare BERT, GPT-1 and ELMo, from text to a page (half an hour; docs/study.md)
#   make test        lint, types and tests (11 minutes on two cores)
#   make test-slow   the tests that compile for pods, kill often or start many processes

PYTHON ?= python3
MODEL ?= bert
RUN = runs/$(MODEL)-demo
EXPORTED = $(RUN)-exported
PRELM = .venv/bin/prelm

# Test sets, and Simple English Wikipedia to train on if it is there.
DATA = $(or $(PRELM_DATA),data)
STUDY_CORPUS ?= $(firstword $(wildcard $(DATA)/pretrain/simplewiki.txt.xz) python-docs)
PYTEST = .venv/bin/python -m pytest --numprocesses auto --dist worksteal --durations 10

# Large pages for large arrays: XLA on a Linux CPU spends up to a sixth of its time in page faults otherwise.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: demo use-bert use-gpt1 use-elmo study lint test test-slow format

demo: .venv/installed
	$(PRELM) pretrain $(MODEL):demo
	$(PRELM) export $(RUN) $(EXPORTED)
	@$(MAKE) --no-print-directory use-$(MODEL)

use-bert:
	$(PRELM) fill $(EXPORTED) "If the [MASK] is empty, an error is raised."
	$(PRELM) fill $(EXPORTED) "Return a new [MASK] with the same elements."

use-gpt1:
	$(PRELM) generate $(EXPORTED) --prompt "If the list is empty," --max-tokens 40 --temperature 0.7
	$(PRELM) generate $(EXPORTED) --prompt "Return a new" --max-tokens 40 --temperature 0.7

use-elmo:
	.venv/bin/python examples/neighbors.py $(EXPORTED) --word set --sentences \
		"A set is an unordered collection with no duplicate elements." "The flag is set if the call fails."

study: .venv/installed-study
	.venv/bin/python examples/comparison.py --small --words 1000000 --corpus $(STUDY_CORPUS) --corpus-words 3000000 \
		--data $(DATA)/study --pairs 20 --output runs/study

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check

test: lint
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-test
	$(PYTEST) -m slow

format: .venv/installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml setup.py constraints.txt
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-study: .venv/installed
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[study]"
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
