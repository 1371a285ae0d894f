"""Four studies behind the defaults and the results.

    python studies.py reward      # which reward says what a self-edit is worth?       -> results/reward_reliability.json
    python studies.py recipes     # prompt style, temperature, layers, lr, epochs      -> results/recipes.json
    python studies.py proxy --limit 24 --work runs/studied/round-1    # what is --reward asked worth? -> results/proxy.json
    python studies.py notes --work runs/eval-qa_ladder/climb-0    # what did RL change in the notes?  -> results/notes.json

reward: each self-edit is studied with --seeds seeds (other adapters, other order of rows). A reward is reliable if, among
one passage's self-edits, it repeats itself:
    questions    split-half correlation over the quiz's questions, corrected to the whole quiz (Spearman-Brown: 2r / (1 + r))
    seeds        correlation between two seeds
    both         one half of the questions under one seed against the other half under another, not corrected
And what matters: pick each passage's best self-edit by the reward on half of the questions; then, under the last seed and
on the other half, "picks_best" is how often it has the highest accuracy there (ties count; "chance" if picked blindly), and
"gain" its accuracy above the mean of the passage's self-edits. Rewards are accuracy, logprob (quiz.py) and
    mixed        accuracy + logprob / 4
    asked        closest_question() in quiz.py, which needs no study: its reliability over seeds is 1 by construction
each averaged over 1, 2, ... seeds of study.

proxy: of the self-edits that a round of train_outer.py --reward accuracy studied: how does what a part earned go with
"asked", the proxy reward of that part? Both as differences from the mean of the same part of the passage's self-edits.
"slope" is accuracy per unit of asked, "correlation" theirs, each with a bootstrap interval over passages.

recipes: on training passages, one change at a time from the defaults; each row with its accuracy and seconds per candidate.
A style that is not sentence by sentence may write four times --max-new tokens.
"best" holds, for each way of studying, the learning rate and number of steps with the highest accuracy: eval_qa.py --recipes
reads it. All rows of one method are tried with the same grid, so no method is tuned more than another.

notes: of the self-edits that an eval_qa.py ladder sampled, per method; a word counts if it has four letters or a digit:
    tokens       length
    covered      share of the passage's words that occur in the notes
    repeats      share of the notes with 80 % of their words in one earlier note (identical ones go before, in parse())
    unsupported  share of the notes with less than 60 % of their words in the passage and its title
    copied       share of the notes that name someone or something of the prompt's worked example
    told         share of the quiz's questions with an accepted answer in the notes (the model never saw these questions)
    asked        do the notes ask what the quiz asks? closest_question() in quiz.py, the mean over the quiz
Where a note quotes a sentence of the passage as its answer, repeats and unsupported look at its question only; covered and
told count the quoted sentence, so that one note per sentence makes them 1, and asked is what is left to learn.
"changes" compares each method with the first one, on the same passages.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common import chunks, digest, open_run, read_jsonl, sub_seed, write_json
from data.qa import Passage, load_passages
from eval_qa import bootstrap, paired_steps, unrelated
from quiz import (
    Candidate,
    asks,
    at_least,
    load,
    lora_config,
    make_parser,
    mean_scores,
    result_head,
    score_answer,
    study_all,
    study_settings,
    words,
)
from selfedit import QA_PAIR, STYLES, copies_example, sentences, write_self_edits
from train_outer import by_sentence

REWARDS = {
    "accuracy": lambda s: s["accuracy"],
    "logprob": lambda s: s["logprob"],
    "mixed": lambda s: s["accuracy"] + s["logprob"] / 4,
    "asked": lambda s: s["asked"],
}
METHODS = ["passage", "passage+unrelated", "passage+self-edit"]
OUT = {"reward": "reward_reliability", "recipes": "recipes", "proxy": "proxy", "notes": "notes"}


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("studies").add_argument
    add("study", choices=OUT, help="which")
    add("--data", default="data/passages.json", help="passages with questions")
    add("--skip", type=at_least(0), default=0, help="leave out the first N passages")
    add("--limit", type=at_least(0), default=48, help="use at most N passages, 0: all")
    add("--samples", type=at_least(2), default=4, help="reward: self-edits per passage")
    add("--seeds", type=at_least(2), default=3, help="reward: studies of each self-edit, the last one to judge by")
    add("--lrs", type=at_least(0.0), nargs="+", default=[2e-3, 4e-3, 8e-3], help="recipes: learning rates")
    add("--step-counts", type=at_least(1), nargs="+", default=[8, 16, 32], help="recipes: --steps to compare")
    add("--layers", type=at_least(0), nargs="+", default=[6, 10, 15, 0], help="recipes: --top-layers to compare")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="recipes: ways of studying to tune")
    add("--styles", nargs="+", default=list(STYLES), choices=STYLES, help="recipes: --style to compare")
    add("--temperatures", type=at_least(0.0), nargs="+", default=[0.4, 0.7, 1.0], help="recipes: --temperature to compare")
    add(
        "--work", help="folder for progress, default runs/STUDY; proxy: a round's; notes: the ladder's, with *-sampled.jsonl"
    )
    add("--out", help="default: results/... as above")
    args = parser.parse_args()
    args.out = args.out or f"results/{OUT[args.study]}.json"
    return args


# -----------------------------------------------------------------------------
# reward


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of a, b (passages, M), each centred within its passage."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def halves(counts: list[int], rng) -> list[np.ndarray]:
    """For each quiz, which of its questions are in the first half: bool, one or half of them, at random."""
    return [rng.permutation(n) < max(1, n // 2) for n in counts]


def judge_reward(scores: list[list[list[list[dict]]]], name: str, averaged: int, seed: int, splits: int = 200) -> dict:
    """One row: the reward `name`, averaged over the first `averaged` seeds. scores[seed][passage][sample][question]."""

    def values(seeds, of, mask):
        """(passages, M) mean over seeds and over the questions in mask, one bool array for each passage."""
        table = [
            [[np.mean([of(q) for q, m in zip(a, take) if m]) for a in p] for p, take in zip(scores[s], mask)] for s in seeds
        ]
        return np.mean(table, axis=0)

    rng, reward, last = np.random.default_rng(seed), REWARDS[name], len(scores) - 1
    counts, all_seeds = [len(p[0]) for p in scores[0]], list(range(averaged))
    whole = [np.ones(n, bool) for n in counts]
    questions, both, best, chance, gains = [], [], [], [], []
    for _ in range(splits):
        one = halves(counts, rng)
        two = [~mask for mask in one]
        mine, other = values(all_seeds, reward, one), values(all_seeds, reward, two)
        questions.append(correlation(mine, other))
        both.append(correlation(mine, values([last], reward, two)))
        truth = values([last], REWARDS["accuracy"], two)
        pick = mine.argmax(axis=1)
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


def study_reward(model, tok, passages, args, work: Path) -> dict:
    log = work / "sampled.jsonl"
    edits = write_self_edits(model, tok, passages, args.samples, args, sub_seed(args.seed, 0), log, "sample")
    passage_of = {p.id: p for p in passages}
    candidates = [Candidate(passage_of[e.passage], tuple(e.notes)) for e in edits]
    how, scores = (lora_config(args, model), study_settings(args)), []
    for s in range(args.seeds):
        log, label = work / f"studied-{s}.jsonl", f"seed {s + 1}/{args.seeds}"
        results = study_all(model, tok, candidates, *how, sub_seed(args.seed, 1, s), args.population, log, label)
        asked = [asks(c.passage, c.notes) for c in candidates]
        answers = [[a | {"asked": x} for a, x in zip(r["answers"], mine)] for r, mine in zip(results, asked)]
        scores.append(chunks(answers, args.samples))
    # A quiz of one question has no halves.
    scores = [[p for p in mine if len(p[0]) > 1] for mine in scores]
    rows = [judge_reward(scores, name, n, args.seed) for n in range(1, args.seeds) for name in REWARDS]
    for r in rows:
        line = "  ".join(f"{k} {v:.2f}" for k, v in r["reliability"].items())
        low, high = r["ci95"]
        print(f"{r['reward']:9} x{r['seeds']}  {line}  gain {100 * r['gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    return {"samples": args.samples, "seeds": args.seeds, "rows": rows}


# -----------------------------------------------------------------------------
# proxy


def study_proxy(passages, args) -> dict:
    log = Path(args.work or "") / "candidates.jsonl"
    if not args.work or not log.is_file():
        raise SystemExit(f"error: --work {args.work}: no candidates.jsonl there; give a round's folder of train_outer.py")
    edits, sums, parts = read_jsonl(log), [], 0  # sums per passage: of x * x, x * y and y * y
    for p in passages:
        mine = [e for e in edits if e["passage"] == p.id]
        asked, earned = zip(*(by_sentence(p, asks(p, e["notes"])) for e in mine)), zip(*(e["credits"] for e in mine))
        both = [np.array(pair) for pair in zip(asked, earned) if None not in pair[0]]  # (2, self-edits) of each part
        rows = [pair - pair.mean(axis=1, keepdims=True) for pair in both]
        sums.append([sum(x @ x for x, _ in rows), sum(x @ y for x, y in rows), sum(y @ y for _, y in rows)])
        parts += len(rows) * len(mine)
    at = np.random.default_rng(args.seed).integers(0, len(sums), (10_000, len(sums)))
    result = {"n_parts": parts}
    for name, f in {"slope": lambda s: s[1] / s[0], "correlation": lambda s: s[1] / np.sqrt(s[0] * s[2])}.items():
        low, high = np.quantile(f(np.array(sums)[at].sum(axis=1).T), [0.025, 0.975])
        result[name] = {"value": float(f(np.sum(sums, axis=0))), "ci95": [float(low), float(high)]}
    print(result)
    return result


# -----------------------------------------------------------------------------
# recipes


@dataclass(frozen=True)
class Recipe:
    """One row of the study; its fields are named as the settings."""

    method: str
    style: str
    temperature: float
    top_layers: int
    lr: float
    epochs: int
    steps: int


def recipes(args) -> list[Recipe]:
    """lr x steps for each method, then one change at a time of what is asked for and adapted; each row once."""
    base = Recipe("passage+self-edit", args.style, args.temperature, args.top_layers, args.lr, args.epochs, args.steps)
    rows = [replace(base, method=m, lr=lr, steps=n) for m in METHODS for n in args.step_counts for lr in args.lrs]
    rows += [replace(base, style=s) for s in args.styles] + [replace(base, temperature=t) for t in args.temperatures]
    rows += [replace(base, top_layers=k) for k in args.layers]
    paper = replace(base, steps=0)
    rows += [replace(paper, method=m, epochs=n) for m in METHODS[::2] for n in (args.epochs, 2 * args.epochs)]
    return [r for r in dict.fromkeys(rows) if r.method in args.methods]


def study_recipe(model, tok, passages, recipe: Recipe, args, work: Path) -> dict:
    mine = SimpleNamespace(**{**vars(args), **vars(recipe)})
    if not STYLES[recipe.style].by_sentence:
        mine.max_new *= 4  # a passage takes more room than a sentence
    notes, titles = [()] * len(passages), [p.title for p in passages]
    if recipe.method != "passage":
        log = work / f"sampled-{recipe.style}-{recipe.temperature:g}.jsonl"
        edits = write_self_edits(model, tok, passages, 1, mine, sub_seed(args.seed, 0), log, log.stem)
        notes = [tuple(e.notes) for e in edits]
    if recipe.method == "passage+unrelated":
        notes, titles = unrelated(passages, notes)
    candidates = [Candidate(p, n, t) for p, n, t in zip(passages, notes, titles)]
    name = "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in vars(recipe).values())
    start, log = time.perf_counter(), work / f"{name}.jsonl"
    timed = not log.is_file()  # else some were studied before this run was killed and resumed
    how = (lora_config(mine, model), study_settings(mine), sub_seed(args.seed, 1), args.population)
    results = study_all(model, tok, candidates, *how, log, name)
    seconds = (time.perf_counter() - start) / len(passages)
    means = [mean_scores(r["answers"]) for r in results]
    accuracy = np.array([m["accuracy"] for m in means])
    return vars(recipe) | {
        "protocol": "steps" if recipe.steps else "epochs",
        "steps": float(np.mean([r["steps"] for r in results])),
        "accuracy": float(accuracy.mean()),
        "ci95": bootstrap(accuracy, args.seed),
        "logprob": float(np.mean([m["logprob"] for m in means])),
        "seconds_per_candidate": seconds if timed else None,
    }


def study_recipes(model, tok, passages, args, work: Path) -> dict:
    rows, best = [], {}
    for recipe in recipes(args):
        rows.append(study_recipe(model, tok, passages, recipe, args, work))
        r, default = rows[-1], (args.style, args.temperature, args.top_layers)
        print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()), flush=True)
        own = (recipe.style, recipe.temperature, recipe.top_layers) == default
        if own and recipe.steps in args.step_counts and recipe.lr in args.lrs:
            mine = {"lr": recipe.lr, "steps": recipe.steps, "accuracy": r["accuracy"]}
            best[recipe.method] = max(best.get(recipe.method, mine), mine, key=lambda b: b["accuracy"])
    return {"rows": rows, "best": best}


# -----------------------------------------------------------------------------
# notes

MEASURES = ("tokens", "notes", "covered", "repeats", "unsupported", "copied", "told", "asked")


def measure(tok, p: Passage, text: str, notes: list[str]) -> dict:
    """The measures of one self-edit; shares of no notes are 0."""
    pairs = {n: (m[1], m[2]) for n in notes if (m := QA_PAIR.fullmatch(n))}
    texts = sentences(p.text)
    quoted = {n: question for n, (question, answer) in pairs.items() if answer in texts}
    own, each = words(p.text), [words(quoted.get(n, n)) for n in notes]
    each = [w for w in each if w]
    repeats = [any(len(w & v) >= 0.8 * len(w) for v in each[:i]) for i, w in enumerate(each)]
    unsupported = [len(w & (own | words(p.title))) < 0.6 * len(w) for w in each]
    copied = [copies_example(n) for n in notes]
    said = " ".join(notes)
    return {
        "tokens": len(tok.encode(text)),
        "notes": len(notes),
        "covered": len(own & words(said)) / len(own) if own else 0.0,
        "repeats": float(np.mean(repeats)) if each else 0.0,
        "unsupported": float(np.mean(unsupported)) if each else 0.0,
        "copied": float(np.mean(copied)) if notes else 0.0,
        "told": float(np.mean([score_answer(said, q.answers)["accuracy"] for q in p.questions])),
        "asked": float(np.mean(asks(p, notes))),
    }


def study_notes(tok, passages, args) -> dict:
    """Compare the methods' self-edits; examples are the first, middle and last passage, and each one's first self-edit."""
    logs = sorted(Path(args.work or "").glob("*-sampled.jsonl"))
    if not args.work or not logs:
        raise SystemExit(f"error: --work {args.work}: no *-sampled.jsonl there; give the folder of an eval_qa.py ladder")
    by_id, rows, examples, means = {p.id: p for p in passages}, [], {}, {}
    for log in logs:
        edits = [e for e in read_jsonl(log) if e["passage"] in by_id]
        measured, method = {p.id: [] for p in passages}, log.name.removesuffix("-sampled.jsonl")
        for e in edits:
            p, text = by_id[e["passage"]], "\n".join(e["parts"])
            measured[p.id].append(measure(tok, p, text, e["notes"]))
        row = {"method": method, "n": len(edits)}
        for key in MEASURES:
            means[method, key] = mine = np.array([np.mean([m[key] for m in some]) for some in measured.values()])
            row |= {key: float(mine.mean()), f"{key}_ci95": bootstrap(mine, args.seed)}
        rows.append(row)
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items() if "ci95" not in k))
        for p in (passages[0], passages[len(passages) // 2], passages[-1]):
            shown = examples.setdefault(p.id, {"title": p.title, "passage": p.text})
            shown[method] = "\n".join(next(e["notes"] for e in edits if e["passage"] == p.id))
    changes, (first, *others) = [], [r["method"] for r in rows]
    for key in MEASURES:
        values = {r["method"]: means[r["method"], key] for r in rows}
        changes += [step | {"measure": key} for step in paired_steps(values, [(first, m) for m in others], args.seed)]
    return {"rows": rows, "changes": changes, "examples": list(examples.values())}


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, "heldout" if args.study == "notes" else "train", args.skip, args.limit)
    model, tok = load(args)
    if args.study == "notes":
        result = study_notes(tok, passages, args)
    elif args.study == "proxy":
        result = study_proxy(passages, args)
    else:
        settings = {k: v for k, v in vars(args).items() if k not in ("work", "out")} | {"data_sha256": digest(args.data)}
        work = open_run(args.work or f"runs/{args.study}", settings)
        lora_config(args, model)  # complains now rather than after sampling
        result = {"reward": study_reward, "recipes": study_recipes}[args.study](model, tok, passages, args, work)
    counts = {"n_passages": len(passages), "n_questions": sum(len(p.questions) for p in passages)}
    write_json(args.out, result_head(args, model) | counts | {"settings": vars(args)} | result)


if __name__ == "__main__":
    main()
