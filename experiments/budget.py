"""What a trained token is worth: accuracy against the number of tokens that are trained on.

    python experiments/budget.py --run runs/seal --settings --budget 4096 --limit 48
                                                                    # -> results/qa_budget.json

Each way of learning a held-out passage, within several --budgets of trained tokens:
    passage     the passage alone
    untrained   it and one self-edit of the untrained model
    pooled      it and the notes of --samples of its self-edits
    proxy       it and one self-edit of the --proxy policy (train_outer.py --reward proxy)
    seal-K      it and one self-edit of the policy after round K of --run, or of --policy
    told        it and notes that ask the quiz's own questions: the ceiling of notes
Notes are questions, studied with the same learning rate, in as many optimiser steps as surely fit:
each takes one row of tokens. But with --settings seal-K studies what its self-edit asks for, as it
says, in as many of its epochs as fit; --budget is then the one that its run was trained with. What
does not fit answers nothing.

"at_half" says for each seal-K: with at most half of the trained tokens that the untrained notes
take to their best accuracy, how much better or worse it is than that best, on the same passages.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
import selfedit
from data.qa import counts, load_passages, refuse_training_passages
from inner import lora_config, sft_config
from lm.adapters import load_adapter
from lm.files import GOES_ON, chunks, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap
from lm.log import Log
from lm.packing import arrange, row_tokens
from lm.runs import add_ladder_flags, find_policies, open_run, policy_digests, set_outputs
from lora import merged
from reward import (
    QUESTIONS,
    RESULT,
    Candidate,
    accuracy_of,
    edit_candidate,
    passage_candidate,
    pooled,
    populations,
    quiz_candidates,
    told,
    update_and_quiz,
)
from selfedit import SelfEdit, settle, write_self_edits

OUT = "results/qa_budget.json"


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "heldout", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--samples", type=at_least(2), default=4, help="self-edits that are pooled")
    numbers = {"type": at_least(1), "nargs": "+", "default": [1024, 2048, 4096, 8192]}
    add("--budgets", **numbers, help="most trained tokens")
    selfedit.add_settings_flags(parser)
    reward.add_proxy_flag(parser)
    add_ladder_flags(parser, "qa", OUT)
    parser.set_defaults(lr=8e-3, learner="base")
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["steps", "epochs"], "beside --budgets")
    if not args.settings:
        refuse_unused(parser, args, ["budget"], "without --settings")
    refuse_unused(parser, args, ["style"], "here: the notes are questions")
    args.budgets = sorted(set(args.budgets))
    args.out = args.out or OUT
    return set_outputs(args, OUT)


def ways(model, tok, passages, policies: dict, args, work: Path) -> dict:
    """{row: what each passage is learnt by: notes, or a self-edit that says how it is studied}."""
    seed, found = sub_seed(args.seed, 0), {"passage": [()] * len(passages)}

    def write(copies, name, given=QUESTIONS):
        log = work / f"{name}-sampled.jsonl"
        how = (passages, copies, args, seed, log, f"{name} sample", given)
        return write_self_edits(model, tok, *how)

    several = chunks([tuple(e.notes) for e in write(args.samples, "untrained")], args.samples)
    found["untrained"] = [own[0] for own in several]
    found["pooled"] = [pooled(own) for own in several]
    for name, folder in policies.items():
        says = args.settings and name != "proxy"
        with merged(model, load_adapter(model, folder)):
            edits = write(1, name, None if says else QUESTIONS)
        found[name] = edits if says else [tuple(e.notes) for e in edits]
    return found | {"told": [told(p) for p in passages]}


def candidate(tok, n: int, passage, own, budget: int, args) -> Candidate | None:
    """Of notes, or of a self-edit that says how they are studied; None if not even one step or
    epoch of it fits the budget."""
    if isinstance(own, SelfEdit):
        how = argparse.Namespace(**vars(args) | {"budget": budget})
        return edit_candidate(tok, n, passage, own, how, sub_seed(args.seed, 2))[0]
    c = passage_candidate(tok, n, passage, own, sft_config(args))
    longest = max(row_tokens(c.examples, *row) for row in arrange(c.examples, args.row_len))
    if longest > budget:
        return None
    return replace(c, config=replace(c.config, steps=budget // longest))


def measure(model, tok, passages, policies: dict, args, work: Path) -> tuple[list[dict], dict]:
    """The rows, and {(row, budget): accuracies of the passages}."""
    rows, table, lora = [], {}, lora_config(args, model)
    for name, learnt in ways(model, tok, passages, policies, args, work).items():
        for budget in args.budgets:
            candidates = []
            for n, (passage, own) in enumerate(zip(passages, learnt, strict=True)):
                candidates.append(candidate(tok, n, passage, own, budget, args))
            log = Log(work / f"{name}-{budget}.jsonl", accuracy_of, needed=RESULT)
            label = f"{name} {budget}"
            how = (lora, sub_seed(args.seed, 1), log, quiz_candidates, label)
            groups = populations([c for c in candidates if c], args.population)
            update_and_quiz(model, tok, groups, *how)
            results = [log[c] if c else None for c in candidates]
            table[name, budget] = np.array([accuracy_of(r) if r else 0.0 for r in results])
            row = {"method": name, "budget": budget}
            row["tokens"] = float(np.mean([r["tokens"] if r else 0 for r in results]))
            row["accuracy"] = accuracy = float(table[name, budget].mean())
            rows.append(row | {"ci95": bootstrap(table[name, budget], args.seed)})
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
        delta = table[name, r["budget"]] - table["untrained", best["budget"]]
        about = {"method": name, "tokens": r["tokens"], "of": best["tokens"]}
        found.append(about | {"delta": float(delta.mean()), "ci95": bootstrap(delta, seed)})
    return found


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    policies = find_policies(args, "qa")
    refuse_training_passages(passages, args)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    free = "out work run policy proxy budgets".split()
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings |= {"data_sha256": digest(args.data), "policies": policy_digests(policies)}
    work = open_run(args.work, settings, model)
    rows, table = measure(model, tok, passages, policies, args, work)
    head = result_head(args, model) | counts(passages)
    head["settings"] = settings | {"budgets": args.budgets}
    write_json(args.out, head | {"rows": rows, "at_half": at_half(rows, table, args.seed)})


if __name__ == "__main__":
    run_main(main, GOES_ON)
