"""Where does a reward's noise come from, and which score sees through it?

    python experiments/noise.py --limit 32              # -> results/reward_noise.json

Self-edits on training passages are learnt under several seeds (other adapters at the start, another
order and packing of the rows), and each study is asked the quiz and two more wordings of every
question by another hand (data/wordings.json), which nothing is trained on. Three scores of a
question:
    accuracy    is an accepted answer in the reply?
    answer      log-probability of the bare answer, per token (quiz.py)
    sentence    log-probability of the passage's sentence about it as the reply, per token (of the
                passage, if no sentence is about it)

"variance" splits a score's variance within a passage into components (a nested analysis of
variance, averaged over passages):
    question       some questions are easier, whatever was studied
    candidate      some self-edits teach more: what a reward is to find
    its questions  some teach more of what this question asks: what a part's credit is to find
    study          the same self-edit under another seed: the draw of A, order, packing
    rest           question by study
"predicts" is what a reward is good for: the correlation, among the self-edits on one passage, of
the score on the quiz (mean of the first seeds) with the accuracy on the other wordings under the
last seed; of whole self-edits, and of the sentences of a passage, as in a part's credit. Intervals
are over passages. Each self-edit is studied in three ways, or in those of --recipe:
    default     16 steps at 0.004
    epochs      whole epochs, 3 of them: each row is visited equally often
    dose        32 steps at 0.008
With --settings, as in train_outer.py, there is one way: each self-edit is studied as it says; those
that are flawed are left out.
"""

import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np
import torch

import data.qa
import reward
import selfedit
from data.qa import Passage, Question, counts, load_passages
from data.text import question_and_answer, sentences
from inner import lora_config
from lm.files import (
    GOES_ON,
    check_output,
    digest,
    read_json,
    run_main,
    sub_seed,
    write_json,
)
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap, of_sums
from lm.log import Log
from lm.runs import open_run
from lora import attached
from quiz import answer_logprobs, quiz_items
from reward import (
    RESULT,
    accuracy_of,
    edit_candidate,
    populations,
    quiz_candidates,
    sentence_about,
    update_and_quiz,
)
from sampler import prefill
from selfedit import settle, write_self_edits

SCORES = {"accuracy": "accuracy", "answer": "logprob", "sentence": "sentence"}
RECIPES = {"default": {}, "epochs": {"steps": 0, "epochs": 3}, "dose": {"steps": 32, "lr": 8e-3}}
PARTS = ("question", "candidate", "its questions", "study", "rest")


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=32)
    add = parser.add_argument_group("experiment").add_argument
    add("--samples", type=at_least(2), default=4, help="self-edits per passage")
    add("--seeds", type=at_least(2), default=3, help="studies of each, the last one to judge by")
    add("--recipe", nargs="+", default=list(RECIPES), choices=RECIPES, help="ways to study")
    add("--wordings", default="data/wordings.json", help="other wordings of the quiz")
    add("--work", default="runs/noise", help="folder for progress, to resume a killed run")
    add("--out", default="results/reward_noise.json", help="result file")
    selfedit.add_settings_flags(parser)
    args = settle(parser.parse_args())
    if args.settings:
        refuse_unused(parser, args, ["recipe", "style", "lr", "steps", "epochs"], "with --settings")
        args.recipe = ["said"]
    else:
        refuse_unused(parser, args, ["budget"], "without --settings")
    return args


# -----------------------------------------------------------------------------
# asking


def with_wordings(passages: list[Passage], path: str) -> list[Passage]:
    """The passages with a quiz three times as long: its questions, then one and then the other of
    their other wordings. Exits with one line if the file has none for a passage."""
    wordings, longer = read_json(path).get("wordings", {}), []
    for p in passages:
        own = wordings.get(p.id, [])
        if len(own) != len(p.questions) or not all(map(is_pair, own)):
            raise SystemExit(f"error: {path}: no two wordings of each question of {p.id}")
        questions = list(p.questions)
        for w in (0, 1):
            both = zip(p.questions, own)
            questions += [Question(pair[w], q.answers, q.direction) for q, pair in both]
        longer.append(replace(p, questions=tuple(questions)))
    return longer


def is_pair(wordings) -> bool:
    return isinstance(wordings, list) and [type(w) for w in wordings] == [str, str]


def ask_all(model, tok, group, adapters, outcomes) -> list[dict]:
    """quiz_candidates(), with "sentence" in each answer."""
    results = quiz_candidates(model, tok, group, adapters, outcomes)
    prompts, replies, owner = [], [], []
    for n, c in enumerate(group):
        statements = sentences(c.subject.text)
        for item in quiz_items(tok, c.subject, n):
            k = sentence_about(item.question, statements)
            _, answer = question_and_answer(statements[k] if k is not None else c.subject.text)
            prompts.append(list(item.prompt))
            replies.append([*tok.encode(answer), tok.end_ids[0]])
            owner.append(n)
    with torch.inference_mode(), attached(model, adapters) as lora:
        batch, x = prefill(model, prompts, owner, max(map(len, replies)), lora)
        logprobs = iter(answer_logprobs(replies, batch, x))
    for r in results:
        told = [next(logprobs) for _ in r["answers"]]
        told = [x if math.isfinite(x) and not r["diverged"] else -100.0 for x in told]
        r["answers"] = [a | {"sentence": x} for a, x in zip(r["answers"], told)]
    return results


# -----------------------------------------------------------------------------
# what the studies say


def components(y: np.ndarray) -> list[float]:
    """Variance components PARTS of one passage's scores y (candidates, seeds, questions), by the
    mean squares of a design in which studies are nested in candidates and questions cross both.
    Single estimates may be below zero; their mean over passages is not biased."""
    c, s, q = y.shape
    of_c, of_q = y.mean(axis=(1, 2)), y.mean(axis=(0, 1))
    of_cs, of_cq = y.mean(axis=2), y.mean(axis=1)
    mean = y.mean()
    cq = of_cq - of_c[:, None] - of_q + mean
    rest = y - of_cs[:, :, None] - of_cq[:, None] + of_c[:, None, None]
    ms_q = c * s * ((of_q - mean) ** 2).sum() / (q - 1)
    ms_c = s * q * ((of_c - mean) ** 2).sum() / (c - 1)
    ms_s = q * ((of_cs - of_c[:, None]) ** 2).sum() / (c * (s - 1))
    ms_cq = s * (cq**2).sum() / ((c - 1) * (q - 1))
    ms_rest = (rest**2).sum() / (c * (s - 1) * (q - 1))
    candidate = (ms_c - ms_cq - ms_s + ms_rest) / (s * q)
    parts = [(ms_q - ms_cq) / (c * s), candidate, (ms_cq - ms_rest) / s, (ms_s - ms_rest) / q]
    return [float(x) for x in [*parts, ms_rest]]


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums of a * b, a * a and b * b, of scores (candidates, K) centred over candidates."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return np.array([(a * b).sum(), (a * a).sum(), (b * b).sum()])


def correlation_of(sums: np.ndarray) -> np.ndarray:
    """Of sums of products() (3, ...); 0 where a score does not vary."""
    scale = np.sqrt(sums[1] * sums[2])
    return np.divide(sums[0], scale, out=np.zeros_like(scale), where=scale > 0)


def of_passage(scores: np.ndarray, key: str) -> np.ndarray:
    """One score of each answer."""
    values = [a[key] for a in scores.flat]
    return np.array(values, float).reshape(scores.shape)


def judge(table: list, passages, key: str, seed: int) -> dict:
    """table[passage] (candidates, seeds, 3 * questions) of dicts -> the row of one score."""
    split, whole, by_part = [], {}, {}
    for scores, p in zip(table, passages):
        n, statements = len(p.questions) // 3, sentences(p.text)
        about = [sentence_about(q, statements) for q in p.questions[:n]]
        about = np.array([-1 if k is None else k for k in about])  # -1: about no sentence
        own = of_passage(scores[..., :n], key)
        other = of_passage(scores[:, -1, n:], "accuracy")  # the last seed judges
        other = (other[:, :n] + other[:, n:]) / 2
        if n > 1 and len(scores) > 1:
            split.append(components(own))
        for seeds in range(1, scores.shape[1]):
            mean = own[:, :seeds].mean(axis=1)
            parts = [about == k for k in sorted(set(about) - {-1})]
            parts.append(np.ones(n, bool))  # last: all questions, of the whole
            credit = np.stack([mean[:, of].mean(axis=1) for of in parts], axis=1)
            truth = np.stack([other[:, of].mean(axis=1) for of in parts], axis=1)
            whole.setdefault(seeds, []).append(products(credit[:, -1:], truth[:, -1:]))
            by_part.setdefault(seeds, []).append(products(credit[:, :-1], truth[:, :-1]))
    variance = dict(zip(PARTS, map(float, np.mean(split or [[0.0] * 5], axis=0))))
    predicts = {
        str(n): {
            "whole": of_sums(correlation_of, whole[n], seed),
            "part": of_sums(correlation_of, by_part[n], seed),
        }
        for n in whole
    }
    return {"variance": variance, "predicts": predicts}


def measure(model, tok, passages, longer, args, work: Path) -> list[dict]:
    log, seed = work / "sampled.jsonl", sub_seed(args.seed, 0)
    edits = write_self_edits(model, tok, passages, args.samples, args, seed, log)
    subjects, rows = {p.id: p for p in longer}, []
    for recipe in args.recipe:
        how, candidates = Namespace(**vars(args) | RECIPES.get(recipe, {})), []
        seed = sub_seed(args.seed, 1)
        for n, e in enumerate(edits):
            candidates.append(edit_candidate(tok, n, subjects[e.passage], e, how, seed)[0])
        groups = populations([c for c in candidates if c], args.population)
        by_seed, lora = [], lora_config(args, model)
        for s in range(args.seeds):
            log = Log(work / f"{recipe}-{s}.jsonl", accuracy_of, needed=RESULT)
            label, seed = f"{recipe} {s + 1}/{args.seeds}", sub_seed(args.seed, 1, s)
            update_and_quiz(model, tok, groups, lora, seed, log, ask_all, label)
            by_seed.append([log[c]["answers"] if c else None for c in candidates])
        table, asked = [], []
        for p, n in zip(longer, range(0, len(edits), args.samples)):
            studies = [list(filter(None, own[n : n + args.samples])) for own in by_seed]
            if studies[0]:
                table.append(np.array(studies, dtype=object).swapaxes(0, 1))
                asked.append(p)
        if not table:
            raise SystemExit("error: no self-edit is sound; nothing was studied")
        accuracy = np.array([of_passage(scores, "accuracy").mean() for scores in table])
        row = {"recipe": recipe, "n": sum(map(len, table))}
        if not args.settings:
            row |= {"lr": how.lr, "steps": how.steps, "epochs": how.epochs}
        row |= {"accuracy": float(accuracy.mean()), "ci95": bootstrap(accuracy, args.seed)}
        row["scores"] = {name: judge(table, asked, key, args.seed) for name, key in SCORES.items()}
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    print(f"{row['recipe']}: accuracy {100 * row['accuracy']:.1f} %")
    for name, score in row["scores"].items():
        total = sum(score["variance"].values()) or 1.0
        shares = "  ".join(f"{k} {v / total:.0%}" for k, v in score["variance"].items())
        predicts = "  ".join(
            f"x{n} {p['whole']['value']:.2f} / {p['part']['value']:.2f}"
            for n, p in score["predicts"].items()
        )
        print(f"  {name:8}  {shares}   predicts (whole / part) {predicts}", flush=True)


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    longer = with_wordings(passages, args.wordings)
    model, tok = load(args)
    lora_config(args, model)
    unpinned = ("work", "out", "recipe")
    settings = {k: v for k, v in vars(args).items() if k not in unpinned}
    digests = {"data_sha256": digest(args.data), "wordings_sha256": digest(args.wordings)}
    work = open_run(args.work, settings | digests, model)
    result = {
        "settings": vars(args) | digests,
        "rows": measure(model, tok, passages, longer, args, work),
    }
    write_json(args.out, result_head(args, model) | counts(passages) | result)


if __name__ == "__main__":
    run_main(main, GOES_ON)
