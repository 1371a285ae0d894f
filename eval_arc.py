"""The ARC ladder: how many puzzles does the model solve after each way of studying their demonstrations?

    python eval_arc.py --choose --largest 10 --limit 40 --out results/arc_tasks.json    # which can be solved? (half an hour)
    python train_outer.py --task arc --tasks results/arc_tasks.json --out runs/arc --samples 5
    python eval_arc.py --tasks results/arc_tasks.json --run runs/arc       # the ladder on the held-out half
    python eval_arc.py --limit 2 --samples 2 --show                        # the two smallest of ARC-AGI-1, with pictures

Rows, each with the share of tasks whose every test output is right, and its 95 % bootstrap interval over tasks:
    icl          the model as it is, the demonstrations in its prompt; as do all rows below, it predicts greedily
    ttt-fixed    after test-time training with one setting for all tasks, GRID[0] (why most tasks of --choose are there)
    self-edit    after training as the untrained model's self-edits say; mean over --samples of them
    seal-K       the same, with self-edits that the policy wrote after outer round K (--learner policy: it trains, too)
    best-of-M    a task counts if any of the last policy's M self-edits solves it
    oracle       a task counts if a setting of GRID, three of them, solves it; of tasks that --choose found so, that is each
Rows of self-edits also say how many are "sound" (form and bounds), and how many of those are "copied" (the settings of one
of the prompt's worked examples). With --vote N there is a second number for each row that trains, "voted": two attempts by
majority over N views of the test (symmetries, orders and subsets of the demonstrations), turned back.

--choose tries the settings of GRID in turn, on the smallest tasks first, until one solves the task, and writes the solved
ones by turns to "train" and "heldout". A task with a prompt longer than the context is left out and
counted. The same settings of the same task are trained once for all rows (unless the policy trains).
"""

from pathlib import Path

import numpy as np

from common import Progress, chunks, open_run, read_json, sub_seed, write_json
from data.arc import Task
from eval_qa import bootstrap, find_policies, paired_steps, pairs_of, policy_digests, written_steps
from lora import load_adapter, merged
from puzzle import WORKED, Puzzles, known_logs, predict, read_grid, study_puzzles
from quiz import add_learner, at_least, learner, load, lora_config, make_parser, result_head
from selfedit import sample_self_edits
from train_outer import ARC, UNUSED, add_task_arguments, hide, refuse_other_source, refuse_unused

BASIC = ["use_basic_augmentations"]
GRID = [
    {"groups": BASIC, "every_token": False, "lr": 2e-3, "epochs": 4},
    {"groups": [], "every_token": False, "lr": 2e-3, "epochs": 12},
    {"groups": BASIC, "every_token": True, "lr": 1e-3, "epochs": 4},
]


def parse_arguments():
    parser = make_parser(__doc__)
    add_task_arguments(parser, "heldout")
    add = parser.add_argument_group("ladder").add_argument
    add_learner(add)
    add("--run", help="folder of a train_outer.py --task arc run: adds a row for the policy of each of its rounds")
    add("--policy", nargs="+", default=[], metavar="FOLDER", help="adapter folders to use as seal-1, seal-2, ...")
    add("--vote", type=at_least(0), default=0, help="also predict by majority over N views of the test")
    add("--samples", type=at_least(1), default=5, help="self-edits per task, averaged; M of best-of-M")
    add("--oracle", action="store_true", help="also try every setting of the grid on every task")
    add("--choose", action="store_true", help="no ladder: find the tasks that the grid can solve")
    add("--show", action="store_true", help="print each task with its first prediction, in colour")
    add("--out", default="results/arc_ladder.json", help="result file")
    add("--work", help="folder for progress, to resume a killed run; without it runs/eval- and the name of --out")
    hide(parser, UNUSED["arc"])
    parser.set_defaults(**ARC)
    args = parser.parse_args()
    refuse_unused(parser, args, UNUSED["arc"], "on ARC")
    refuse_other_source(parser, args)
    climbs = ["tasks", "run", "policy", "learner", "samples", "vote", "oracle", "show"]
    refuse_unused(parser, args, climbs if args.choose else [], "with --choose")
    return args


# -----------------------------------------------------------------------------
# pictures

PALETTE = (16, 27, 196, 34, 220, 245, 201, 208, 51, 88)  # ARC's colours in the 256 of a terminal


def picture(grid: np.ndarray) -> list[str]:
    """A grid as lines for a terminal, two blanks of colour for each cell."""
    return ["".join(f"\x1b[48;5;{PALETTE[c]}m  " for c in row) + "\x1b[0m" for row in grid]


def show_task(task: Task, predictions: list[str], title: str) -> None:
    """Demonstrations, then each test with the truth and the prediction beside it."""
    print(f"\n{task.id}: {title}")
    tests = [(a, b, read_grid(p)[0] if read_grid(p)[0] is not None else p) for (a, b), p in zip(task.test, predictions)]
    for row in (*task.train, *tests):
        blocks = [[g] if isinstance(g, str) else picture(g) for g in row]
        widths = [len(g) if isinstance(g, str) else 2 * g.shape[1] for g in row]
        for n in range(max(map(len, blocks))):
            print("   ".join(b[n] if n < len(b) else " " * w for b, w in zip(blocks, widths)))
        print()


# -----------------------------------------------------------------------------
# rows


class Ladder:
    """Rows of results[task][attempt], and the record of every attempt."""

    def __init__(self, model, tok, puzzles: Puzzles, args, work: Path):
        self.model, self.tok, self.puzzles, self.args, self.work = model, tok, puzzles, args, work
        self.tasks = [puzzles.tasks[i] for i in puzzles.prompts]
        self.solved, self.voted, self.written, self.records = {}, {}, {}, []

    def add(self, method: str, results: list[list[dict]], configs: list[list], best: bool = False) -> None:
        """A row of results[task][attempt]; best: a task counts if any attempt solved it."""
        pool = max if best else np.mean
        self.solved[method] = np.array([pool([r["solved"] for r in mine]) for mine in results])
        if self.args.vote and all("voted" in r for mine in results for r in mine):
            self.voted[method] = np.array([pool([r["voted"] for r in mine]) for mine in results])
        if not best:
            for task, mine, settings in zip(self.tasks, results, configs):
                for r, s in zip(mine, settings):
                    record = {"id": task.id, "method": method, "solved": r["solved"], "cells": r["cells"], "config": s}
                    flaw = r.get("flaw") or "diverged" * r.get("diverged", False)
                    self.records.append(record | {"flaw": flaw, "prediction": r["predictions"]})
                if self.args.show:
                    show_task(task, mine[0]["predictions"], method)

    def logs(self, method: str) -> tuple:
        """Where a row's studies are logged, and the logs of what the same model studied for the other rows."""
        log = self.work / f"{method}-studied.jsonl"
        return log, known_logs(self.args, self.work, "*-studied.jsonl", log)

    def study(self, method: str, tasks: list[Task], settings: dict) -> list[dict]:
        """Every task is studied as the settings say."""
        (log, known), candidates = self.logs(method), [(t, settings) for t in tasks]
        how = (lora_config(self.args, self.model), self.args, sub_seed(self.args.seed, 1), log, method, known)
        return study_puzzles(self.model, self.tok, candidates, *how)

    def first_to_solve(self, method: str) -> dict:
        """{task id: number of the first setting in GRID that solves it, or None}; a solved task is not tried again."""
        first = dict.fromkeys((t.id for t in self.tasks), None)
        for n, settings in enumerate(GRID):
            left = [t for t in self.tasks if first[t.id] is None]
            for task, r in zip(left, self.study(f"{method}-{n}", left, settings)):
                first[task.id] = n if r["solved"] else None
        return first

    def self_edits(self, method: str, policy=None) -> list:
        """A row: the model, or a policy, writes self-edits, and the learner learns as they say."""
        n, log = self.args.samples, self.work / f"{method}-sampled.jsonl"
        how = (n, self.args, sub_seed(self.args.seed, 0), log, f"{method} sample")
        with merged(self.model, policy):
            edits = sample_self_edits(self.model, self.tok, self.puzzles.prompts, self.puzzles.read, *how)
        log, known = self.logs(method)
        how = (self.args, sub_seed(self.args.seed, 1), log, method, known)
        with learner(self.model, policy, self.args):
            results = self.puzzles.results(self.model, self.tok, edits, *how)
        sound, shown = [e.settings for e in edits if not e.flaw], [settings for *_, settings in WORKED]
        copied = [s for s in sound if s in shown]
        self.written[method] = {"sound": len(sound) / len(edits), "copied": len(copied) / max(1, len(sound))}
        grouped = chunks(results, n)
        self.add(method, grouped, chunks([e.settings for e in edits], n))
        return grouped

    def climb(self, policies: dict) -> None:
        progress, icl = Progress("icl", len(self.tasks)), []
        for task in self.tasks:
            icl.append(predict(self.model, self.tok, [task]))
            progress.step()
        self.add("icl", icl, [[None]] * len(icl))
        fixed = self.study("ttt-fixed", self.tasks, GRID[0])
        self.add("ttt-fixed", [[r] for r in fixed], [[GRID[0]]] * len(fixed))
        last = self.self_edits("self-edit")
        for method, adapter in policies.items():
            last = self.self_edits(method, load_adapter(self.model, adapter))
        self.add(f"best-of-{self.args.samples}", last, [], best=True)
        if self.args.oracle:
            first = self.first_to_solve("oracle")
            self.solved["oracle"] = np.array([float(n is not None) for n in first.values()])

    def summary(self) -> dict:
        rows, seed = [], self.args.seed
        for method, solved in self.solved.items():
            row = {"method": method, "solved": float(solved.sum()), "n": len(solved), "rate": float(solved.mean())}
            row |= {"ci95": bootstrap(solved, seed), "attempts": 1} | self.written.get(method, {})
            if method in self.voted:
                row["voted"] = {
                    "rate": float(self.voted[method].mean()),
                    "ci95": bootstrap(self.voted[method], seed),
                    "attempts": 2,
                }
            rows.append(row)
        steps = paired_steps(self.solved, pairs_of(list(self.solved))[0], seed)
        return {"rows": rows, "steps": steps, "tasks": self.records}


def choose(ladder: Ladder) -> dict:
    """{"train": ids, "heldout": ids, "solved_by": {id: number of the first setting in GRID that solves it, or null}}."""
    by = ladder.first_to_solve("choose")
    solvable = [i for i in by if by[i] is not None]
    print(f"{len(solvable)} of {len(by)} tasks solved by some setting")
    return {"tried": len(by), "grid": GRID, "train": solvable[::2], "heldout": solvable[1::2], "solved_by": by}


def show(rows: list[dict], steps: list[dict]) -> None:
    """The ladder as a table, each row against the one above it, and the last seal-K against those below it."""
    print(f"{'':12} {'solved':>6}        {'rate':>7}    95 % CI         sound  copied   against the row above")
    deltas, others = written_steps(rows, steps)
    for r in rows:
        low, high = (100 * v for v in r["ci95"])
        written = f"{100 * r['sound']:6.0f} % {100 * r['copied']:5.0f} %" if "sound" in r else f"{'':16}"
        line = f"{r['method']:12} {r['solved']:6.1f} of {r['n']:<3} {100 * r['rate']:6.1f} %  [{low:4.1f}, {high:5.1f}]"
        print(f"{line}  {written}  {deltas.get(r['method'], '')}".rstrip())
    for (a, b), change in others.items():
        print(f"{a} to {b}: {change}")


def refuse_training_tasks(ids, args) -> None:
    """Exit if the run was trained on some of these tasks, unless --split train asks for them."""
    both = set(ids) & set(read_json(Path(args.run) / "settings.json")["ids"])
    if both and args.split != "train":
        raise SystemExit(
            f"error: {args.run} was trained on {len(both)} of these tasks; leave them out with --skip or --tasks"
        )


def main() -> None:
    args = parse_arguments()
    policies = find_policies(args, "arc")
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    puzzles = Puzzles(args, model, tok)
    if args.run:
        refuse_training_tasks(puzzles.tasks, args)
    out = Path(args.out)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "work", "run", "policy", "oracle", "show")}
    settings |= puzzles.pinned | {"policies": policy_digests(policies)}
    ladder = Ladder(model, tok, puzzles, args, open_run(args.work or Path("runs") / f"eval-{out.stem}", settings))
    head = result_head(args, model) | {"n_tasks": len(ladder.tasks), "left_out": puzzles.left_out, "settings": settings}
    if args.choose:
        write_json(out, head | choose(ladder))
        return
    ladder.climb(policies)
    result = ladder.summary()
    write_json(out, head | result)
    show(result["rows"], result["steps"])


if __name__ == "__main__":
    main()
