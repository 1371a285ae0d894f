"""Do notes that need no model help, beside the model's own or instead of them?

    python experiments/tools.py --limit 16          # -> results/tools.json

On training passages, in equally many steps for every row (so at about equal trained tokens):
    nothing     the passage alone, or with the untrained model's notes
    orders      + five copies of the passage with its sentences in another order (arXiv 2309.14316)
    masked      + five copies with every other word hidden, to be restored (arXiv 2510.09885)
    clozes      + each sentence asked for by a half of its words, three times (selfedit.py)
    all         + all of these
each without and with the model's own notes. "steps" are the differences from the row without a
tool, on the same passages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import counts, load_passages
from inner import lora_config, sft_config
from lm.files import GOES_ON, check_output, digest, run_main, sub_seed, write_json
from lm.flags import Parser, load, result_head
from lm.intervals import bootstrap, paired_steps
from lm.runs import open_run
from reward import (
    accuracy_of,
    passage_candidate,
    study,
)
from selfedit import clozes, masked, orders, settle, write_self_edits

TOOLS = {
    "nothing": [],
    "orders": [(orders, 5)],
    "masked": [(masked, 5)],
    "clozes": [(clozes, 3)],
    "all": [(orders, 5), (masked, 5), (clozes, 3)],
}


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--tools", nargs="+", default=list(TOOLS), choices=TOOLS, help="rows to make")
    add("--work", default="runs/tools", help="folder for progress, to resume a killed run")
    add("--out", default="results/tools.json", help="result file")
    parser.set_defaults(lr=8e-3, steps=32)  # the best of results/recipes.json
    args = settle(parser.parse_args())
    if not args.steps:
        parser.error("--steps 0: the rows are compared at equal steps")
    if args.tools[0] != "nothing":
        parser.error("--tools: the first one is nothing, which the others are compared with")
    return args


def measure(model, tok, passages, args, work: Path) -> dict:
    log, seed = work / "sampled.jsonl", sub_seed(args.seed, 0)
    edits = write_self_edits(model, tok, passages, 1, args, seed, log)
    table, rows = {}, []
    for written in (False, True):
        for tool in args.tools:
            name, candidates = f"notes+{tool}" if written else tool, []
            for n, (passage, e) in enumerate(zip(passages, edits)):
                notes = list(e.notes) if written else []
                for make, count in TOOLS[tool]:
                    notes += make(passage.text, count, sub_seed(args.seed, 2, n))
                candidate = passage_candidate(tok, n, passage, notes, sft_config(args))
                candidates.append(candidate)
            how = (args, sub_seed(args.seed, 1), work / f"{name}.jsonl", name)
            results = study(model, tok, candidates, *how)
            table[name] = np.array(list(map(accuracy_of, results)))
            tokens = float(np.mean([r["tokens"] for r in results]))
            row = {"row": name, "accuracy": float(table[name].mean())}
            rows.append(row | {"ci95": bootstrap(table[name], args.seed), "tokens": tokens})
            print(f"{name:14} {100 * row['accuracy']:.1f} %  {tokens:.0f} tokens", flush=True)
    pairs = []
    for base in ("nothing", "notes+nothing"):
        pairs += [(base, base.replace("nothing", tool)) for tool in args.tools[1:]]
    return {"rows": rows, "steps": paired_steps(table, pairs, args.seed)}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "tools")}
    work = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model)
    result = measure(model, tok, passages, args, work)
    head = result_head(args, model) | counts(passages) | {"settings": vars(args)}
    write_json(args.out, head | result)


if __name__ == "__main__":
    run_main(main, GOES_ON)
