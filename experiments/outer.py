"""Ways to reinforce, side by side: the same passages, equally many samples, equal budgets of study.

    python experiments/outer.py                                             # -> results/outer.json
    python experiments/outer.py --ways one two two-apart --work runs/agents \
        --out results/agents.json
    python experiments/outer.py --ways keep-6 keep-3 keep-2 keep-1 --limit 24 --samples 8 \
        --rounds 2 --work runs/keep --out results/keep.json

Each way is a run of train_outer.py, once for each seed; round 1 has the same self-edits and studies
in all (of as many agents), so it is made once. The outer update is an epoch or more of what a way
learns from, which is not equally much: "steps" counts it.

    restem, weighted, grpo, pairs       --settings, --outer
    one, two, two-apart                 as weighted, by one agent with all samples, or by two with
                                        half of them, who learn from the best of both, or of their
                                        own (--agents 2 --exchange)
    keep-6, keep-3, keep-2, keep-1      --reward proxy --select notes, so many notes about each
                                        sentence (--keep); studied by the recipe of the flags

"rounds" says of each way and round, a mean over seeds (and over passages, with an interval):
    reward      what the self-edits of the round earned
    repeats     texts that say the same twice (docs/OUTPUT.md), as a share
    endless     texts that know no end, of which repeats are not counted
    distinct    unlike pairs of neighbouring words, as a share of all in the texts on a passage
    surprise    nats per token: how unlikely its own words were to the policy that wrote them
    apart       nats per token: how much likelier they were to it than to the base model
    steps       of the outer update after it
Surprise and apart are of --probed texts, at a temperature of 1 (they were sampled at another, or
these would be entropy and KL divergence). "rows" says what self-edits of the untrained model, and
of each way's last policies, are worth on evaluation passages, one self-edit on each by each policy,
studied as it says (or as the flags do); "steps" are differences on the same passages.
"""

import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
from data.qa import counts, load_passages
from inner import laid_out, lora_config
from lm.adapters import load_adapter
from lm.files import GOES_ON, check_output, digest, read_json, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap, paired_steps
from lm.outer import log_probs
from lm.packing import Example
from lm.runs import ROOT, open_run, read_settings
from lora import merged
from reward import NOTHING, accuracy_of, edit_candidate, study, to_imitate
from selfedit import (
    add_settings_flags,
    note_prompts,
    policy_example,
    read_edits,
    settle,
    write_self_edits,
)

RULES = ("restem", "weighted", "grpo", "pairs")
FIXED = ["--settings", "--outer-rank", "8", "--outer-alpha", "16"]
ROWS = [*FIXED, "--outer-row-len", "2048"]
WAYS = {rule: ["--outer", rule, *ROWS] for rule in RULES} | {"pairs": ["--outer", "pairs", *FIXED]}
WAYS |= {"one": WAYS["weighted"], "two": [*WAYS["weighted"], "--agents", "2"]}
WAYS |= {"two-apart": [*WAYS["two"], "--exchange", "own"]}
BY_PROXY = ["--reward", "proxy", "--select", "notes", "--outer-epochs", "1", "--keep"]
WAYS |= {f"keep-{keep}": [*BY_PROXY, str(keep)] for keep in (6, 3, 2, 1)}
PASSED_ON = ("model", "device", "dtype", "data", "split", "skip", "limit", "rounds")
PASSED_ON += ("population", "rank", "alpha", "targets", "top_layers", "row_len", "shots")
PASSED_ON += ("temperature", "top_p", "max_new", "compile")


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    add_settings_flags(parser)
    data.qa.add_flags(parser, "train", limit=8)
    add = parser.add_argument_group("experiment").add_argument
    add("--ways", nargs="+", default=list(RULES), choices=WAYS, help="compared with each other")
    add("--seeds", type=at_least(1), default=2, help="runs of each way")
    add("--rounds", type=at_least(1), default=3, help="outer rounds")
    add("--samples", type=int, default=6, help="self-edits per passage, of all agents")
    add("--held-out", type=at_least(1), default=24, help="evaluation passages")
    add("--probed", type=at_least(1), default=64, help="texts of a round that are measured anew")
    add("--work", default="runs/outer", help="folder of the runs, to resume a killed one")
    add("--out", default="results/outer.json", help="result file")
    parser.set_defaults(settings=True, budget=3072)
    args = parser.parse_args()
    if len({way.startswith("keep") for way in args.ways}) > 1:
        parser.error("--ways: those that the proxy rewards are not compared with the others")
    if args.ways[0].startswith("keep"):
        args.settings = False
        refuse_unused(parser, args, ["style", "budget"], "with the proxy")
    else:
        unused = ["style", "lr", "steps", "epochs"]
        refuse_unused(parser, args, unused, "here, where self-edits say how they are studied")
    settle(args)
    if args.samples < 4 or args.samples % 2:
        parser.error("--samples: an even number of at least 4, of which two agents have half each")
    if len(set(args.ways)) < len(args.ways):
        parser.error("--ways: each once")
    return args


# -----------------------------------------------------------------------------
# training


def agents_of(way: str) -> int:
    return 2 if "--agents" in WAYS[way] else 1


def train(args, way: str, seed: int, work: Path) -> Path:
    """The run of one way; what it has done is not done again."""
    out, agents = work / f"{way}-{seed}", agents_of(way)
    first = next(w for w in args.ways if agents_of(w) == agents)
    if way != first and not out.is_dir():
        logs, copy = work / f"{first}-{seed}" / "round-1", work / "copy"
        (copy / "round-1").mkdir(parents=True, exist_ok=True)
        for path in [*logs.glob("sampled*.jsonl"), *logs.glob("scored.jsonl")]:
            shutil.copy(path, copy / "round-1")
        copy.rename(out)  # all at once
    flags, names = [], PASSED_ON + (("budget",) if args.settings else ("lr", "steps", "epochs"))
    for name in names:
        values = getattr(args, name)
        values = values if isinstance(values, list) else [values]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    command = [sys.executable, ROOT / "train_outer.py", "qa", *flags, *WAYS[way]]
    command += ["--samples", str(args.samples // agents), "--seed", str(seed), "--out", str(out)]
    print(f"--- {way}, seed {seed}", flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(f"error: the run in {out} stopped")
    return out


# -----------------------------------------------------------------------------
# what its rounds were like


def unlike_pairs(texts: list[str]) -> float:
    """Unlike pairs of neighbouring words, as a share of all."""
    found = []
    for text in texts:
        words = text.lower().split()
        found += zip(words, words[1:])
    return len(set(found)) / max(1, len(found))


def surprise(model, run: Path, k: int, edits: list, prompts: dict, args) -> dict:
    """{"surprise", "apart"} of some texts of round k, to the policy that wrote them, the first of
    several agents'. They stand in the round's folder once they are known."""
    known, texts = run / f"round-{k}" / "surprise.json", []
    if known.is_file():
        return read_json(known)
    for e in edits:
        for prompt, part in zip(prompts[e.passage], e.parts, strict=True):
            if part.ids and e.agent == 1:
                texts.append(Example.reply(prompt, part.token_ids))
    rng = np.random.default_rng(sub_seed(args.seed, k))
    some = rng.permutation(len(texts))[: args.probed]
    rows = laid_out([texts[i] for i in some], row_len=1024)
    policy = load_adapter(model, run / f"round-{k - 1}" / "policy") if k > 1 else None
    with merged(model, policy):
        own = np.concatenate([row.cpu().numpy() for row in log_probs(model, rows)])
    base = np.concatenate([row.cpu().numpy() for row in log_probs(model, rows)])
    found = {"surprise": float(-own.mean()), "apart": float((own - base).mean())}
    write_json(known, found)
    return found


def outer_steps(tok, run: Path, edits: list, prompts: dict) -> int:
    """Steps of the outer update of a run, after a round with these self-edits: of all agents."""
    how, total = read_settings(run), 0
    for agent in {e.agent for e in edits}:
        shown = edits if how["exchange"] == "all" else [e for e in edits if e.agent == agent]
        pairs = to_imitate(prompts, shown, how["select"], how["keep"], how["outer"])
        examples = [policy_example(tok, *pair) for pair in pairs]
        rows = len(laid_out(examples, how["outer_row_len"]))
        total += how["outer_epochs"] * (len(pairs) // 2 if how["outer"] == "pairs" else rows)
    return total


def round_of(model, tok, run: Path, k: int, passages, prompts: dict, args) -> dict:
    """What round k of a run was like; "reward" has a value for each passage."""
    edits, found = read_edits(run / f"round-{k}" / "candidates.jsonl"), {"reward": []}
    distinct, flaws = [], []
    for p in passages:
        own = [e for e in edits if e.passage == p.id]
        found["reward"].append(float(np.mean([e.reward for e in own])))
        texts = []
        for e in own:
            texts += [part.text for part in e.parts if part.text and part.style != "settings"]
            flaws += [part.flaw for part in e.parts if part.text]
        distinct.append(unlike_pairs(texts))
    found |= {"distinct": float(np.mean(distinct))}
    for flaw in ("repeats", "endless"):
        found[flaw] = flaws.count(flaw) / max(1, len(flaws))
    found["steps"] = outer_steps(tok, run, edits, prompts)
    return found | surprise(model, run, k, edits, prompts, args)


def rounds_of(model, tok, runs: list[Path], passages, args) -> list[dict]:
    rounds, prompts = [], note_prompts(tok, passages, args)
    for k in range(1, args.rounds + 1):
        each = [round_of(model, tok, run, k, passages, prompts, args) for run in runs]
        earned = np.mean([own.pop("reward") for own in each], axis=0)
        row = {"round": k, "reward": float(earned.mean()), "ci95": bootstrap(earned, args.seed)}
        for name in each[0]:
            row[name] = float(np.mean([own[name] for own in each]))
        rounds.append(row)
    return rounds


# -----------------------------------------------------------------------------
# what its policies are worth


def accuracies(model, tok, policy, passages, args, name: str, seed: int, work: Path):
    """Quiz accuracy on each passage, after a self-edit of the policy."""
    log = work / f"{name}-sampled.jsonl"
    with merged(model, load_adapter(model, policy) if policy else None):
        edits = write_self_edits(model, tok, passages, 1, args, seed, log, f"{name} sample")
    candidates = []
    for n, (passage, e) in enumerate(zip(passages, edits)):
        candidates.append(edit_candidate(tok, n, passage, e, args, seed)[0])
    some = [c for c in candidates if c]
    results = iter(study(model, tok, some, args, seed, work / f"{name}.jsonl", f"{name} study"))
    nothing = NOTHING["accuracy"]
    return np.array([accuracy_of(next(results)) if c else nothing for c in candidates])


def held_out(model, tok, runs: dict, passages, args, work: Path) -> dict:
    """runs {way: its run of each seed} -> rows and steps."""
    table, rows = {}, []
    for way in ("untrained", *args.ways):
        found = []
        for seed in range(args.seeds):
            own, run = sub_seed(args.seed, 1, seed), runs[way][seed] if way in runs else None
            folders = sorted((run / f"round-{args.rounds}").glob("policy*")) if run else [None]
            for a, folder in enumerate(folders):
                name = f"{way}-{seed}" + f"-{a + 1}" * (a > 0)
                found.append(accuracies(model, tok, folder, passages, args, name, own, work))
        table[way] = np.mean(found, axis=0)
        each = [float(values.mean()) for values in found]
        row = {"row": way, "accuracy": float(table[way].mean()), "policies": each}
        rows.append(row | {"ci95": bootstrap(table[way], args.seed)})
        print(f"{way:12} {100 * row['accuracy']:.1f} %", flush=True)
    pairs = [("untrained", way) for way in args.ways] + list(combinations(args.ways, 2))
    return {"rows": rows, "steps": paired_steps(table, pairs, args.seed)}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    others = load_passages(args.data, "heldout", 0, args.held_out)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    if both := {p.id for p in passages} & {p.id for p in others}:
        told = f"{len(both)} of the passages to train on are among those that are held out"
        raise SystemExit(f'error: {args.data}: {told}; give each entry a "split"')
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "ways", "seeds")}
    work, runs = open_run(args.work, settings | {"data_sha256": digest(args.data)}, model), {}
    for seed in range(args.seed, args.seed + args.seeds):
        for way in args.ways:
            runs.setdefault(way, []).append(train(args, way, seed, work))
    rounds = {way: rounds_of(model, tok, own, passages, args) for way, own in runs.items()}
    head = result_head(args, model) | counts(others) | {"n_train": len(passages)}
    head |= {"settings": vars(args), "rounds": rounds}
    write_json(args.out, head | held_out(model, tok, runs, others, args, work))


if __name__ == "__main__":
    run_main(main, GOES_ON)
