# make train          set up, then run the main job (recipe tiny-geneval); make train ARGS="--recipe tiny-ocr"
# make test           set up, then run all tests, the notebooks among them;  make test ARGS="-k geneval"
# make seeds          the table of the README: both recipes, three seeds each
# make stress         kills and damages runs at random for 5 minutes, and says what was lost;  ARGS="--minutes 60"
# make docs           set up, then build the site into build/site: open build/site/index.html
# make setup          the virtual environment alone;  make clean removes it and what tests leave behind, never runs/
#
# Needs make and Python 3.10 or newer with venv. PYTHON=python3.12 chooses one, PIP_FLAGS goes to pip (say, the index of
# PyTorch's small CPU build, for a machine without a GPU).
PYTHON ?= python3
VENV ?= .venv
RECIPES ?= tiny-geneval tiny-ocr
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: train test seeds stress docs setup clean

train: $(STAMP)
	@$(BIN)/python -m vgpo.train $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n 3 --dist worksteal $(ARGS)

seeds: $(STAMP)
	@for recipe in $(RECIPES); do $(BIN)/python benchmarks/seeds.py --recipe $$recipe $(ARGS) || exit; done

stress: $(STAMP)
	@$(BIN)/python tests/stress.py $(ARGS)

docs: $(STAMP)
	@$(BIN)/python docs/site/build.py

setup: $(STAMP)

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: vgpo needs Python 3.10 or newer, \
	this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .coverage _proc
	find . -name __pycache__ -prune -exec rm -rf {} +
