"""Which notes teach what? Credit of single notes, judged by other wordings under another seed.

    python experiments/credits.py --limit 8             # -> results/note_credits.json

The notes of --samples self-edits on a training passage are pooled, and --halves random halves of
the pool are studied, in complementary pairs, in two lots with other halves and seeds. In
each a note's credit is what the questions about its sentence score with it minus without
(note_credits()). The first lot is asked the quiz, the second two more wordings of every
question by another hand (data/wordings.json): its credits by accuracy are to be predicted by

    accuracy, answer, sentence      the first lot's credits, by these scores (experiments/noise.py)
    influence       without a study: the product of the LoRA gradients of the note and of the quiz's
                    questions about its sentence, where training begins (first-order influence, as
                    in TracIn, arXiv 2002.08484); the mean over those questions
    alignment       the same, of gradients of length 1
    proxy           how closely the note asks what the quiz asks (--reward proxy)

"agree" has the correlation of each with them, over the notes on one sentence; intervals are over
passages.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import Passage, counts, load_passages
from data.text import question_and_answer, sentences
from experiments.noise import SCORES, ask_all, correlation_of, products, with_wordings
from inner import laid_out, lora_config, sft_config, train_step
from lm.files import GOES_ON, check_output, chunks, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, result_head
from lm.intervals import of_sums
from lm.log import Log, Progress
from lm.runs import open_run
from lora import Adapters, LoRAConfig, attached
from reward import (
    RESULT,
    accuracy_of,
    by_sentence,
    passage_candidate,
    passage_examples,
    pooled,
    populations,
    proxy_scores,
    sentence_about,
    update_and_quiz,
)
from selfedit import QA_PAIR, SelfEdit, settle, write_self_edits

WITHOUT_STUDY = ("influence", "alignment", "proxy")


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=8)
    add = parser.add_argument_group("experiment").add_argument
    add("--samples", type=at_least(1), default=8, help="self-edits whose notes are pooled")
    add("--halves", type=at_least(4), default=16, help="halves of each lot, in pairs")
    add("--wordings", default="data/wordings.json", help="other wordings of the quiz")
    add("--work", default="runs/credits", help="folder for progress, to resume a killed run")
    add("--out", default="results/note_credits.json", help="result file")
    args = settle(parser.parse_args())
    if args.style != "questions":
        parser.error("--style: only a question is about one sentence")
    if args.halves % 2:
        parser.error(f"--halves {args.halves}: studies come in pairs")
    return args


# -----------------------------------------------------------------------------
# credits by study (the estimator of Data Banzhaf, arXiv 2205.15466)


@dataclass(frozen=True)
class Pool:
    """The notes of all self-edits on one passage, and the halves of them that are studied."""

    passage: Passage
    notes: tuple
    halves: list[tuple]


def pools(edits: list[SelfEdit], passages: list[Passage], count: int, seed: int) -> list[Pool]:
    """One for each passage; fewer than two notes have no halves."""
    found = []
    for n, passage in enumerate(passages):
        notes = pooled([e.notes for e in edits if e.passage == passage.id])
        halves = random_halves(notes, count, sub_seed(seed, n)) if len(notes) > 1 else []
        found.append(Pool(passage, notes, halves))
    return found


def random_halves(notes: tuple, count: int, seed: int) -> list[tuple]:
    """`count` random halves of notes, in complementary pairs: [half, the rest, half, the rest,
    ...]. Of an odd number the one or the other has one more."""
    rng, halves = np.random.default_rng(seed), []
    for _ in range(count // 2):
        chosen = set(rng.permutation(len(notes))[: (len(notes) + rng.integers(2)) // 2].tolist())
        halves.append(tuple(note for i, note in enumerate(notes) if i in chosen))
        halves.append(tuple(note for i, note in enumerate(notes) if i not in chosen))
    return halves


def note_credits(halves: list[tuple], scores, notes) -> dict:
    """{note: what it brings}. scores (count) of the halves; NaN where a study diverged: that pair
    says nothing.

    A note is in one half of each pair, so its credit is the mean over pairs of the score with it
    minus the score without it.
    """
    pairs = np.array(scores, float).reshape(-1, 2)
    sound = np.isfinite(pairs).all(axis=1)
    difference, found = (pairs[:, 0] - pairs[:, 1])[sound], {}
    for note in notes:
        sign = np.array([1.0 if note in half else -1.0 for half in halves[0::2]])[sound]
        found[note] = float((sign * difference).mean()) if len(difference) else 0.0
    return found


def notes_about(pool: Pool) -> list[list[str]]:
    """The notes of a pool that are answered by each sentence of its passage."""
    pairs, found = {note: QA_PAIR.fullmatch(note) for note in pool.notes}, []
    for statement in sentences(pool.passage.text):
        _, answer = question_and_answer(statement)
        found.append([note for note, m in pairs.items() if m and m[2] == answer])
    return found


@dataclass
class Lot:
    """Halves of each passage's notes, as they were studied, and the answers of each half."""

    pools: list
    answers: list[list]  # [passage][half]: one dict for each question in each wording; or None


def study(model, tok, edits, passages, longer, args, lot: int, work: Path) -> Lot:
    seed = sub_seed(args.seed, 1, lot)
    found = pools(edits, passages, args.halves, seed)
    candidates, config = [], sft_config(args)
    for pool, p in zip(found, longer):
        for half in pool.halves:
            candidates.append(passage_candidate(tok, len(candidates), p, half, config))
    log, lora = Log(work / f"lot-{lot}.jsonl", accuracy_of, needed=RESULT), lora_config(args, model)
    groups = populations(candidates, args.population)
    update_and_quiz(model, tok, groups, lora, seed, log, ask_all, f"lot {lot}")
    results = iter([log[c] for c in candidates])
    answers = []
    for pool in found:
        own = [next(results) for _ in pool.halves]
        answers.append([None if r["diverged"] else r["answers"] for r in own])
    return Lot(found, answers)


def credits_of(lot: Lot, n: int, key: str, others: bool) -> list[dict]:
    """{note: credit} of each sentence of passage n, by the questions as they are, or by the mean of
    their other wordings."""
    pool, scores = lot.pools[n], []
    asked = len(pool.passage.questions)
    for answers in lot.answers[n]:
        if answers is None:
            scores.append(None)
            continue
        values = np.array([a[key] for a in answers], float).reshape(3, asked)
        scores.append(by_sentence(pool.passage, values[1:].mean(0) if others else values[0]))
    found = []
    for k, about in enumerate(notes_about(pool)):
        of = [s[k] if s else math.nan for s in scores]
        found.append(note_credits(pool.halves, of, about) if about and None not in of else {})
    return found


# -----------------------------------------------------------------------------
# credits without a study


def gradients(model, tok, title: str, notes: list[str], lora: LoRAConfig, seed: int):
    """(notes, N): the gradient of each note's loss where training begins. B is zero there, so that
    of A is, too."""
    rows = [laid_out([e], 0) for e in passage_examples(tok, title, notes)]
    adapters = Adapters.init(model, lora, len(rows), seed)
    with attached(model, adapters) as applied:
        _, found = train_step(model, applied, list(range(len(rows))), rows)
    return found


def influences(model, tok, pool, lora: LoRAConfig, seed: int) -> dict:
    """{name: [{note: value} of each sentence]} for WITHOUT_STUDY."""
    passage, found = pool.passage, {name: [] for name in WITHOUT_STUDY}
    texts = sentences(passage.text)
    asked = [[] for _ in texts]
    for number, q in enumerate(passage.questions):
        if (k := sentence_about(q, texts)) is not None:
            asked[k].append(number)
    for k, notes in enumerate(notes_about(pool)):
        for name in WITHOUT_STUDY:
            found[name].append({})
        if not notes or not asked[k]:
            continue
        _, answer = question_and_answer(texts[k])
        quiz = [f"Question: {passage.questions[n].question}\nAnswer: {answer}" for n in asked[k]]
        goal = gradients(model, tok, passage.title, quiz, lora, seed)
        for some in chunks(notes, 16):
            own = gradients(model, tok, passage.title, some, lora, seed)
            lengths = own.norm(dim=1)[:, None] * goal.norm(dim=1)
            product = own @ goal.T
            values = {"influence": product, "alignment": product / lengths}
            for name, of in values.items():
                found[name][k] |= dict(zip(some, of.mean(1).tolist()))
        for note in notes:
            closeness = np.array(proxy_scores(passage, [note]))
            found["proxy"][k][note] = float(closeness[asked[k]].mean())
    return found


# -----------------------------------------------------------------------------
# how well they agree


def agreement(found: list[list[dict]], truth: list[list[dict]], seed: int) -> dict:
    """The correlation of found[passage][sentence] {note: value} with truth, notes that stand in
    both, centred over those on one sentence."""
    sums = []
    for own, true in zip(found, truth):
        total = np.zeros((3, 1))
        for a, b in zip(own, true):
            both = [note for note in a if note in b]
            if len(both) > 1:
                values = np.array([(a[note], b[note]) for note in both])
                total += products(values[:, :1], values[:, 1:]).reshape(3, 1)
        sums.append(total[:, 0])
    return of_sums(correlation_of, sums, seed)


def measure(model, tok, passages, longer, args, work: Path) -> dict:
    log, seed = work / "sampled.jsonl", sub_seed(args.seed, 0)
    edits = write_self_edits(model, tok, passages, args.samples, args, seed, log)
    first, second = (study(model, tok, edits, passages, longer, args, n, work) for n in (0, 1))
    known = {name: [] for name in (*SCORES, *WITHOUT_STUDY)}
    progress = Progress("influence", len(passages))
    truth = []
    for n, pool in enumerate(first.pools):
        for name, key in SCORES.items():
            known[name].append(credits_of(first, n, key, others=False))
        cheap = influences(model, tok, pool, lora_config(args, model), sub_seed(args.seed, 2))
        for name in WITHOUT_STUDY:
            known[name].append(cheap[name])
        truth.append(credits_of(second, n, "accuracy", others=True))
        progress.step()
    agree = {name: agreement(found, truth, args.seed) for name, found in known.items()}
    for name, r in agree.items():
        low, high = r["ci95"]
        print(f"{name:10} {r['value']:.2f} [{low:.2f}, {high:.2f}]", flush=True)
    return {"n_notes": sum(len(own) for of in truth for own in of), "agree": agree}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    longer = with_wordings(passages, args.wordings)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out")}
    settings |= {"data_sha256": digest(args.data), "wordings_sha256": digest(args.wordings)}
    work = open_run(args.work, settings, model)
    result = measure(model, tok, passages, longer, args, work)
    head = result_head(args, model) | counts(passages) | {"settings": settings}
    write_json(args.out, head | result)


if __name__ == "__main__":
    run_main(main, GOES_ON)
