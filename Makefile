# make demo: everything from nothing to a trained and measured model, with a report of it.   make test: the tests.
# make test-ui: those of the pages, in Chromium, which has to be installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Files are compiled once, where an environment would have each process do it.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-all test-ui clean

demo: $(VENV)/installed
	$(BIN)/python -m miniclip shapes data/shapes
	$(BIN)/python train.py recipes/demo.json --overwrite_output_dir
	$(BIN)/python evaluate.py --model runs/demo --eval_file data/shapes/eval.json --report runs/demo
	$(BIN)/python -m miniclip scene_quiz --model runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow or not slow"

# MINICLIP_UI: what is missing is a failure here, and no reason to skip. -n 0: one server and one browser for all.
test-ui: $(VENV)/installed-ui
	MINICLIP_UI=1 $(BIN)/python -m pytest -n 0 tests/page/test_app.py tests/learn/test_clip_page.py

$(VENV)/installed-ui: requirements-ui.txt $(VENV)/installed
	$(BIN)/python -m pip install --requirement requirements-ui.txt "playwright>=1.50"
	touch $@

$(VENV)/installed: requirements.txt requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --requirement requirements.txt --requirement requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) data/shapes runs/demo
