# Each target sets up what it needs, the virtual environment included, from a bare Python 3.11+.
#   make demo    the whole loop on a real model, about 15 minutes on two cores
#   make test    linter and tests
#   make bench   speed, side by side with transformers + peft, about 45 minutes on two cores
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test bench model data clean
.DELETE_ON_ERROR:

demo: model
	$(PY) train_outer.py --out runs/demo --limit 16 --samples 3 --rounds 1
	$(PY) eval_qa.py --run runs/demo --limit 16 --out results/demo.json

test: .venv/dev model downloads/vocab
	$(PY) -m ruff check .
	$(PY) -m pytest

bench: .venv/dev model
	$(PY) bench.py

model: checkpoints/smollm2-135m-instruct
data: downloads/arc

checkpoints/smollm2-135m-instruct: | .venv/run
	$(PY) data/prepare.py smollm2
downloads/arc downloads/vocab: | .venv/run
	$(PY) data/prepare.py $(notdir $@)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
.venv/run: requirements.txt data/requirements.txt | .venv/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r data/requirements.txt
	@touch $@
.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv checkpoints downloads
