"""What a trained token is worth: accuracy against the number of tokens that are trained on.

    python experiments/budget.py --run runs/qa --limit 48       # -> results/qa_budget.json

Each way of learning a held-out passage, at several numbers of optimiser steps (a step is a row of
up to --row-len tokens):
    passage     the passage alone
    untrained   and one self-edit of the untrained model
    pooled      and the notes of --samples of its self-edits
    seal-K      and one self-edit of the policy after round K of --run, or of --policy
    told        and notes that ask the quiz's own questions: the ceiling of notes
All with the same learning rate. "at_half" says for each seal-K: with at most half of the trained
tokens that the untrained notes take to their best accuracy, how much better or worse it is than
that best, on the same passages.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import counts, load_passages
from inner import lora_config, sft_config
from lm.adapters import load_adapter
from lm.files import GOES_ON, chunks, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap
from lm.log import Log
from lm.runs import add_ladder_flags, find_policies, open_run, policy_digests, set_outputs
from lora import merged
from reward import (
    accuracy_of,
    passage_candidate,
    pooled,
    populations,
    quiz_candidates,
    refuse_training_passages,
    told,
    update_and_quiz,
)
from selfedit import settle, write_self_edits

OUT = "results/qa_budget.json"


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "heldout", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--samples", type=at_least(2), default=4, help="self-edits that are pooled")
    numbers = {"type": at_least(1), "nargs": "+", "default": [4, 8, 16, 32, 64]}
    add("--step-counts", **numbers, help="numbers of optimiser steps")
    add_ladder_flags(parser, "qa", OUT)
    parser.set_defaults(lr=8e-3, learner="base", settings=False)
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["steps", "epochs"], "beside --step-counts")
    args.out = args.out or OUT
    return set_outputs(args, OUT)


def notes_of(model, tok, passages, policies: dict, args, work: Path) -> dict:
    """{row: [the notes of each passage]}."""
    seed, found = sub_seed(args.seed, 0), {"passage": [()] * len(passages)}

    def write(copies, name):
        log = work / f"{name}-sampled.jsonl"
        edits = write_self_edits(model, tok, passages, copies, args, seed, log, f"{name} sample")
        return chunks([tuple(e.notes) for e in edits], copies)

    several = write(args.samples, "untrained")
    found["untrained"] = [own[0] for own in several]
    found["pooled"] = [pooled(own) for own in several]
    for name, folder in policies.items():
        with merged(model, load_adapter(model, folder)):
            found[name] = [own[0] for own in write(1, name)]
    return found | {"told": [told(p) for p in passages]}


def measure(model, tok, passages, policies: dict, args, work: Path) -> tuple[list[dict], dict]:
    """The rows, and {(row, steps): accuracies of the passages}."""
    rows, table, lora = [], {}, lora_config(args, model)
    for name, notes in notes_of(model, tok, passages, policies, args, work).items():
        for steps in args.step_counts:
            config, candidates = replace(sft_config(args), steps=steps), []
            for n, (passage, own) in enumerate(zip(passages, notes, strict=True)):
                candidates.append(passage_candidate(tok, n, passage, own, config))
            log, label = Log(work / f"{name}-{steps}.jsonl", accuracy_of), f"{name} x{steps}"
            how = (lora, sub_seed(args.seed, 1), log, quiz_candidates, label)
            update_and_quiz(model, tok, populations(candidates, args.population), *how)
            table[name, steps] = np.array([accuracy_of(log[c]) for c in candidates])
            row = {"method": name, "steps": steps}
            row["tokens"] = float(np.mean([log[c]["tokens"] for c in candidates]))
            row["accuracy"] = accuracy = float(table[name, steps].mean())
            rows.append(row | {"ci95": bootstrap(table[name, steps], args.seed)})
            print(f"{label:16} {row['tokens']:7.0f} tokens  {100 * accuracy:.1f} %", flush=True)
    return rows, table


def at_half(rows: list[dict], table: dict, seed: int) -> list[dict]:
    """Of each seal-K: its best point within half of the tokens of the untrained notes' best one,
    against that one."""
    best = max((r for r in rows if r["method"] == "untrained"), key=lambda r: r["accuracy"])
    found = []
    for name in dict.fromkeys(r["method"] for r in rows if r["method"].startswith("seal-")):
        own = [r for r in rows if r["method"] == name and 2 * r["tokens"] <= best["tokens"]]
        if not own:
            continue  # every point takes more
        r = max(own, key=lambda r: r["accuracy"])
        delta = table[name, r["steps"]] - table["untrained", best["steps"]]
        about = {"method": name, "tokens": r["tokens"], "of": best["tokens"]}
        found.append(about | {"delta": float(delta.mean()), "ci95": bootstrap(delta, seed)})
    return found


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    policies = find_policies(args, "qa")
    if args.run:
        refuse_training_passages(passages, args)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    free = "out work steps run policy step_counts".split()
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings |= {"data_sha256": digest(args.data), "policies": policy_digests(policies)}
    work = open_run(args.work, settings)
    rows, table = measure(model, tok, passages, policies, args, work)
    head = result_head(args, model) | counts(passages)
    head["settings"] = settings | {"step_counts": args.step_counts}
    write_json(args.out, head | {"rows": rows, "at_half": at_half(rows, table, args.seed)})


if __name__ == "__main__":
    run_main(main, GOES_ON)
