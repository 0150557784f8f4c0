# Two commands do everything: `make book` and `make test`. Both set up .venv from environment.yml first.
PYTHON ?= python3
PROFILE ?= quick
DEVICE ?= cpu
MINUTES ?=
VENV := .venv
BIN := $(VENV)/bin
# Attack library used by tests only. Its declared need for a plotting server (visdom) does not build
# with current setuptools and is not used here, hence --no-deps.
ATTACKS := adv-lib==0.2.8

# Images of containers often ask Python to keep no compiled modules. Here hundreds of processes import the same ones.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: book rehearse serve pdf check-pages test bench setup lint clean

book: setup
	$(BIN)/python -m lipguide build --profile $(PROFILE) --device $(DEVICE) $(if $(MINUTES),--minutes $(MINUTES))

# What PROFILE=full runs, at the size of a CPU and in a copy: seen to run before a GPU is asked for. DEVICE=cuda is a GPU
# that is not there.
rehearse: setup
	$(BIN)/python -m tests.book.rehearsal --device $(DEVICE) $(if $(MINUTES),--minutes $(MINUTES))

# Read it at http://localhost:8000: opened as a file, a browser refuses the excerpts of search results.
serve:
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

pdf: book
	$(BIN)/python -m lipguide.book.pdf

# What a reader would stumble over in the built pages; in a browser where Chromium is there. It takes minutes, so that
# `make test` leaves it out.
check-pages:
	$(BIN)/python -m pytest -o addopts=-q -rs tests/book/test_html.py

# glibc returns every large tensor to the system at once, and takes the same memory again: a twentieth of the time
# (as for chapters: KEEPS_MEMORY in lipguide/book/execution.py).
test: export MALLOC_MMAP_MAX_ = 0
test: export MALLOC_TRIM_THRESHOLD_ = 2147483647
test: setup
	$(BIN)/ruff check lipguide tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/book/test_html.py

# Seconds and memory of every constraint beside its peers. PROFILE=full: the grid of the chapter "networks".
bench: setup
	LIPGUIDE_BENCH=$(PROFILE) LIPGUIDE_DEVICE=$(DEVICE) $(BIN)/python -m pytest -o addopts=-q tests/benchmarks

setup: $(VENV)/.locked

$(VENV)/.locked: environment.yml pyproject.toml Makefile
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'lipguide needs Python 3.10 or newer; try make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -n "s/^      - '\{0,1\}\([^']*\)'\{0,1\}$$/\1/p" environment.yml > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ATTACKS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -c "import torch, torchvision; b = torch.tensor([[0., 0., 1., 1.]]); \
	  torchvision.ops.nms(b, b.new_ones(1), 0.5)"
	touch $@

lint: setup
	$(BIN)/ruff check lipguide tests
	$(BIN)/ruff format --check lipguide tests

clean:
	rm -rf _build
