"""Can a model choose among its own self-edits without anyone's quiz?

    python experiments/choice.py                    # -> results/choice.json

On training passages: --samples self-edits each are studied and asked two quizzes: the passage's, by
whoever wrote the passage, and one that the model wrote itself with the passage in view (quiz.py).
One self-edit of each passage is chosen, by half of the passage's quiz or by the model's own, and
judged by the other half; then with the halves exchanged. Rows:
    mean      the mean self-edit: chosen blindly
    own       chosen by the model's own quiz
    labelled  chosen by the other half of the passage's quiz
    pooled    nothing is chosen: the notes of all are studied together, in as many steps as one
"gain" is over the mean; "kept" the share of the labelled quiz's gain that the own quiz's choice
has, null if one of 10,000 draws of the passages shows no such gain. Where several are best, their
mean counts. "asked": questions of the model's own quiz, per passage, of which no self-edit asks
any; a passage without one chooses blindly. ci95 are over passages.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import Question, counts, load_passages
from inner import lora_config, sft_config
from lm.files import (
    GOES_ON,
    check_output,
    chunks,
    digest,
    read_json,
    run_main,
    sub_seed,
    write_json,
)
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap, gap_closed
from lm.runs import open_run
from quiz import self_quiz
from reward import (
    passage_candidate,
    pooled,
    study,
)
from selfedit import in_style, settle, write_self_edits

METHODS = ("mean", "own", "labelled", "pooled")


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--samples", type=at_least(2), default=4, help="self-edits to choose from")
    add("--work", default="runs/choice", help="folder for progress, to resume a killed run")
    add("--out", default="results/choice.json", help="result file")
    parser.set_defaults(lr=8e-3)
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["style"], "here: the notes are questions")
    if not args.steps:
        parser.error("--steps: as many for one self-edit as for all of a passage's together")
    return args


def with_own_quiz(model, tok, passages, notes: list[tuple], args, work: Path) -> list:
    """The passages, each with the model's own questions behind those that it has, but for those
    that one of its notes asks. They are kept in `work`, so that a resumed run asks the same."""
    path = work / "asked.json"
    if not path.is_file():
        how = (in_style(args, "self-qa"), sub_seed(args.seed, 2))
        written = write_self_edits(model, tok, passages, 1, *how, label="own quiz")
        asked = {}
        for p in self_quiz(model, tok, passages, written, notes):
            asked[p.id] = [[q.question, q.answers[0]] for q in p.questions]
        write_json(path, asked)
    both, asked = [], read_json(path)
    for p in passages:
        own = [Question(question, (answer,)) for question, answer in asked[p.id]]
        both.append(replace(p, questions=(*p.questions, *own)))
    return both


def measure(model, tok, passages, args, work: Path) -> list[list]:
    """Of each passage: the answers to all its questions, after each of its self-edits, and after
    their notes together."""
    log = work / "sampled.jsonl"
    how = (args, sub_seed(args.seed, 0), log)
    edits = chunks(write_self_edits(model, tok, passages, args.samples, *how), args.samples)
    together, candidates = [], []
    for own in edits:
        together.append(pooled([e.notes for e in own]))
    asked = with_own_quiz(model, tok, passages, together, args, work)
    for p, own, all_notes in zip(asked, edits, together):
        for notes in (*(e.notes for e in own), all_notes):
            n = len(candidates)
            candidates.append(passage_candidate(tok, n, p, notes, sft_config(args)))
    how = (args, sub_seed(args.seed, 1), work / "scored.jsonl", "study")
    right = []
    for result in study(model, tok, candidates, *how):
        right.append([a["accuracy"] for a in result["answers"]])
    return chunks(right, args.samples + 1)


def chosen(by: np.ndarray, judged: np.ndarray) -> float:
    """The mean of what is judged over the best `by`; blindly if that asks nothing. Both (samples,
    questions)."""
    scores = by.mean(axis=1) if by.size else np.zeros(len(by))
    return float(judged.mean(axis=1)[scores >= scores.max() - 1e-9].mean())


def of_passage(answers: list, labelled: int, seed: int) -> dict:
    """{method: accuracy} of one passage, each the mean over the two halves of its quiz.

    answers (samples + 1, questions), the last of all notes together; the first `labelled` questions
    are the passage's quiz, and the others the model's own.
    """
    answers = np.array(answers, dtype=float)
    edits, together = answers[:-1], answers[-1:]
    order, found = np.random.default_rng(seed).permutation(labelled), dict.fromkeys(METHODS, 0.0)
    halves = order[: labelled // 2], order[labelled // 2 :]
    for half, other in (halves, halves[::-1]):
        judged = edits[:, other]
        found["mean"] += judged.mean() / 2
        found["own"] += chosen(edits[:, labelled:], judged) / 2
        found["labelled"] += chosen(edits[:, half], judged) / 2
        found["pooled"] += together[:, other].mean() / 2
    return found


def summarize(found: list[dict], seed: int) -> dict:
    """The passages' {method: accuracy} -> "rows", "kept"."""
    columns, rows = {}, []
    for name in METHODS:
        columns[name] = np.array([own[name] for own in found])
    for name, values in columns.items():
        gain = values - columns["mean"]
        row = {"method": name, "accuracy": float(values.mean()), "ci95": bootstrap(values, seed)}
        rows.append(row | {"gain": float(gain.mean()), "ci95_gain": bootstrap(gain, seed)})
    kept = gap_closed(*(columns[m] for m in ("mean", "labelled", "own")), seed)
    return {"rows": rows, "kept": kept}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    passages = [p for p in passages if len(p.questions) > 1]  # there are no halves of one
    if not passages:
        raise SystemExit(f"error: {args.data}: no passage has two questions, to be halved")
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out")}
    settings |= {"data_sha256": digest(args.data)}
    work = open_run(args.work, settings, model)
    found, asked = [], []
    for n, (p, answers) in enumerate(zip(passages, measure(model, tok, passages, args, work))):
        found.append(of_passage(answers, len(p.questions), sub_seed(args.seed, 3, n)))
        asked.append(len(answers[0]) - len(p.questions))
    head = result_head(args, model) | counts(passages) | {"settings": settings}
    head["asked"] = float(np.mean(asked))
    result = head | summarize(found, args.seed)
    write_json(args.out, result)
    for row in result["rows"]:
        print(f"{row['method']:10} {100 * row['accuracy']:5.1f} %  {100 * row['gain']:+5.1f}")


if __name__ == "__main__":
    run_main(main, GOES_ON)
