"""The best single way to study passages: what a policy that chooses for each passage must beat.

    python experiments/grid.py --count 16           # -> results/grid.json

On training passages, with one self-edit of the untrained model on each: its notes are studied under
--count settings, the same for all passages. The first six are the worked examples of the prompt
that asks for settings; the others are drawn at random from the range of those, with --seed. A fair
--count is what RL was given: rounds x samples, since RL studies each passage so many times.

"best" has the settings with the highest accuracy; eval_qa.py --settings --fixed reads it. What does
not fit --budget tokens is cut to fewer epochs, or answers nothing, as in train_outer.py --settings.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
import selfedit
from data.qa import counts, load_passages
from inner import lora_config
from lm.files import GOES_ON, check_output, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap
from lm.log import Log
from lm.runs import open_run
from reward import (
    RESULT,
    accuracy_of,
    edit_candidate,
    populations,
    quiz_candidates,
    update_and_quiz,
)
from selfedit import DATA, LOSS, TOOLS, WORKED, settings_of, settle, write_self_edits

RATES = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012)
EPOCHS = (1, 2, 3, 5, 8, 12, 20)


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    selfedit.add_settings_flags(parser)
    add = parser.add_argument_group("experiment").add_argument
    add("--count", type=at_least(1), default=16, help="settings to try")
    add("--work", default="runs/grid", help="folder for progress, to resume a killed run")
    add("--out", default="results/grid.json", help="result file")
    parser.set_defaults(settings=True)
    args = settle(parser.parse_args())
    told = "settings say how, with notes in all styles"
    refuse_unused(parser, args, ["style", "lr", "steps", "epochs"], f"here: {told}")
    return args


def to_try(count: int, seed: int) -> list[dict]:
    """The worked examples' settings, then others, drawn at random; each once."""
    rng, found = np.random.default_rng(seed), [settings for _, _, settings in WORKED]
    while len(found) < count:
        data = [name for name in DATA if rng.random() < 0.5]
        tools = [int(rng.integers(most + 1)) * int(rng.integers(2)) for _, most in TOOLS.values()]
        how = (str(rng.choice(LOSS)), float(rng.choice(RATES)), int(rng.choice(EPOCHS)))
        settings = settings_of(data, *tools, *how)
        if any([data, *tools]) and settings not in found:
            found.append(settings)
    return found[:count]


def measure(model, tok, passages, args, work: Path) -> dict:
    seed = sub_seed(args.seed, 0)
    log, all_notes = work / "sampled.jsonl", {"data": list(DATA)}
    edits = write_self_edits(model, tok, passages, 1, args, seed, log, given=all_notes)
    rows, lora, seed = [], lora_config(args, model), sub_seed(args.seed, 1)
    for k, settings in enumerate(to_try(args.count, args.seed)):
        candidates = []
        for n, (passage, e) in enumerate(zip(passages, edits, strict=True)):
            e = replace(e, settings=settings)
            candidates.append(edit_candidate(tok, n, passage, e, args, seed)[0])
        log = Log(work / f"{k}.jsonl", accuracy_of, needed=RESULT)
        groups = populations([c for c in candidates if c], args.population)
        label = f"settings {k + 1}/{args.count}"
        update_and_quiz(model, tok, groups, lora, seed, log, quiz_candidates, label)
        accuracy = np.array([accuracy_of(log[c]) if c else 0.0 for c in candidates])
        tokens = float(np.mean([log[c]["tokens"] if c else 0 for c in candidates]))
        row = {"settings": settings, "accuracy": float(accuracy.mean())}
        rows.append(row | {"ci95": bootstrap(accuracy, args.seed), "tokens": tokens})
        print(f"{100 * row['accuracy']:5.1f} %  {tokens:6.0f} tokens  {json.dumps(settings)}")
    best = max(rows, key=lambda row: row["accuracy"])
    return {"rows": rows, "best": best["settings"]}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    # More settings may be tried later: the first ones stay the same.
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "count")}
    work = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model)
    result = measure(model, tok, passages, args, work)
    head = result_head(args, model) | counts(passages) | {"settings": vars(args)}
    write_json(args.out, head | result)


if __name__ == "__main__":
    run_main(main, GOES_ON)
