"""What did RL change in the notes? Measures of the self-edits that an eval_qa.py ladder sampled,
per method.

    python experiments/notes.py --limit 48 --work runs/eval-qa_ladder/climb-0
                                                                        # -> results/notes.json

A word counts if it has four letters or a digit:
    tokens       length
    covered      share of the passage's words that occur in the notes
    repeats      share of the notes with 80 % of their words in one earlier note (identical ones go
                 before, in parse())
    unsupported  share of the notes with less than 60 % of their words in the passage and its title
    copied       share of the notes that name someone or something of the prompt's worked example
    told         share of the quiz's questions with an accepted answer in the notes (the model never
                 saw these questions)
    proxy        do the notes ask what the quiz asks? closest_question() in reward.py, the mean over
                 the quiz
Where a note quotes a sentence of the passage as its answer, repeats and unsupported look at its
question only; covered and told count the quoted sentence, so that one note per sentence makes them
1, and proxy is what is left to learn. "changes" compares each method with the first one, on the
same passages; "examples" are the first, middle and last passage, with each method's first
self-edit.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
from data.qa import Passage, counts, load_passages
from data.text import sentences
from lm.files import check_output, digest, run_main, write_json
from lm.flags import Parser, add_model_flags, load, result_head
from lm.intervals import bootstrap, paired_steps
from quiz import score_answer
from reward import proxy_scores, words
from selfedit import QA_PAIR, copies_example, read_edits

MEASURES = ("tokens", "notes", "covered", "repeats", "unsupported", "copied", "told", "proxy")


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    data.qa.add_flags(parser, "heldout", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--work", required=True, help="a climb of an eval_qa.py ladder, with *-sampled.jsonl")
    add("--out", default="results/notes.json", help="result file")
    return parser.parse_args()


def measure(tok, p: Passage, text: str, notes: list[str]) -> dict:
    """The measures of one self-edit; shares of no notes are 0."""
    texts, own, each = sentences(p.text), words(p.text), []
    for note in notes:
        pair = QA_PAIR.fullmatch(note)
        each.append(words(pair[1] if pair and pair[2] in texts else note))
    each = [w for w in each if w]
    repeats = []
    for i, w in enumerate(each):
        repeats.append(any(len(w & earlier) >= 0.8 * len(w) for earlier in each[:i]))
    unsupported = [len(w & (own | words(p.title))) < 0.6 * len(w) for w in each]
    copied = [copies_example(n, p.text) for n in notes]
    said = " ".join(notes)
    return {
        "tokens": len(tok.encode(text)),
        "notes": len(notes),
        "covered": len(own & words(said)) / len(own) if own else 0.0,
        "repeats": float(np.mean(repeats)) if each else 0.0,
        "unsupported": float(np.mean(unsupported)) if each else 0.0,
        "copied": float(np.mean(copied)) if notes else 0.0,
        "told": float(np.mean([score_answer(said, q.answers)["accuracy"] for q in p.questions])),
        "proxy": float(np.mean(proxy_scores(p, notes))),
    }


def compare(tok, passages, logs: list[Path], seed: int) -> dict:
    by_id, rows, examples, means = {p.id: p for p in passages}, [], {}, {}
    for log in logs:
        method = log.name.removesuffix("-sampled.jsonl")
        edits = read_edits(log)
        edits = [e for e in edits if e.passage in by_id]
        measured = {p.id: [] for p in passages}
        for e in edits:
            text = "\n".join(part.text for part in e.parts)
            measured[e.passage].append(measure(tok, by_id[e.passage], text, e.notes))
        row = {"method": method, "n": len(edits)}
        for key in MEASURES:
            of_passage = lambda own, key=key: np.mean([m[key] for m in own])  # noqa: E731
            values = means[method, key] = np.array(list(map(of_passage, measured.values())))
            row |= {key: float(values.mean()), f"{key}_ci95": bootstrap(values, seed)}
        rows.append(row)
        shown = {
            k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items() if "ci95" not in k
        }
        print("  ".join(f"{k} {v}" for k, v in shown.items()))
        for p in (passages[0], passages[len(passages) // 2], passages[-1]):
            example = examples.setdefault(p.id, {"title": p.title, "passage": p.text})
            example[method] = "\n".join(next(e.notes for e in edits if e.passage == p.id))
    changes, (first, *others) = [], [r["method"] for r in rows]
    for key in MEASURES:
        values = {r["method"]: means[r["method"], key] for r in rows}
        steps = paired_steps(values, [(first, m) for m in others], seed)
        changes += [step | {"measure": key} for step in steps]
    return {"rows": rows, "changes": changes, "examples": list(examples.values())}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    logs = sorted(Path(args.work).glob("*-sampled.jsonl"))
    if not logs:
        raise SystemExit(
            f"error: --work {args.work}: no *-sampled.jsonl there; give a climb of a ladder, "
            "without --settings"
        )
    model, tok = load(args)
    result = compare(tok, passages, logs, args.seed)
    settings = vars(args) | {"data_sha256": digest(args.data)}
    write_json(
        args.out, result_head(args, model) | counts(passages) | {"settings": settings} | result
    )


if __name__ == "__main__":
    run_main(main)
