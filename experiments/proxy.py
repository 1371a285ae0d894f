"""What is --reward proxy worth? Does what a part of a self-edit earned by it go with what it earned
by study?

    python train_outer.py qa --out runs/studied --limit 24 --rounds 1 --samples 4
    python experiments/proxy.py --limit 24 --work runs/studied/round-1
                                                        # -> results/proxy.json

Of the self-edits that a round with --reward accuracy scored: credits and the proxy, part by part,
both as differences from the mean of the same part of the passage's self-edits. "slope" is accuracy
per unit of the proxy, "correlation" theirs, each with a bootstrap interval over passages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
from data.qa import counts, load_passages
from lm.files import check_output, digest, run_main, write_json
from lm.flags import Parser, add_model_flags, load, result_head
from lm.intervals import of_sums
from reward import by_sentence, proxy_scores
from selfedit import SelfEdit, read_edits


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--work", required=True, help="a round's folder of train_outer.py, with candidates.jsonl")
    add("--out", default="results/proxy.json", help="result file")
    return parser.parse_args()


def compare(passages, edits: list[SelfEdit], seed: int) -> dict:
    sums, parts = [], 0  # sums per passage: of x * x, x * y and y * y
    for p in passages:
        own = [e for e in edits if e.passage == p.id]
        if any(part.style == "settings" for e in own for part in e.parts):
            raise SystemExit(
                "error: --work is a round with --settings, whose parts are not sentences"
            )
        told = [by_sentence(p, proxy_scores(p, e.notes)) for e in own]
        xx = xy = yy = 0.0
        for k in range(len(own[0].parts) if own else 0):
            if told[0][k] is None:
                continue  # nothing is asked about this sentence
            x, y = np.array([t[k] for t in told]), np.array([e.parts[k].credit for e in own])
            x, y = x - x.mean(), y - y.mean()
            xx, xy, yy = xx + x @ x, xy + x @ y, yy + y @ y
            parts += len(own)
        sums.append([xx, xy, yy])
    return {
        "n_parts": parts,
        "slope": of_sums(lambda s: s[1] / s[0], sums, seed),
        "correlation": of_sums(lambda s: s[1] / np.sqrt(s[0] * s[2]), sums, seed),
    }


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages, log = load_passages(args.data, args.split, args.skip, args.limit), Path(args.work)
    if not (log / "candidates.jsonl").is_file():
        raise SystemExit(f"error: --work {log}: no candidates.jsonl there; give a round's folder")
    edits = read_edits(log / "candidates.jsonl")
    result = compare(passages, edits, args.seed)
    print(result)
    model, _ = load(args)
    settings = vars(args) | {"data_sha256": digest(args.data)}
    write_json(
        args.out, result_head(args, model) | counts(passages) | {"settings": settings} | result
    )


if __name__ == "__main__":
    run_main(main)
