"""Which reward says what a self-edit is worth?

    python experiments/rewards.py --seeds 2        # -> results/reward_reliability.json

Each self-edit is learnt with --seeds seeds (other adapters, other order of rows). A reward is
reliable if, among one passage's self-edits, it repeats itself:
    questions    split-half correlation over the quiz's questions, corrected to the whole quiz
                 (Spearman-Brown: 2r / (1 + r))
    seeds        correlation between two seeds
    both         one half of the questions under one seed against the other half under another, not
                 corrected
And what matters: pick each passage's best self-edit by the reward on half of the questions; then,
under the last seed and on the other half, "picks_best" is how often it has the highest accuracy
there (ties count; "chance" if picked blindly), and "gain" its accuracy above the mean of the
passage's self-edits. Rewards are accuracy, logprob (quiz.py) and
    mixed        accuracy + logprob / 4
    proxy        closest_question() in reward.py, which needs no study: its reliability over seeds
                 is 1 by construction
each averaged over 1, 2, ... seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import counts, load_passages
from inner import lora_config, sft_config
from lm.files import GOES_ON, check_output, chunks, digest, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, result_head
from lm.intervals import bootstrap
from lm.runs import open_run
from reward import (
    passage_candidate,
    proxy_scores,
    study,
)
from selfedit import settle, write_self_edits

REWARDS = {
    "accuracy": lambda s: s["accuracy"],
    "logprob": lambda s: s["logprob"],
    "mixed": lambda s: s["accuracy"] + s["logprob"] / 4,
    "proxy": lambda s: s["proxy"],
}


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "train", limit=48)
    add = parser.add_argument_group("experiment").add_argument
    add("--samples", type=at_least(2), default=4, help="self-edits per passage")
    about = "inner updates of each self-edit, the last one to judge by"
    add("--seeds", type=at_least(2), default=3, help=about)
    add("--work", default="runs/reward", help="folder for progress, to resume a killed run")
    add("--out", default="results/reward_reliability.json", help="result file")
    return settle(parser.parse_args())


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of a, b (passages, M), each centred within its passage."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def halves(counts: list[int], rng) -> list[np.ndarray]:
    """For each quiz, which of its questions are in the first half: bool, one or half of them, at
    random."""
    return [rng.permutation(n) < max(1, n // 2) for n in counts]


def judge_reward(
    scores: list[list[list[list[dict]]]], name: str, averaged: int, seed: int, splits: int = 200
) -> dict:
    """One row: the reward `name`, averaged over the first `averaged` seeds.
    scores[seed][passage][sample][question]."""

    def values(seeds, of, mask):
        """(passages, M) mean over seeds and over the questions in mask, one bool array for each
        passage."""
        tables = []
        for s in seeds:
            table = []
            for samples, take in zip(scores[s], mask):
                counted = [np.array([*map(of, answers)])[take] for answers in samples]
                table.append([np.mean(values) for values in counted])
            tables.append(table)
        return np.mean(tables, axis=0)

    rng, reward, last = np.random.default_rng(seed), REWARDS[name], len(scores) - 1
    counts, all_seeds = [len(p[0]) for p in scores[0]], list(range(averaged))
    whole = [np.ones(n, bool) for n in counts]
    questions, both, best, chance, gains = [], [], [], [], []
    for _ in range(splits):
        one = halves(counts, rng)
        two = [~mask for mask in one]
        first, other = values(all_seeds, reward, one), values(all_seeds, reward, two)
        questions.append(correlation(first, other))
        both.append(correlation(first, values([last], reward, two)))
        truth = values([last], REWARDS["accuracy"], two)
        pick = first.argmax(axis=1)
        top = truth >= truth.max(axis=1, keepdims=True) - 1e-9
        best.append(top[np.arange(len(pick)), pick].mean())
        chance.append(top.mean())
        gains.append(truth[np.arange(len(pick)), pick] - truth.mean(axis=1))
    r, gain = float(np.mean(questions)), np.mean(gains, axis=0)  # gain: one per passage
    reliability = {
        "questions": 2 * r / (1 + r),
        "seeds": correlation(values(all_seeds, reward, whole), values([last], reward, whole)),
        "both": float(np.mean(both)),
    }
    picks = {"picks_best": float(np.mean(best)), "chance": float(np.mean(chance))}
    row = {"reward": name, "seeds": averaged, "reliability": reliability}
    return row | picks | {"gain": float(gain.mean()), "ci95": bootstrap(gain, seed)}


def measure(model, tok, passages, args, work: Path) -> dict:
    log, seed = work / "sampled.jsonl", sub_seed(args.seed, 0)
    edits = write_self_edits(model, tok, passages, args.samples, args, seed, log)
    passage_of, candidates, proxies = {p.id: p for p in passages}, [], []
    for n, e in enumerate(edits):
        passage = passage_of[e.passage]
        candidates.append(passage_candidate(tok, n, passage, e.notes, sft_config(args)))
        proxies.append(proxy_scores(passage, e.notes))
    scores = []
    for s in range(args.seeds):
        log, label = work / f"scored-{s}.jsonl", f"seed {s + 1}/{args.seeds}"
        results = study(model, tok, candidates, args, sub_seed(args.seed, 1, s), log, label)
        answers = []
        for r, proxy in zip(results, proxies):
            both = zip(r["answers"], proxy)
            answers.append([a | {"proxy": x} for a, x in both])
        scores.append(chunks(answers, args.samples))
    # A quiz of one question has no halves.
    has_halves = lambda of_passage: len(of_passage[0]) > 1  # noqa: E731
    scores = [list(filter(has_halves, of_seed)) for of_seed in scores]
    rows = []
    for n in range(1, args.seeds):
        rows += [judge_reward(scores, name, n, args.seed) for name in REWARDS]
    for r in rows:
        line = "  ".join(f"{k} {v:.2f}" for k, v in r["reliability"].items())
        low, high = (100 * v for v in r["ci95"])
        gain = f"gain {100 * r['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"
        print(f"{r['reward']:9} x{r['seeds']}  {line}  {gain}")
    return {"samples": args.samples, "seeds": args.seeds, "rows": rows}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out")}
    work = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model)
    result = measure(model, tok, passages, args, work)
    write_json(
        args.out, result_head(args, model) | counts(passages) | {"settings": vars(args)} | result
    )


if __name__ == "__main__":
    run_main(main, GOES_ON)
