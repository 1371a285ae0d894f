"""The knowledge ladder: what does the model know about held-out passages after each way of studying them?

    python eval_qa.py                                 # base, passage, passage+self-edit, in-context
    python eval_qa.py --run runs/qa --match both --out results/seal.json     # and seal-1, seal-2, ... of that run
    python eval_qa.py --data my.json --samples 4 --out results/my.json       # your passages, four self-edits each
    python eval_qa.py --split "" --no-study --out results/passages.json      # is a set of passages fit for this?

Rows:
    base                 the model as it is; it has never seen the passage
    passage              after an inner update on the passage
    passage+self-edit    after an inner update on the passage and the notes that the untrained model wrote
    seal-K               the same, notes and learner being the policy after outer round K
    in-context           the model as it is, with the passage in the prompt (what studying replaces)

--match epochs is the paper's protocol: every row takes the same number of epochs, so more text means more optimiser
steps. With --match steps every row takes exactly --steps steps, and a difference can only come from what was studied.

Columns: accuracy, em, f1 and logprob are defined in quiz.py; means over passages of the mean over a passage's questions
(and its self-edits). ci95 is a bootstrap interval over passages; "steps" in the JSON compares each row with the one
before it on the same passages (paired), so its interval is the one to read for "does it help?".
"""

import shlex
import sys
from pathlib import Path

import numpy as np

from common import Progress, digest, open_run, read_json, sub_seed, write_json
from data.qa import load_passages
from lora import load_adapter, merge, unmerge
from quiz import (
    Candidate,
    ask,
    at_least,
    load,
    lora_config,
    make_parser,
    mean_scores,
    quiz_items,
    study_all,
    study_settings,
)
from selfedit import write_self_edits

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
    add("--no-study", action="store_true", help="only base and in-context: what is known, and what can be read off")
    add("--match", default="epochs", choices=["epochs", "steps", "both"], help="protocol")
    add("--steps", type=at_least(1), default=16, help="optimiser steps with --match steps")
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


def summarize(table: dict, seed: int) -> tuple[list, list]:
    """table {method: {metric: one value per passage}} -> the "rows" and "steps" of the result file."""
    rows, steps, before = [], [], None
    for method, scores in table.items():
        means = {m: float(scores[m].mean()) for m in METRICS}
        ci = bootstrap(scores["accuracy"], seed)
        extra = {k: float(scores[k].mean()) for k in ("forward", "reversed", "train_steps") if k in scores}
        rows.append({"method": method, "accuracy": means["accuracy"], "ci95": ci, **means, **extra})
        if before:
            delta = scores["accuracy"] - table[before]["accuracy"]
            step = {"from": before, "to": method, "delta": float(delta.mean()), "ci95": bootstrap(delta, seed)}
            steps.append(step)
        before = method
    return rows, steps


def per_passage(passages, answers: list[list[list[dict]]], train_steps=None) -> dict:
    """answers[passage][sample][question] -> {metric: array over passages}, with accuracy by question direction."""
    means = [[mean_scores(a) for a in samples] for samples in answers]
    table = {m: np.array([np.mean([s[m] for s in samples]) for samples in means]) for m in METRICS}
    for direction in ("forward", "reversed"):
        kept = [
            [s["accuracy"] for a in samples for s, q in zip(a, p.questions) if q.direction == direction]
            for p, samples in zip(passages, answers)
        ]
        if all(kept):
            table[direction] = np.array([np.mean(k) for k in kept])
    if train_steps is not None:
        table["train_steps"] = np.array(train_steps, dtype=float)
    return table


# -----------------------------------------------------------------------------
# rows


def asked(model, tok, passages, show_passage: bool, label: str, batch: int = 8) -> dict:
    """A row without an inner update: base, or with the passage in the prompt. Asks `batch` passages at a time."""
    answers, progress = [], Progress(label, len(passages))
    for some in (passages[i : i + batch] for i in range(0, len(passages), batch)):
        items = [quiz_items(tok, p, show_passage=show_passage) for p in some]
        scores = iter(ask(model, tok, [item for mine in items for item in mine]))
        answers += [[[next(scores) for _ in mine]] for mine in items]
        progress.step(len(some))
    return per_passage(passages, answers)


def studied(model, tok, passages, notes: list[list[list[str]]], args, steps: int, log, label) -> dict:
    """A row with one: every passage is studied once for each of its lists of notes, notes[passage][sample]."""
    candidates = [Candidate(p, tuple(n)) for p, samples in zip(passages, notes) for n in samples]
    lora, study = lora_config(args, model), study_settings(args, steps)
    results = iter(study_all(model, tok, candidates, lora, study, sub_seed(args.seed, 1), args.population, log, label))
    grouped = [[next(results) for _ in samples] for samples in notes]
    train_steps = [np.mean([r["steps"] for r in group]) for group in grouped]
    return per_passage(passages, [[r["answers"] for r in group] for group in grouped], train_steps)


def ladder(model, tok, passages, policies: dict, args, work: Path) -> tuple[dict, dict]:
    """Returns {protocol: {method: scores}} and the self-edits {method: [SelfEdit]} that were used."""
    protocols = {"epochs": 0, "steps": args.steps}
    protocols = {p: n for p, n in protocols.items() if args.match in (p, "both")}
    base, shown = asked(model, tok, passages, False, "base"), asked(model, tok, passages, True, "in-context")
    if args.no_study:
        return {"none": {"base": base, "in-context": shown}}, {}
    alone = [[[]] for _ in passages]
    tables, edits = {}, {}
    for name, n in protocols.items():
        log = work / f"passage-{name}{n or args.epochs}.jsonl"
        tables[name] = {
            "base": base,
            "passage": studied(model, tok, passages, alone, args, n, log, f"passage ({name})"),
        }
    for method, adapter in {"passage+self-edit": None, **policies}.items():
        clean = merge(model, load_adapter(model, adapter)) if adapter else {}
        log, seed = work / f"{method}-sampled.jsonl", sub_seed(args.seed, 0)
        edits[method] = write_self_edits(model, tok, passages, args.samples, args, seed, log, f"{method} sample")
        texts = [e.notes for e in edits[method]]
        notes = [texts[i : i + args.samples] for i in range(0, len(texts), args.samples)]
        for name, n in protocols.items():
            log = work / f"{method}-{name}{n or args.epochs}.jsonl"
            tables[name][method] = studied(model, tok, passages, notes, args, n, log, f"{method} ({name})")
        unmerge(model, clean)
    for table in tables.values():
        table["in-context"] = shown
    return tables, edits


def show(rows: list, steps: list, title: str) -> None:
    print(f"\n{title}\n{'':20} accuracy    95 % CI        em     f1   logprob  steps   against the row above")
    deltas = {s["to"]: f"{100 * s['delta']:+5.1f} [{100 * s['ci95'][0]:+.1f}, {100 * s['ci95'][1]:+.1f}]" for s in steps}
    for r in rows:
        low, high = (100 * v for v in r["ci95"])
        scores = f"{100 * r['em']:5.1f}  {100 * r['f1']:5.1f}  {r['logprob']:7.2f}  {r.get('train_steps', 0):5.1f}"
        accuracy = f"{100 * r['accuracy']:6.1f} %  [{low:4.1f}, {high:4.1f}]"
        print(f"{r['method']:20} {accuracy}  {scores}   {deltas.get(r['method'], '')}")


def find_policies(args) -> dict:
    """{"seal-K": adapter folder} of --run and --policy. Exits if --run has no finished round."""
    found = {}
    if args.run:
        found = {int(f.parent.parent.name[6:]): f.parent for f in Path(args.run).glob("round-*/policy/adapter_config.json")}
        if not found:
            raise SystemExit(f"error: --run {args.run}: no finished round (round-K/policy) there")
    policies = {f"seal-{k}": found[k] for k in sorted(found)}
    start = max(found, default=0) + 1
    return policies | {f"seal-{k}": Path(folder) for k, folder in enumerate(args.policy, start)}


def refuse_training_passages(passages, args) -> None:
    """Exit if the run was trained on some of these passages, unless --split train asks for them."""
    before = read_json(Path(args.run) / "settings.json")
    trained = load_passages(before["data"], "train", before["skip"], before["limit"])
    both = {p.text for p in passages} & {p.text for p in trained}
    if both and args.split != "train":
        raise SystemExit(
            f"error: {args.run} was trained on {len(both)} of these passages; leave them out with --skip or --split"
        )


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    policies = find_policies(args)
    if args.run:
        refuse_training_passages(passages, args)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    out = Path(args.out)
    free = ("out", "work", "match", "steps", "run", "policy", "no_study")  # may change between two parts of a run
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings["data_sha256"] = digest(args.data)
    settings["policies"] = {name: digest(folder / "adapter_model.safetensors") for name, folder in policies.items()}
    work = open_run(args.work or Path("runs") / f"eval-{out.stem}", settings)
    tables, edits = ladder(model, tok, passages, policies, args, work)
    for protocol, table in tables.items():
        rows, steps = summarize(table, args.seed)
        write_json(
            out.with_stem(f"{out.stem}_{protocol}") if len(tables) > 1 else out,
            {
                "command": shlex.join(["python", *sys.argv]),
                "seed": args.seed,
                "model": args.model,
                "dtype": str(model.dtype),
                "n_passages": len(passages),
                "n_questions": sum(len(p.questions) for p in passages),
                "protocol": protocol,
                "settings": settings | ({"steps": args.steps} if protocol == "steps" else {}),
                "rows": rows,
                "steps": steps,
            },
        )
        how = f"{args.steps} optimiser steps" if protocol == "steps" else f"{args.epochs} epochs (the paper's way)"
        show(rows, steps, f"{len(passages)} passages, " + ("nothing studied" if args.no_study else f"{how} in every row"))
    print(f"\nSelf-edits for {passages[0].title!r}: {passages[0].text}" if edits else "")
    for method, mine in edits.items():
        print(f"\n--- {method}\n{mine[0].text.strip()}")


if __name__ == "__main__":
    main()
