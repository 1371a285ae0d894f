"""How small may a document's adapter be?

    python experiments/ranks.py --limit 12 --ranks 16 8    # -> results/ranks.json

On training passages, each learnt the way learn.py learns a document (the text, notes by the
untrained model, questions of the text's words, five epochs), with adapters of several ranks.
--alpha is that of the first rank; others are scaled alike, so that alpha / rank is the same. The
quiz is the data file's, not the model's own. "bytes" is one adapter in bfloat16, as a memory keeps
it; "steps" are the differences from the first rank, on the same passages.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import counts, load_passages
from inner import lora_config, sft_config
from lm.files import GOES_ON, check_output, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap, paired_steps
from lm.runs import open_run
from lora import Adapters
from reward import accuracy_of, passage_candidate, pooled, study
from selfedit import clozes, settle, write_self_edits


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    about = "LoRA ranks; the others are compared with the first"
    add("--ranks", nargs="+", type=at_least(1), default=[16, 8, 4], help=about)
    add("--samples", type=at_least(1), default=2, help="self-edits whose notes are pooled")
    add("--work", default="runs/ranks", help="folder for progress, to resume a killed run")
    add("--out", default="results/ranks.json", help="result file")
    parser.set_defaults(steps=0, lr=8e-3, epochs=5)  # as in learn.py
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["rank"], "here: give --ranks")
    args.ranks = list(dict.fromkeys(args.ranks))
    args.rank = args.ranks[0]
    return args


def with_rank(args, rank: int) -> Namespace:
    """The same settings, with another rank and the alpha that goes with it."""
    return Namespace(**vars(args) | {"rank": rank, "alpha": args.alpha * rank / args.rank})


def n_bytes(model, args) -> int:
    """Of one adapter in bfloat16."""
    return 2 * Adapters.init(model, lora_config(args, model), 1, 0).size


def measure(model, tok, passages, args, work: Path) -> dict:
    log, seed = work / "sampled.jsonl", sub_seed(args.seed, 0)
    edits = write_self_edits(model, tok, passages, args.samples, args, seed, log)
    candidates, table, rows = [], {}, []
    for n, passage in enumerate(passages):
        notes = pooled([e.notes for e in edits if e.passage == passage.id])
        notes += tuple(clozes(passage.text, 3, sub_seed(args.seed, 2, n)))
        candidates.append(passage_candidate(tok, n, passage, notes, sft_config(args)))
    for rank in args.ranks:
        own, name = with_rank(args, rank), f"rank-{rank}"
        how = (own, sub_seed(args.seed, 1), work / f"{name}.jsonl", name)
        results = study(model, tok, candidates, *how)
        table[name] = np.array(list(map(accuracy_of, results)))
        tokens = float(np.mean([r["tokens"] for r in results]))
        row = {"row": name, "alpha": own.alpha, "accuracy": float(table[name].mean())}
        row |= {"ci95": bootstrap(table[name], args.seed), "tokens": tokens}
        row["bytes"] = n_bytes(model, own)
        rows.append(row)
        told = f"{100 * row['accuracy']:.1f} %  {row['bytes'] / 1e6:.2f} MB"
        print(f"{name:8} {told}", flush=True)
    first, *others = table
    return {"rows": rows, "steps": paired_steps(table, [(first, r) for r in others], args.seed)}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "ranks")}
    work = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model)
    result = measure(model, tok, passages, args, work)
    head = result_head(args, model) | counts(passages) | {"settings": vars(args)}
    write_json(args.out, head | result)


if __name__ == "__main__":
    run_main(main, GOES_ON)
