"""How to ask for notes, and how to learn them: prompt style, temperature, layers, learning rate,
steps.

    python experiments/recipes.py --limit 16        # -> results/recipes.json

On training passages, one change at a time from the defaults; each row with its accuracy and seconds
per candidate.
"best" holds, for each way of learning, the learning rate and number of steps with the highest
accuracy: eval_qa.py --recipes reads it. All rows of one method are tried with the same grid, so no
method is tuned more than another.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import counts, load_passages
from inner import lora_config, sft_config
from lm.files import GOES_ON, check_output, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, result_head
from lm.intervals import bootstrap
from lm.log import Log
from lm.runs import open_run
from quiz import mean_scores
from reward import (
    RESULT,
    accuracy_of,
    passage_candidate,
    populations,
    quiz_candidates,
    unrelated,
    update_and_quiz,
)
from selfedit import STYLES, settle, write_self_edits

METHODS = ["passage", "passage+unrelated", "passage+self-edit"]


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("to compare").add_argument
    numbers, counts = {"type": at_least(0.0), "nargs": "+"}, {"type": at_least(1), "nargs": "+"}
    add("--lrs", **numbers, default=[2e-3, 4e-3, 8e-3], help="learning rates")
    add("--step-counts", **counts, default=[8, 16, 32], help="numbers of --steps")
    add("--layers", type=at_least(0), nargs="+", default=[6, 10, 15, 0], help="--top-layers")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="ways of learning to tune")
    add("--styles", nargs="+", default=list(STYLES), choices=STYLES, help="--style")
    add("--temperatures", **numbers, default=[0.4, 0.7, 1.0], help="--temperature")
    add = parser.add_argument_group("experiment").add_argument
    add("--work", default="runs/recipes", help="folder for progress, to resume a killed run")
    add("--out", default="results/recipes.json", help="result file")
    return parser.parse_args()


@dataclass(frozen=True)
class Recipe:
    """One row of the result; its fields are named as the settings."""

    method: str
    style: str
    temperature: float
    top_layers: int
    lr: float
    epochs: int
    steps: int


def recipes(args) -> list[Recipe]:
    """lr x steps for each method, then one change at a time of what is asked for and adapted; each
    row once."""
    default = (args.style, args.temperature, args.top_layers, args.lr, args.epochs, args.steps)
    base, rows = Recipe("passage+self-edit", *default), []
    for method in METHODS:
        for n in args.step_counts:
            rows += [replace(base, method=method, lr=lr, steps=n) for lr in args.lrs]
    rows += [replace(base, style=s) for s in args.styles]
    rows += [replace(base, temperature=t) for t in args.temperatures]
    rows += [replace(base, top_layers=k) for k in args.layers]
    for method in METHODS[::2]:  # the paper's protocol
        for n in (args.epochs, 2 * args.epochs):
            rows.append(replace(base, method=method, epochs=n, steps=0))
    return [r for r in dict.fromkeys(rows) if r.method in args.methods]


def measure(model, tok, passages, recipe: Recipe, args, work: Path) -> dict:
    own = settle(SimpleNamespace(**{**vars(args), **vars(recipe)}))
    notes, titles = [()] * len(passages), [p.title for p in passages]
    if recipe.method != "passage":
        log = work / f"sampled-{recipe.style}-{recipe.temperature:g}.jsonl"
        seed = sub_seed(args.seed, 0)
        edits = write_self_edits(model, tok, passages, 1, own, seed, log, log.stem)
        notes = [tuple(e.notes) for e in edits]
    if recipe.method == "passage+unrelated":
        notes, titles = unrelated(passages, notes)
    config, candidates = sft_config(own), []
    for n, content in enumerate(zip(passages, notes, titles)):
        passage, texts, title = content
        candidates.append(passage_candidate(tok, n, passage, texts, config, title))
    name = "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in vars(recipe).values())
    start, path = time.perf_counter(), work / f"{name}.jsonl"
    timed = not path.is_file()  # else some were learnt before this run was killed and resumed
    log, groups = Log(path, accuracy_of, needed=RESULT), populations(candidates, args.population)
    how = (lora_config(own, model), sub_seed(args.seed, 1), log, quiz_candidates, name)
    update_and_quiz(model, tok, groups, *how)
    seconds = (time.perf_counter() - start) / len(passages)
    results = [log[c] for c in candidates]
    means = [mean_scores(r["answers"]) for r in results]
    accuracy = np.array([m["accuracy"] for m in means])
    return vars(recipe) | {
        "protocol": "steps" if recipe.steps else "epochs",
        "steps": float(np.mean([r["steps"] for r in results])),
        "accuracy": float(accuracy.mean()),
        "ci95": bootstrap(accuracy, args.seed),
        "logprob": float(np.mean([m["logprob"] for m in means])),
        "seconds_per_candidate": seconds if timed else None,
    }


def measure_all(model, tok, passages, args, work: Path) -> dict:
    rows, best = [], {}
    for recipe in recipes(args):
        rows.append(measure(model, tok, passages, recipe, args, work))
        r, default = rows[-1], (args.style, args.temperature, args.top_layers)
        shown = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()]
        print("  ".join(shown), flush=True)
        alike = (recipe.style, recipe.temperature, recipe.top_layers) == default
        if alike and recipe.steps in args.step_counts and recipe.lr in args.lrs:
            found = {"lr": recipe.lr, "steps": recipe.steps, "accuracy": r["accuracy"]}
            if found["accuracy"] > best.get(recipe.method, {"accuracy": -1})["accuracy"]:
                best[recipe.method] = found
    return {"rows": rows, "best": best}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    for k in (args.top_layers, *args.layers):  # complains now rather than after sampling
        lora_config(SimpleNamespace(**vars(args) | {"top_layers": k}), model)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out")}
    work = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model)
    result = measure_all(model, tok, passages, args, work)
    write_json(
        args.out, result_head(args, model) | counts(passages) | {"settings": vars(args)} | result
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
