# The commands of this repository. Each makes its own environment in .venv first, from
# pyproject.toml and constraints.txt, and again whenever one of the two has changed.
#
#   make test     unit tests, then every chapter's cells at the smallest budget: test-units and
#                 test-chapters, of which CHAPTERS=book/04_codebook.md takes one chapter only
#   make book     every chapter executed, the site in _build/html (STRICT=1: warnings are errors)
#   make test-site    the built site in the system's Chromium; build it first
#   make links    a list of the pages' links, _build/links/output.json, with whether each still
#                 answers; those that don't, in output.txt, too
#   make demo     a grid of clips from the shipped model, in demo.mp4
#   make lint     format, lint and type checks
#   make notebooks    chapters as notebooks for Colab, Binder and Jupyter, in _build/published
#   make dist     the wheel and the source archive, in dist/, as a release has them
#   make test-install    the wheel, and notebooks from their first cell, in empty environments;
#                 INSTALL="" takes every notebook
#   make clean    remove what the other commands wrote (not .venv)
#
# PYTHON=python3.12 picks the interpreter that .venv is made with; BUDGET=gpu the book's budget;
# CONSTRAINTS=/dev/null the newest packages.

PYTHON ?= python3
BUDGET ?= cpu
PYTEST_ARGS ?=
CONSTRAINTS ?= constraints.txt
INSTALL ?= wheel or stay or 01_clips or 10_sampling

BIN := .venv/bin
# Two processes of one thread each; a file's tests stay together. PYTEST_ARGS="-n 0" for one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
STAMP := .venv/.installed
EXTRAS := book,test,data,train,evaluate,dev,nvrtc

# Chapters are executed by the kernel of .venv, never by one that the user registered elsewhere.
export JUPYTER_PREFER_ENV_PATH = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

MEDIA := _build/html/media
CHAPTERS := $(sort $(wildcard book/[0-9][0-9]_*.md)) book/own_videos.md
NOTEBOOKS := $(CHAPTERS:book/%.md=_build/notebooks/%.ipynb)

.PHONY: help test test-units test-chapters test-install test-site book links notebooks dist demo lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("tinyvgpt needs Python 3.11 or newer, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	@touch $@

test: test-units test-chapters

test-units: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

test-chapters: $(STAMP) $(NOTEBOOKS)
	TINYVGPT_BUDGET=smoke $(PYTEST) --nbval-lax --nbval-cell-timeout=120 $(NOTEBOOKS)

test-install: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_install.py $(if $(INSTALL),-k '$(INSTALL)')

_build/notebooks/%.ipynb: book/%.md tests/chapter_notebook.py $(wildcard tests/wrong_answers/*.py) $(STAMP)
	@mkdir -p $(@D)
	$(BIN)/python tests/chapter_notebook.py $< $@

book: $(STAMP)
	rm -rf _build/html _build/.doctrees _build/jupyter_execute
	mkdir -p $(MEDIA)
	TINYVGPT_BUDGET=$(BUDGET) TINYVGPT_BOOK_MEDIA='$(CURDIR)/$(MEDIA)' TINYVGPT_BOOK_MEDIA_URL=../media \
		$(BIN)/jupyter-book build . --all $(if $(STRICT),-W --keep-going)
	$(if $(STRICT),@! grep -rnE '<(script|link|img|video|source|iframe)[^>]* (src|href|poster)="(https?:)?//' \
		--include='*.html' _build/html | grep -v 'rel="canonical"' || { echo 'a page loads the above from outside the site'; exit 1; })

$(STAMP)-site: $(STAMP)
	$(BIN)/pip install -q -e '.[site]' -c constraints.txt
	@touch $@

test-site: $(STAMP)-site
	$(BIN)/python -m pytest -m site tests/site $(PYTEST_ARGS)

# The pages as they are written, without executing them. Not a test: other sites come and go.
links: $(STAMP)
	mkdir -p _build
	sed 's/execute_notebooks: force/execute_notebooks: "off"/' _config.yml > _links.yml
	$(BIN)/jupyter-book build . --all --config _links.yml --path-output _build/links --builder linkcheck; \
		status=$$?; rm _links.yml; cp _build/links/_build/html/output.* _build/links/; exit $$status

notebooks: $(STAMP)
	rm -rf _build/published
	$(BIN)/python book/notebooks/convert.py _build/published

dist: $(STAMP)
	$(BIN)/pip install -q -e '.[release]' -c $(CONSTRAINTS)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

demo: $(STAMP)
	$(BIN)/tinyvgpt sample moving-mnist --n 16 --out demo.mp4 \
		--labels 07,18,29,36,45 --temperature 0.9 --top-p 0.95 --guidance 4

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf _build demo.mp4 dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
