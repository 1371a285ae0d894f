# Each target sets up what it needs, the virtual environment included, from a bare Python 3.11+.
#   make demo    what a trained policy is worth, then the whole loop in small: minutes
#   make test    linter and tests
#   make bench   speed, side by side with transformers + peft: 25 minutes
#   make results RL by the paper's reward, its ladder and its budget curve: three hours
#   make results-proxy  RL by the proxy, two rounds, their ladders, the figures: two and a half hours
#   make results-arc    the same for ARC: a warm-up, which tasks can be solved, two rounds, the ladder: an hour and a half;
#   make demo-arc       the loop on a few puzzles: ten minutes
#   make torture  are the promises of docs/TRUST.md kept? a quarter of an hour; make mutants: are the tests?
#   make studies what is behind the defaults: hours
# Killed, a target goes on where it was.
# The times are for two cores with bfloat16 units; without, four to five times as long.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo demo-arc test bench results results-proxy results-arc studies mutants torture model data clean
.DELETE_ON_ERROR:

SEAL := --settings --budget 4096
OUTER := --outer weighted --outer-rank 8 --outer-alpha 16 --outer-row-len 2048
POLICY := policies/smollm2-135m-instruct

demo: model
	$(PY) eval_qa.py --policy $(POLICY) $(SEAL) --lr 0.008 --limit 8 --out runs/demo/ladder.json --work runs/demo/ladder
	$(PY) train_outer.py qa $(SEAL) $(OUTER) --limit 4 --samples 4 --rounds 1 --out runs/demo
	$(PY) report.py runs/demo

ARC_DEMO := --tasks results/arc_tasks.json --samples 3 --top-layers 15 --augmented 24
demo-arc: model data
	$(PY) train_outer.py arc $(ARC_DEMO) --limit 3 --rounds 1 --out runs/demo-arc
	$(PY) eval_arc.py $(ARC_DEMO) --limit 2 --run runs/demo-arc --show
	$(PY) report.py runs/demo-arc

test: .venv/dev model downloads/vocab
	$(PY) -m ruff check .
	$(PY) -m pytest

bench: .venv/dev model
	$(PY) bench/speed.py
	$(PY) bench/memory.py --documents 50

results: .venv/dev model data
	$(PY) eval_qa.py --split "" --no-study --out results/passages.json
	$(PY) train_outer.py qa $(SEAL) $(OUTER) --limit 24 --samples 8 --rounds 3 --out runs/seal
	cp runs/seal/metrics.jsonl results/settings_rounds.jsonl
	$(PY) experiments/chosen.py --run runs/seal
	$(PY) experiments/grid.py $(SEAL) --limit 8 --count 12
	$(PY) eval_qa.py --run runs/seal $(SEAL) --lr 0.008 --told --samples 2 --limit 24 --fixed results/grid.json --out results/qa_settings.json
	$(PY) eval_qa.py --policy $(POLICY) $(SEAL) --lr 0.008 --told --policy-notes --fixed results/grid.json --out results/qa_settings_all.json
	$(PY) eval_qa.py --policy $(POLICY) $(SEAL) --lr 0.008 --told --policy-notes --data data/other_hand.json --out results/other_hand.json
	$(PY) experiments/budget.py --policy $(POLICY) $(SEAL) --lr 0.008 --samples 2 --limit 12 --budgets 512 1024 2048 4096
	$(PY) experiments/figures.py

results-proxy: .venv/dev model data
	$(PY) train_outer.py qa --out runs/qa --samples 8 --rounds 2 --outer-epochs 1 --reward proxy --select notes
	cp runs/qa/metrics.jsonl results/qa_rounds.jsonl
	$(PY) eval_qa.py --run runs/qa --limit 48 --samples 2 --seeds 2 --out results/qa_ladder.json
	$(PY) eval_qa.py --run runs/qa --limit 48 --samples 2 --seeds 2 --recipes results/recipes.json --work runs/eval-qa_ladder --out results/qa_ladder_best.json
	$(PY) eval_qa.py --run runs/qa --limit 48 --match epochs --out results/qa_ladder_epochs.json
	$(PY) experiments/notes.py --limit 48 --work runs/eval-qa_ladder/climb-0
	$(PY) experiments/figures.py

ARC := --data downloads/arc/arc2.json
LEARNER := --model checkpoints/smollm2-135m-arc --top-layers 15 --augmented 24
results-arc: .venv/dev model data checkpoints/smollm2-135m-arc
	$(PY) eval_arc.py $(ARC) $(LEARNER) --choose --largest 10 --limit 60 --out results/arc_tasks_warm.json
	$(PY) train_outer.py arc $(ARC) $(LEARNER) --tasks results/arc_tasks_warm.json --out runs/arc --samples 8 --rounds 2 --temperature 1 --select best
	$(PY) eval_arc.py $(ARC) $(LEARNER) --tasks results/arc_tasks_warm.json --run runs/arc --oracle --out results/arc_ladder.json
	$(PY) experiments/figures.py

mutants: .venv/dev model downloads/vocab
	$(PY) tests/mutants.py

torture: .venv/dev model
	$(PY) tests/torture.py

studies: .venv/dev model
	$(PY) train_outer.py qa --out runs/studied --limit 24 --rounds 1 --samples 4
	$(PY) experiments/proxy.py --limit 24 --work runs/studied/round-1
	$(PY) experiments/rewards.py --seeds 2
	$(PY) experiments/credits.py --limit 8 --lr 0.008
	$(PY) experiments/noise.py --limit 32 --samples 2 --seeds 2 --recipe default epochs
	$(PY) experiments/recipes.py --limit 16
	$(PY) experiments/own_texts.py
	$(PY) experiments/router.py
	$(PY) experiments/stream.py
	$(PY) experiments/stream.py --count 32 --rows separate retrieval --work runs/long --out results/long.json
	$(PY) experiments/choice.py --limit 24
	$(PY) experiments/distill.py --limit 24
	$(PY) experiments/many.py --counts 8 24 62 --edits 1 --policy $(POLICY) $(SEAL) --work runs/many --out results/many.json
	$(PY) experiments/ranks.py --limit 12 --ranks 16 8

model: checkpoints/smollm2-135m-instruct
data: downloads/arc

checkpoints/smollm2-135m-instruct: | .venv/run
	$(PY) data/prepare.py smollm2
checkpoints/smollm2-135m-arc: | model data
	$(PY) experiments/warm.py $(ARC) --skip 60
downloads/arc downloads/vocab: | .venv/run
	$(PY) data/prepare.py $(notdir $@)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
.venv/run: requirements.txt data/requirements.txt | .venv/bin/python
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "error: .venv has no pip: install your system's package python3-venv, remove the folder .venv, and make again" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r data/requirements.txt
	@touch $@
.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv checkpoints downloads
