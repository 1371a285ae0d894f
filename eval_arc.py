"""The ARC ladder: how many puzzles does the model solve after each way of learning from their
demonstrations?

    python eval_arc.py --choose --largest 10 --limit 40 --out results/arc_tasks.json
        # which tasks can be solved at all? half an hour
    python train_outer.py arc --tasks results/arc_tasks.json --out runs/arc --samples 5
    python eval_arc.py --tasks results/arc_tasks.json --run runs/arc
        # the ladder on the held-out half
    python eval_arc.py --limit 2 --samples 2 --show
        # the two smallest of ARC-AGI-1, with pictures

Rows, each with the share of tasks whose every test output is right, and its 95 % bootstrap interval
over tasks:
    icl          the model as it is, the demonstrations in its prompt; as do all rows below, it
                 predicts greedily
    ttt-fixed    after test-time training with one setting for all tasks, GRID[0] (why most tasks of
                 --choose are there)
    self-edit    after training as the untrained model's self-edits say; mean over --samples of them
    seal-K       the same, with self-edits that the policy wrote after outer round K (--learner
                 policy: it trains, too)
    best-of-M    a task counts if any of the M self-edits of the row above solves it
    oracle       a task counts if a setting of GRID, three of them, solves it; of tasks that
                 --choose found so, that is each (the same settings under the same seed are the same
                 training, in every row)
Rows of self-edits also say how many are "sound" (form and bounds), and how many of those are
"copied" (the settings of one of the prompt's worked examples). With --vote N there is a second
number for each row that trains, "voted": two attempts by majority over N views of the test
(symmetries, orders and subsets of the demonstrations), turned back.

--choose tries the settings of GRID in turn, on the smallest tasks first, until one solves the task,
and writes the solved ones by turns to "train" and "heldout". A task with a prompt longer than the
context is left out and counted. The same settings of the same task are trained once for all rows
(unless the policy trains). With --student that model predicts and trains in all rows, and --model
writes.
"""

from pathlib import Path

import numpy as np

import arc
import data.arc
import inner
import selfedit
from arc import WORKED, Puzzles, predict, read_grid
from data.arc import Task
from inner import learner, lora_config
from lm.adapters import load_adapter
from lm.files import GOES_ON, chunks, run_main, sub_seed, write_json
from lm.flags import (
    Parser,
    add_model_flags,
    at_least,
    load,
    load_student,
    refuse_unused,
    result_head,
)
from lm.intervals import bootstrap, paired_steps, pairs_of, written_steps
from lm.log import Log, Progress
from lm.runs import (
    add_ladder_flags,
    find_policies,
    open_run,
    policy_digests,
    set_outputs,
    trained_as,
)
from lora import merged
from reward import update_and_quiz

OUT = "runs/arc_ladder.json"
BASIC = ["use_basic_augmentations"]
GRID = [
    {"groups": BASIC, "every_token": False, "lr": 2e-3, "epochs": 4},
    {"groups": [], "every_token": False, "lr": 2e-3, "epochs": 12},
    {"groups": BASIC, "every_token": True, "lr": 1e-3, "epochs": 4},
]


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser, alone=False)
    data.arc.add_flags(parser, "heldout")
    selfedit.add_flags(parser)
    inner.add_lora_flags(parser)
    arc.add_flags(parser)
    add = parser.add_argument_group("ladder").add_argument
    inner.add_learner_flag(parser)
    about = "also predict by majority over N views of the test"
    add("--vote", type=at_least(0), default=0, help=about)
    about = "self-edits per task, averaged; M of best-of-M"
    add("--samples", type=at_least(1), default=5, help=about)
    add("--oracle", action="store_true", help="also try every setting of the grid on every task")
    add("--choose", action="store_true", help="no ladder: find the tasks that the grid can solve")
    add("--show", action="store_true", help="print each task with its first prediction, in colour")
    add_ladder_flags(parser, "arc", OUT)
    parser.set_defaults(**arc.DEFAULTS)
    args = parser.parse_args()
    data.arc.refuse_other_source(parser, args)
    climbs = "tasks run policy learner samples temperature top_p vote oracle show".split()
    refuse_unused(parser, args, climbs if args.choose else [], "with --choose")
    if args.choose and not args.out:
        parser.error("--choose writes a list of tasks: where to (--out)?")
    return set_outputs(args, OUT)


# -----------------------------------------------------------------------------
# pictures

PALETTE = (16, 27, 196, 34, 220, 245, 201, 208, 51, 88)  # ARC's colours in the 256 of a terminal


def picture(grid: np.ndarray) -> list[str]:
    """A grid as lines for a terminal, two blanks of colour for each cell."""
    cell = [f"\x1b[48;5;{colour}m  " for colour in PALETTE]
    return ["".join(map(cell.__getitem__, row)) + "\x1b[0m" for row in grid]


def show_task(task: Task, predictions: list[str], title: str) -> None:
    """Demonstrations, then each test with the truth and the prediction beside it."""
    print(f"\n{task.id}: {title}")
    tests = [
        (a, b, read_grid(p)[0] if read_grid(p)[0] is not None else p)
        for (a, b), p in zip(task.test, predictions)
    ]
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

    def __init__(self, model, student, its_tok, puzzles: Puzzles, args, work: Path):
        self.model, self.student, self.its_tok = model, student, its_tok
        self.puzzles, self.args, self.work = puzzles, args, work
        self.tasks = [puzzles.tasks[i] for i in puzzles.prompts]
        self.solved, self.voted, self.written, self.records = {}, {}, {}, []

    def add(self, method: str, results: list[list[dict]], configs: list[list]) -> None:
        """A row of results[task][attempt], each attempt with the settings in configs."""
        self.pool(method, results, np.mean)
        for task, own, settings in zip(self.tasks, results, configs):
            for r, s in zip(own, settings):
                record = {
                    "id": task.id,
                    "method": method,
                    "solved": r["solved"],
                    "cells": r["cells"],
                }
                flaw = r.get("flaw") or "diverged" * r.get("diverged", False)
                record |= {"config": s, "flaw": flaw, "prediction": r["predictions"]}
                self.records.append(record)
            if self.args.show:
                show_task(task, own[0]["predictions"], method)

    def pool(self, method: str, results: list[list[dict]], of) -> None:
        """A task counts as `of` its attempts says: their mean, or their max."""
        voted = self.args.vote and all("voted" in r for own in results for r in own)
        for key, table in (("solved", self.solved), ("voted", self.voted))[: 1 + bool(voted)]:
            scores = lambda own, key=key: of([r[key] for r in own])  # noqa: E731
            table[method] = np.array(list(map(scores, results)))

    def train(self, method: str, candidates: list) -> Log:
        """An inner update and a prediction for what no row has trained yet."""
        log = self.puzzles.log(self.work / method / "scored.jsonl")
        groups = self.puzzles.populations(candidates, log)
        how = (lora_config(self.args, self.student), sub_seed(self.args.seed, 1), log)
        update_and_quiz(self.student, self.its_tok, groups, *how, self.puzzles.quiz, method)
        return log

    def fixed(self, method: str, tasks: list[Task], settings: dict) -> list[dict]:
        """Every task is trained on as the settings say."""
        seed = sub_seed(self.args.seed, 1)
        candidates = [self.puzzles.candidate(t, settings, seed) for t in tasks]
        log = self.train(method, candidates)
        return [self.puzzles.result(t, c, log) for t, c in zip(tasks, candidates)]

    def first_to_solve(self, method: str) -> dict:
        """{task id: number of the first setting in GRID that solves it, or None}; a solved task is
        not tried again."""
        first = dict.fromkeys((t.id for t in self.tasks), None)
        for n, settings in enumerate(GRID):
            left = [t for t in self.tasks if first[t.id] is None]
            for task, r in zip(left, self.fixed(f"{method}-{n}", left, settings)):
                first[task.id] = n if r["solved"] else None
        return first

    def self_edits(self, method: str, policy=None) -> list:
        """A row: the model, or a policy, writes self-edits, and the learner trains as they say."""
        n, log = self.args.samples, self.work / method / "sampled.jsonl"
        with merged(self.model, policy):
            seed = sub_seed(self.args.seed, 0)
            edits = self.puzzles.sample(self.model, 0, seed, log, f"{method} sample")
        candidates = self.puzzles.candidates(edits, sub_seed(self.args.seed, 1))
        with learner(self.student, policy, self.args):
            log = self.train(method, candidates)
        results = []
        for e, c in zip(edits, candidates):
            results.append(self.puzzles.result(self.puzzles.tasks[e.passage], c, log, e.flaw))
        sound = [e.config for e in edits if not e.flaw]
        shown = [settings for *_, settings in WORKED * self.args.shots]
        copied = [s for s in sound if s in shown]
        shares = {"sound": len(sound) / len(edits), "copied": len(copied) / max(1, len(sound))}
        self.written[method] = shares
        grouped = chunks(results, n)
        self.add(method, grouped, chunks([e.config for e in edits], n))
        return grouped

    def climb(self, policies: dict) -> None:
        progress, icl = Progress("icl", len(self.tasks)), []
        for task in self.tasks:
            icl.append(predict(self.student, self.its_tok, [task]))
            progress.step()
        self.add("icl", icl, [[None]] * len(icl))
        fixed = self.fixed("ttt-fixed", self.tasks, GRID[0])
        self.add("ttt-fixed", [[r] for r in fixed], [[GRID[0]]] * len(fixed))
        last = self.self_edits("self-edit")
        for method, adapter in policies.items():
            last = self.self_edits(method, load_adapter(self.model, adapter))
        self.pool(f"best-of-{self.args.samples}", last, max)  # a task counts if any solved it
        if self.args.oracle:
            first = self.first_to_solve("oracle")
            self.solved["oracle"] = np.array([float(n is not None) for n in first.values()])

    def summary(self) -> dict:
        rows, seed = [], self.args.seed
        attempts = {f"best-of-{self.args.samples}": self.args.samples, "oracle": len(GRID)}
        for method, solved in self.solved.items():
            row = {"method": method, "solved": float(solved.sum()), "n": len(solved)}
            row |= {"rate": float(solved.mean()), "ci95": bootstrap(solved, seed)}
            row |= {"attempts": attempts.get(method, 1)} | self.written.get(method, {})
            flaws = [r["flaw"] for r in self.records if r["method"] == method]
            row["too_long"] = flaws.count("too long")
            if method in self.voted:
                voted = self.voted[method]
                row["voted"] = {"rate": float(voted.mean()), "ci95": bootstrap(voted, seed)}
                row["voted"]["attempts"] = 2 * row["attempts"]
            rows.append(row)
        steps = paired_steps(self.solved, pairs_of(list(self.solved))[0], seed)
        return {"rows": rows, "steps": steps, "tasks": self.records}


def choose(ladder: Ladder) -> dict:
    """{"train": ids, "heldout": ids, "solved_by": {id: number of the first setting in GRID that
    solves it, or null}}."""
    by = ladder.first_to_solve("choose")
    solvable = [i for i in by if by[i] is not None]
    print(f"{len(solvable)} of {len(by)} tasks solved by some setting")
    split = {"train": solvable[::2], "heldout": solvable[1::2]}
    return {"tried": len(by), "grid": GRID} | split | {"solved_by": by}


def show(rows: list[dict], steps: list[dict]) -> None:
    """The ladder as a table, each row against the one above it, and the last seal-K against those
    below it."""
    columns = "95 % CI         sound  copied   against the row above"
    print(f"{'':12} {'solved':>6}        {'rate':>7}    {columns}")
    deltas, others = written_steps(rows, steps)
    for r in rows:
        low, high = (100 * v for v in r["ci95"])
        written = f"{'':16}"
        if "sound" in r:
            written = f"{100 * r['sound']:6.0f} % {100 * r['copied']:5.0f} %"
        line = f"{r['method']:12} {r['solved']:6.1f} of {r['n']:<3} {100 * r['rate']:6.1f} %"
        line += f"  [{low:4.1f}, {high:5.1f}]  {written}  {deltas.get(r['method'], '')}"
        print(line.rstrip())
    for (a, b), change in others.items():
        print(f"{a} to {b}: {change}")
    for r in rows:
        if "voted" in r:
            low, high = (100 * v for v in r["voted"]["ci95"])
            told = f"{100 * r['voted']['rate']:.1f} %  [{low:.1f}, {high:.1f}]"
            print(f"{r['method']}, two attempts by vote: {told}")
        if r.get("too_long"):
            print(f"{r['method']}: {r['too_long']} attempts without a training sequence that fits")


def refuse_training_tasks(ids, args) -> None:
    """Exit if the run, or a policy, was trained on some of these tasks, unless --split train asks
    for them."""
    for where, before in [] if args.split == "train" else trained_as(args, "ids"):
        if both := set(ids) & set(before["ids"]):
            raise SystemExit(
                f"error: {where} was trained on {len(both)} of these tasks; "
                "leave them out with --skip or --tasks"
            )


def main() -> None:
    args = parse_arguments()
    policies = find_policies(args, "arc")
    model, tok = load(args)
    student, its_tok = load_student(args, model, tok)
    lora_config(args, student)  # complains now rather than after sampling
    puzzles = Puzzles(args, model, tok, student, its_tok)
    refuse_training_tasks(puzzles.tasks, args)
    free = ("out", "work", "run", "policy", "oracle", "show")  # may change when resumed
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings |= puzzles.pinned | {"policies": policy_digests(policies)}
    work = open_run(args.work, settings, model, student)
    ladder = Ladder(model, student, its_tok, puzzles, args, work)
    head = result_head(args, model) | {"n_tasks": len(ladder.tasks), "left_out": puzzles.left_out}
    head["settings"] = settings
    if args.choose:
        write_json(args.out, head | choose(ladder))
        return
    ladder.climb(policies)
    result = ladder.summary()
    write_json(args.out, head | result)
    show(result["rows"], result["steps"])


if __name__ == "__main__":
    run_main(main, GOES_ON, alone=False)
