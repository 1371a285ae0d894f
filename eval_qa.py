"""The knowledge ladder: what does the model know about held-out passages after each way of studying them?

    python eval_qa.py                                 # base, passage, passage+self-edit, in-context
    python eval_qa.py --run runs/qa --match both --out results/seal.json     # and seal-1, seal-2, ... of that run
    python eval_qa.py --data my.json --samples 4 --out results/my.json       # your passages, four self-edits each
    python eval_qa.py --split "" --no-study --out results/passages.json      # is a set of passages fit for this?

Rows:
    base                 the model as it is; it has never seen the passage
    passage              after an inner update on the passage
    passage+unrelated    after an inner update on the passage and the untrained model's notes on another passage: what is
                         more training worth, without more to learn?
    passage+self-edit    after an inner update on the passage and the notes that the untrained model wrote
    passage+pooled       the same, with the notes of all --samples self-edits at once: is it enough to write more?
    seal-K               the same, with notes that the policy wrote after outer round K (--learner policy: it studies, too)
    stronger-editor      the same, with the "self_edits" that stand in the data file
    in-context           the model as it is, with the passage in the prompt (what studying replaces)

--match epochs is the paper's protocol: every row takes the same number of epochs, so more text means more optimiser
steps. With --match steps every row takes exactly --steps steps, of up to --row-len tokens of passage or notes each; with
--recipes (from studies.py) each row takes the steps and the learning rate that suit it best, found on training passages.
passage+pooled, seal-K and stronger-editor take those of passage+self-edit.

Columns: accuracy, em, f1 and logprob are defined in quiz.py; means over passages of the mean over a passage's questions
(and its self-edits, and --seeds). ci95 is a bootstrap interval over passages; "steps" in the JSON compares each row with
the one before it and with the last seal-K, and the notes with the passage alone, on the same passages (paired), so its
interval is the one to read for "does it help?". "gap_closed" is how much of the way from passage to in-context the last
seal-K goes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common import Progress, chunks, digest, open_run, read_json, sub_seed, write_json
from data.qa import load_passages
from lora import load_adapter, merged
from quiz import (
    Candidate,
    add_learner,
    ask,
    at_least,
    learner,
    load,
    lora_config,
    make_parser,
    mean_scores,
    quiz_items,
    result_head,
    study_all,
    study_settings,
)
from selfedit import parse, write_self_edits

METRICS = ("accuracy", "em", "f1", "logprob")


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("ladder").add_argument
    add("--data", default="data/passages.json", help="passages with questions")
    add("--split", default="heldout", help='"heldout", "train" or "" for all')
    add("--skip", type=at_least(0), default=0, help="leave out the first N passages")
    add("--limit", type=at_least(0), default=0, help="use at most N passages, 0: all")
    add("--run", help="folder of a train_outer.py run: adds a row for the policy of each of its rounds")
    add("--policy", nargs="+", default=[], metavar="FOLDER", help="adapter folders to use as seal-1, seal-2, ...")
    add("--samples", type=at_least(1), default=1, help="self-edits per passage, averaged")
    add_learner(add)
    add("--seeds", type=at_least(1), default=1, help="climb so many times, with other self-edits and adapters, and average")
    add("--no-study", action="store_true", help="only base and in-context: what is known, and what can be read off")
    add("--match", default="steps", choices=["epochs", "steps", "both"], help="protocol")
    add(
        "--recipes", help="with --match steps: JSON of `studies.py recipes`, which has the best --lr and --steps of each row"
    )
    add("--out", default="results/qa_ladder.json", help="with --match both: ..._epochs.json and ..._steps.json")
    add("--work", help="folder for progress, to resume a killed run; without it runs/eval- and the name of --out")
    return parser.parse_args()


# -----------------------------------------------------------------------------
# statistics


def bootstrap(values: np.ndarray, seed: int, n: int = 10_000) -> list[float]:
    """95 % interval of the mean of `values`, one per passage, by resampling passages."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (n, len(values)))].mean(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def paired_steps(values: dict, pairs, seed: int) -> list[dict]:
    """The mean difference of each pair (from, to) of rows, on the same passages; values {method: one per passage}."""
    deltas = {pair: values[pair[1]] - values[pair[0]] for pair in pairs}
    return [{"from": a, "to": b, "delta": float(d.mean()), "ci95": bootstrap(d, seed)} for (a, b), d in deltas.items()]


def pairs_of(methods: list[str], more=()) -> tuple[list, list]:
    """Pairs of rows to compare: each with the one after it, `more`, and every row before the last seal-K with that one;
    and the last seal-K, [] if there is none."""
    seal = [m for m in methods if m.startswith("seal-")][-1:]
    below = methods[: methods.index(*seal)] if seal else []
    return list(dict.fromkeys([*zip(methods, methods[1:]), *more, *((m, *seal) for m in below)])), seal


def summarize(table: dict, seed: int) -> dict:
    """table {method: {metric: one value per passage}} -> "rows", "steps" and "gap_closed" of the result file."""
    rows, methods = [], list(table)
    for method, scores in table.items():
        means = {m: float(scores[m].mean()) for m in METRICS}
        extra = {k: float(scores[k].mean()) for k in ("forward", "reversed", "train_steps", "lr") if k in scores}
        rows.append(
            {"method": method, "accuracy": means["accuracy"], "ci95": bootstrap(scores["accuracy"], seed)} | means | extra
        )
    notes = [("passage", "passage+self-edit")] if "passage+self-edit" in methods else []
    pairs, seal = pairs_of(methods, notes)
    steps = paired_steps({m: scores["accuracy"] for m, scores in table.items()}, pairs, seed)
    result = {"rows": rows, "steps": steps}
    if seal:
        low, high, mine = (table[m]["accuracy"] for m in ("passage", "in-context", *seal))
        result["gap_closed"] = {"by": seal[0]} | gap_closed(low, high, mine, seed)
    return result


def gap_closed(low: np.ndarray, high: np.ndarray, mine: np.ndarray, seed: int, n: int = 10_000) -> dict:
    """(mine - low) / (high - low) of the means over passages, with its interval; None if high is not surely above low."""
    at = np.random.default_rng(seed).integers(0, len(low), (n, len(low)))
    gain, gap = (mine - low)[at].mean(axis=1), (high - low)[at].mean(axis=1)
    if high.mean() <= low.mean() or (gap <= 0).any():
        return {"share": None, "ci95": None}
    share = (mine - low).mean() / (high - low).mean()
    return {"share": float(share), "ci95": [float(q) for q in np.quantile(gain / gap, [0.025, 0.975])]}


def per_passage(passages, answers: list[list[list[dict]]]) -> dict:
    """answers[passage][sample][question] -> {metric: array over passages}, with accuracy by question direction."""
    means = [[mean_scores(a) for a in samples] for samples in answers]
    table = {m: np.array([np.mean([s[m] for s in samples]) for samples in means]) for m in METRICS}
    for direction in ("forward", "reversed"):
        kept = [
            [s["accuracy"] for a in samples for s, q in zip(a, p.questions) if q.direction == direction]
            for p, samples in zip(passages, answers)
        ]
        if any(kept):  # over the passages that have such questions
            table[direction] = np.array([np.mean(k) for k in kept if k])
    return table


# -----------------------------------------------------------------------------
# rows


def asked(model, tok, passages, show_passage: bool, label: str, batch: int = 8) -> dict:
    """A row without an inner update: base, or with the passage in the prompt. Asks `batch` passages at a time."""
    answers, progress = [], Progress(label, len(passages))
    for some in (passages[i : i + batch] for i in range(0, len(passages), batch)):
        items = [quiz_items(tok, p, n, show_passage) for n, p in enumerate(some)]
        scores = iter(ask(model, tok, [item for mine in items for item in mine]))
        answers += [[[next(scores) for _ in mine]] for mine in items]
        progress.step(len(some))
    return per_passage(passages, answers)


def unrelated(passages, notes: list) -> tuple[list, list]:
    """For each passage the next one's notes, and the title that they stand under; for the last passage the first one's."""
    return notes[1:] + notes[:1], [p.title for p in passages[1:] + passages[:1]]


def pooled(notes: list[tuple]) -> tuple:
    """The notes of several self-edits, each once: [("a", "b"), ("b", "c")] -> ("a", "b", "c")."""
    return tuple(dict.fromkeys(note for mine in notes for note in mine))


class Climb:
    """One climb of the ladder: rows that study, under each protocol, from one seed."""

    def __init__(self, model, tok, passages, args, recipes: dict, seed: int, work: Path):
        self.model, self.tok, self.passages, self.args = model, tok, passages, args
        self.recipes, self.seed, self.work = recipes, seed, work
        self.tables = {p: {} for p in ("epochs", "steps") if args.match in (p, "both")}
        self.edits = {}

    def row(self, method: str, notes: list[list[tuple]], titles=None) -> None:
        """Every passage is studied once with each of its lists of notes: notes[passage][sample], under titles[passage]."""
        titles = titles or [p.title for p in self.passages]
        candidates = [Candidate(p, n, t) for p, samples, t in zip(self.passages, notes, titles) for n in samples]
        lora = lora_config(self.args, self.model)
        for protocol, table in self.tables.items():
            study = study_settings(self.args)
            if protocol == "epochs":
                study = replace(study, steps=0)
            else:
                study = replace(study, **self.recipes.get(method, {}))
            log = self.work / f"{method}-{protocol}{study.steps or study.epochs}-{study.lr:g}.jsonl"
            how, label = (lora, study, sub_seed(self.seed, 1), self.args.population), f"{method} ({protocol})"
            results = iter(study_all(self.model, self.tok, candidates, *how, log, label))
            grouped = [[next(results) for _ in samples] for samples in notes]
            table[method] = per_passage(self.passages, [[r["answers"] for r in group] for group in grouped])
            table[method]["train_steps"] = np.array([np.mean([r["steps"] for r in group]) for group in grouped])
            table[method]["lr"] = np.full(len(notes), study.lr)

    def write(self, method: str) -> list[list[tuple]]:
        """Notes on every passage, args.samples times, by the model as it is now."""
        log, n = self.work / f"{method}-sampled.jsonl", self.args.samples
        how = (self.passages, n, self.args, sub_seed(self.seed, 0), log, f"{method} sample")
        self.edits[method] = write_self_edits(self.model, self.tok, *how)
        return chunks([tuple(e.notes) for e in self.edits[method]], n)

    def climb(self, policies: dict) -> None:
        model, passages = self.model, self.passages
        self.row("passage", [[()]] * len(passages))
        notes = self.write("passage+self-edit")
        if len(passages) > 1:
            self.row("passage+unrelated", *unrelated(passages, notes))
        self.row("passage+self-edit", notes)
        if self.args.samples > 1:
            self.row("passage+pooled", [[pooled(mine)] for mine in notes])
        for method, adapter in policies.items():
            policy = load_adapter(model, adapter)
            with merged(model, policy):
                notes = self.write(method)
            with learner(model, policy, self.args):
                self.row(method, notes)
        if all(p.self_edits for p in passages):
            given = [[tuple(parse(text, "implications", True)[0]) for text in p.self_edits] for p in passages]
            self.row("stronger-editor", [mine[: self.args.samples] for mine in given])


def ladder(model, tok, passages, policies: dict, args, recipes: dict, work: Path) -> tuple[dict, dict]:
    """Returns {protocol: {method: scores}}, averaged over seeds, and the first seed's self-edits {method: [SelfEdit]}."""
    base, shown = asked(model, tok, passages, False, "base"), asked(model, tok, passages, True, "in-context")
    if args.no_study:
        return {"none": {"base": base, "in-context": shown}}, {}
    climbs = []
    for n in range(args.seeds):
        climbs.append(Climb(model, tok, passages, args, recipes, sub_seed(args.seed, n), work / f"climb-{n}"))
        climbs[-1].climb(policies)
    tables = {}
    for protocol, first in climbs[0].tables.items():
        rows = {m: {k: np.mean([c.tables[protocol][m][k] for c in climbs], axis=0) for k in first[m]} for m in first}
        tables[protocol] = {"base": base, **rows, "in-context": shown}
    return tables, climbs[0].edits


def own_recipes(args, methods) -> dict:
    """{method: {"lr", "steps"}} from --recipes. Exits with one line if the file has none for what the ladder needs."""
    if not args.recipes:
        return {}
    best = read_json(args.recipes).get("best", {})
    for method in ("passage", "passage+unrelated", "passage+self-edit"):
        if not {"lr", "steps"} <= best.get(method, {}).keys():
            raise SystemExit(
                f"error: {args.recipes}: no 'lr' and 'steps' for {method!r} under 'best'; see studies.py recipes"
            )
    best = {m: {k: r[k] for k in ("lr", "steps")} for m, r in best.items()}
    return best | {m: best["passage+self-edit"] for m in ("passage+pooled", *methods, "stronger-editor")}


def protocol_title(result: dict) -> str:
    """How many steps the rows of a result file took, in words."""
    s = result["settings"]
    if result["protocol"] == "none":
        return "nothing studied"
    if result["protocol"] == "epochs":
        return f"equal epochs, {s['epochs']} in every row (the paper's protocol)"
    return "optimiser steps as suits each row best" if s["recipes"] else f"{s['steps']} optimiser steps in every row"


def written_steps(rows: list, steps: list) -> tuple[dict, dict]:
    """As text, in points: {method: its step from the row above it}, and {(from, to): step} of the others."""
    above = {b["method"]: a["method"] for a, b in zip(rows, rows[1:])}
    span = "{:+5.1f} [{:+.1f}, {:+.1f}]"
    texts = {(s["from"], s["to"]): span.format(*(100 * v for v in (s["delta"], *s["ci95"]))) for s in steps}
    others = {(a, b): text for (a, b), text in texts.items() if above[b] != a}
    return {b: text for (a, b), text in texts.items() if above[b] == a}, others


def show(rows: list, steps: list, title: str) -> None:
    print(f"\n{title}\n{'':20} accuracy    95 % CI        em     f1   logprob  steps   against the row above")
    deltas, _ = written_steps(rows, steps)
    for r in rows:
        low, high = (100 * v for v in r["ci95"])
        scores = f"{100 * r['em']:5.1f}  {100 * r['f1']:5.1f}  {r['logprob']:7.2f}  {r.get('train_steps', 0):5.1f}"
        accuracy = f"{100 * r['accuracy']:6.1f} %  [{low:4.1f}, {high:4.1f}]"
        print(f"{r['method']:20} {accuracy}  {scores}   {deltas.get(r['method'], '')}")


def find_policies(args, task: str = "qa") -> dict:
    """{"seal-K": adapter folder} of --run and --policy. Exits if --run has no finished round, or was of another task or
    to write otherwise."""
    found = {}
    if args.run:
        found = {int(f.parent.parent.name[6:]): f.parent for f in Path(args.run).glob("round-*/policy/adapter_config.json")}
        if not found:
            raise SystemExit(f"error: --run {args.run}: no finished round (round-K/policy) there")
        before = read_json(Path(args.run) / "settings.json")
        if before["task"] != task:
            raise SystemExit(f"error: {args.run} was trained with --task {before['task']}")
        for key in ("style", "shots", "learner"):
            if before.get(key, getattr(args, key)) != getattr(args, key):
                raise SystemExit(f"error: {args.run} was trained with --{key} {before[key]}; give this script the same")
    policies = {f"seal-{k}": found[k] for k in sorted(found)}
    start = max(found, default=0) + 1
    return policies | {f"seal-{k}": Path(folder) for k, folder in enumerate(args.policy, start)}


def policy_digests(policies: dict) -> dict:
    """What a resumed run must find unchanged."""
    return {name: digest(folder / "adapter_model.safetensors") for name, folder in policies.items()}


def refuse_training_passages(passages, args) -> None:
    """Exit if the run was trained on some of these passages, unless --split train asks for them."""
    before = read_json(Path(args.run) / "settings.json")
    trained = load_passages(before["data"], before["split"], before["skip"], before["limit"])
    both = {p.text for p in passages} & {p.text for p in trained}
    if both and args.split != "train":
        raise SystemExit(
            f"error: {args.run} was trained on {len(both)} of these passages; leave them out with --skip or --split"
        )


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    policies = find_policies(args)
    recipes = own_recipes(args, policies)
    if args.run:
        refuse_training_passages(passages, args)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    if args.match != "epochs" and not (args.steps or args.no_study):
        raise SystemExit("error: --match steps needs --steps above 0")
    out = Path(args.out)
    free = "out work match steps recipes seeds run policy no_study".split()  # may change between two parts of a run
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings["data_sha256"] = digest(args.data)
    settings["policies"] = policy_digests(policies)
    work = open_run(args.work or Path("runs") / f"eval-{out.stem}", settings)
    tables, edits = ladder(model, tok, passages, policies, args, recipes, work)
    for protocol, table in tables.items():
        counts = {"n_passages": len(passages), "n_questions": sum(len(p.questions) for p in passages)}
        used = settings | {k: getattr(args, k) for k in ("steps", "recipes", "seeds")}
        result = result_head(args, model) | counts | {"protocol": protocol, "settings": used} | summarize(table, args.seed)
        write_json(out.with_stem(f"{out.stem}_{protocol}") if len(tables) > 1 else out, result)
        show(result["rows"], result["steps"], f"{len(passages)} passages, {protocol_title(result)}")
    print(f"\nSelf-edits for {passages[0].title!r}: {passages[0].text}" if edits else "")
    for method, mine in edits.items():
        print("\n".join([f"\n--- {method}", *mine[0].notes]))


if __name__ == "__main__":
    main()
