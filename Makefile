# make demo: everything from nothing to a trained and measured model, with a report of it.   make test: the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all clean

demo: $(VENV)/installed
	$(BIN)/python -m miniclip.shapes data/shapes
	$(BIN)/python train.py recipes/demo.json --overwrite_output_dir
	$(BIN)/python evaluate.py --model runs/demo --eval_file data/shapes/eval.json --report runs/demo
	$(BIN)/python -m miniclip.scene_quiz --model runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow or not slow"

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

clean:
	rm -rf $(VENV) data/shapes runs/demo
