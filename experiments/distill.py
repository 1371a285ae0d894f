"""Is it better to learn what a teacher expects than what a note says?

    python experiments/distill.py --limit 24        # -> results/distill.json

On training passages, with one self-edit of the untrained model on each, all in the same steps. The
teacher is the base model with the passage in view: of each token of a note's answer it says which
others could stand there (its fifty most likely ones), and how likely. Rows, by --shares:
    0     the notes' own tokens: hard labels, as everywhere else
    0.5   the mean of both
    1     what the teacher expects alone (context distillation, arXiv 2209.15189)
"against_hard" is on the same passages.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import Passage, counts, load_passages
from inner import lora_config, sft_config
from lm.files import GOES_ON, check_output, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap
from lm.packing import Example
from lm.runs import open_run
from lm.tokenizer import Tokenizer
from quiz import quiz_prompt
from reward import (
    accuracy_of,
    expecting,
    passage_candidate,
    passage_examples,
    predictions,
    study,
)
from selfedit import QA_PAIR, settle, write_self_edits


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    about = "how much of what is learnt the teacher says"
    add("--shares", type=at_least(0.0), nargs="+", default=[0.5, 1.0], help=about)
    add("--work", default="runs/distill", help="folder for progress, to resume a killed run")
    add("--out", default="results/distill.json", help="result file")
    parser.set_defaults(lr=8e-3)
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["style"], "here: the notes are questions")
    if max(args.shares) > 1 or min(args.shares) == 0:
        parser.error("--shares are above 0 and at most 1; 0 is always there")
    return args


def in_view(model, tok: Tokenizer, passage: Passage, notes, share: float = 1.0) -> list[Example]:
    """What notes that are questions are learnt from, expecting() what the model does with the
    passage in view (context distillation, arXiv 2209.15189)."""
    students, teachers = [], []
    for note in notes:
        prompt = quiz_prompt(tok, passage.title, QA_PAIR.fullmatch(note)[1], passage.text)
        for e in passage_examples(tok, passage.title, [note]):
            students.append(e)
            teachers.append(Example.reply(prompt, list(e.ids[-sum(e.counts) :])))
    return expecting(students, predictions(model, teachers), share)


def measure(model, tok, passages, args, work: Path) -> list[dict]:
    """The rows."""
    rows, hard, log = [], None, work / "sampled.jsonl"
    edits = write_self_edits(model, tok, passages, 1, args, sub_seed(args.seed, 0), log)
    for share in (0.0, *args.shares):
        candidates = []
        for n, (p, e) in enumerate(zip(passages, edits, strict=True)):
            c = passage_candidate(tok, n, p, e.notes, sft_config(args))
            if share:
                own = passage_examples(tok, p.title, [p.text])
                c = replace(c, examples=own + in_view(model, tok, p, e.notes, share))
            candidates.append(c)
        how = (args, sub_seed(args.seed, 1), work / f"share-{share:g}.jsonl", f"share {share:g}")
        results = study(model, tok, candidates, *how)
        right = np.array(list(map(accuracy_of, results)))
        hard = right if hard is None else hard
        row = {"share": share, "accuracy": float(right.mean()), "ci95": bootstrap(right, args.seed)}
        more = {"delta": float((right - hard).mean()), "ci95": bootstrap(right - hard, args.seed)}
        row["tokens"] = float(np.mean([r["tokens"] for r in results]))
        rows.append(row | {"against_hard": more})
        print(f"share {share:g}: {100 * row['accuracy']:.1f} %", flush=True)
    return rows


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "shares")}
    work = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model)
    head = result_head(args, model) | counts(passages) | {"settings": settings}
    write_json(args.out, head | {"rows": measure(model, tok, passages, args, work)})


if __name__ == "__main__":
    run_main(main, GOES_ON)
