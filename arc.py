"""ARC, the few-shot domain: a self-edit says *how to train* on a puzzle, the inner update is
test-time training, the quiz is the puzzle's test grid.

A self-edit is a JSON object (arXiv 2506.10943, section 4); the model chooses from the task's
demonstrations:

    {"data_generation": {"use_basic_augmentations": true, "use_size_augmentations": false,
                         "use_chain_augmentations": false, "use_repeat_augmentations": false},
     "training": {"strategy": "train_using_output_tokens", "learning_rate": 0.001,
                  "num_train_epochs": 2}}

data/arc.py makes training tasks out of the demonstrations as it says; an inner update trains on
them; then the model predicts the outputs of the test inputs, which no training task contains.

A grid is compact text, one token for a cell and one for a row's end, whatever the tokenizer would
have merged. docs/PAPER.md says where this departs from the paper.

Top to bottom: grids as tokens, the self-edit, flags, training, predicting.
"""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np

from data.arc import GROUPS, INVERSE, LARGEST, SYMMETRIES, Task, chosen_tasks, training_tasks
from inner import Outcome, SFTConfig
from lm.files import chunks, fingerprint, sub_seed
from lm.flags import at_least
from lm.log import Log
from lm.packing import Example
from lm.tokenizer import Tokenizer
from lora import Adapters
from quiz import answer_logprobs
from reward import Candidate
from sampler import generate
from selfedit import Part, SelfEdit, first_object, sample_self_edits

# -----------------------------------------------------------------------------
# grids as tokens


@functools.cache
def symbols(tok: Tokenizer) -> list[int]:
    """The tokens of the colours 0 to 9, and last that of a row's end."""
    return [tok.encode(symbol)[0] for symbol in "0123456789\n"]


def grid_ids(tok: Tokenizer, grid: np.ndarray) -> list[int]:
    """One token per cell, one newline token after each row: [[1, 2], [3, 4]] -> "1" "2" "\\n" "3"
    "4" "\\n"."""
    *digits, newline = symbols(tok)
    ids = []
    for row in grid:
        ids += [*(digits[c] for c in row), newline]
    return ids


def read_grid(text: str) -> tuple[np.ndarray | None, str]:
    """Predicted text -> (grid, ""), or (None, why it is none)."""
    rows = text.strip("\n").split("\n")
    if not text.strip() or not all(row and set(row) <= set("0123456789") for row in rows):
        return None, "not a grid"
    if len({len(row) for row in rows}) > 1:
        return None, "rows of unequal length"
    if max(len(rows), len(rows[0])) > LARGEST:
        return None, f"larger than {LARGEST} x {LARGEST}"
    return np.array([list(map(int, row)) for row in rows], dtype=np.int8), ""


def pair_ids(tok: Tokenizer, a: np.ndarray, b: np.ndarray | None) -> tuple[list[int], list[int]]:
    """Token ids of one pair: what asks ("input:\\n" grid "output:\\n"), and what answers (grid,
    end); b None: no answer."""
    query = [*tok.encode("input:\n"), *grid_ids(tok, a), *tok.encode("output:\n")]
    return query, [] if b is None else [*grid_ids(tok, b), tok.end_ids[0]]


def task_prompt(tok: Tokenizer, task: Task, test: int = 0) -> list[int]:
    """The demonstrations, then a test input, up to where its output begins."""
    ids = [t for a, b in task.train for part in pair_ids(tok, a, b) for t in part]
    return ids + pair_ids(tok, task.test[test][0], None)[0]


def task_example(tok: Tokenizer, task: Task, every_token: bool) -> Example:
    """One training task as a training sequence. The loss counts every token, or those of the
    outputs; not of the first demonstration's, which nothing tells."""
    ids, counts = [], []
    for n, (a, b) in enumerate((*task.train, *task.test)):
        for part, counted in zip(pair_ids(tok, a, b), (every_token, every_token or n > 0)):
            ids += part
            counts += [counted] * len(part)
    return Example(tuple(ids), tuple(counts))


# -----------------------------------------------------------------------------
# the self-edit

STRATEGIES = ("train_using_all_tokens", "train_using_output_tokens")
MIN_LR, MAX_LR = 1e-6, 1e-2  # a smaller one hardly moves a weight
MAX_EPOCHS, MAX_STEPS, BATCH = 100, 375, 2  # the last two are the paper's

INSTRUCTION = (
    "A model is to learn the rule of a puzzle from the examples below. Decide how it should be "
    "trained. Which data: basic augmentations (rotations, flips, shifts, mirrors), size "
    "augmentations (larger cells), chain augmentations (a rotation or flip, then larger), repeat "
    "augmentations (tiling). Which tokens the loss counts, the learning rate and the number of "
    "epochs. Reply with one JSON object and nothing else."
)
EXAMPLE = {"groups": ["use_basic_augmentations"], "every_token": False, "lr": 1e-3, "epochs": 2}
WORKED = [  # what the prompt shows: tiny puzzles, and settings from all over the range
    ([[1, 0], [2, 0]], [[0, 1], [0, 2]], EXAMPLE),
    ([[1, 2]], [[3, 4]], EXAMPLE | {"groups": [], "every_token": True, "lr": 2e-3, "epochs": 5}),
    ([[5]], [[5, 5], [5, 5]], EXAMPLE | {"groups": list(GROUPS)[1:3], "lr": 5e-4, "epochs": 3}),
    (
        [[0, 7], [0, 0]],
        [[7, 0], [0, 0]],
        EXAMPLE | {"groups": list(GROUPS), "every_token": True, "epochs": 1},
    ),
    ([[3, 0]], [[3, 0, 3, 0]], EXAMPLE | {"groups": list(GROUPS)[::3], "lr": 3e-3, "epochs": 4}),
    ([[6, 6], [0, 6]], [[8, 8], [0, 8]], EXAMPLE | {"groups": [], "lr": 2e-3, "epochs": 8}),
]
SCHEMA = '{"data_generation": {' + ", ".join(f'"{g}": true or false' for g in GROUPS)
SCHEMA += f'}}, "training": {{"strategy": "{STRATEGIES[0]}" or "{STRATEGIES[1]}", '
SCHEMA += '"learning_rate": number, "num_train_epochs": whole number}}'


def settings_text(settings: dict) -> str:
    """The self-edit that says so: what parse_settings() reads as these settings."""
    data = {g: g in settings["groups"] for g in GROUPS}
    strategy = STRATEGIES[0 if settings["every_token"] else 1]
    training = {
        "strategy": strategy,
        "learning_rate": settings["lr"],
        "num_train_epochs": settings["epochs"],
    }
    return json.dumps({"data_generation": data, "training": training})


def settings_prompt(tok: Tokenizer, task: Task, shots: int = 1) -> list[int]:
    """Token ids of the chat that asks how to study `task`, after six worked examples, or with
    shots=0 after a form."""

    def question(pairs):
        shown = tok.decode(
            [t for a, b in pairs for t in (*pair_ids(tok, a, None)[0], *grid_ids(tok, b))]
        )
        return {
            "role": "user",
            "content": f"{INSTRUCTION}{'' if shots else ' Its form: ' + SCHEMA}\n\n{shown.strip()}",
        }

    worked = [
        (question([(np.array(a), np.array(b))]), settings_text(settings))
        for a, b, settings in WORKED * shots
    ]
    replied = [
        m for asked, reply in worked for m in (asked, {"role": "assistant", "content": reply})
    ]
    return tok.chat([*replied, question(task.train)])


def parse_settings(text: str, ended: bool) -> tuple[dict, str]:
    """Sampled text -> (settings, flaw): {"groups": [...], "every_token": bool, "lr": float,
    "epochs": int}, or {} and one of "empty", "endless", "malformed" (no JSON object of the form),
    "out of bounds". Text around the first object is ignored.
    """
    value, flaw = first_object(text, ended)
    if flaw:
        return {}, flaw
    try:
        data, training = value["data_generation"], value["training"]
        chosen = {g: data[g] for g in GROUPS}
        strategy, lr, epochs = (
            training[k] for k in ("strategy", "learning_rate", "num_train_epochs")
        )
        number = type(lr) in (int, float) and type(epochs) is int
        if (
            not number
            or strategy not in STRATEGIES
            or not all(type(v) is bool for v in chosen.values())
        ):
            return {}, "malformed"
    except (KeyError, TypeError):
        return {}, "malformed"
    if not (MIN_LR <= lr <= MAX_LR and 1 <= epochs <= MAX_EPOCHS):
        return {}, "out of bounds"
    groups = [g for g in GROUPS if chosen[g]]
    return {
        "groups": groups,
        "every_token": strategy == STRATEGIES[0],
        "lr": float(lr),
        "epochs": epochs,
    }, ""


# -----------------------------------------------------------------------------
# flags

# Of flags that passages have, too. The targets are the paper's; a small model needs all layers.
DEFAULTS = {
    "targets": ["q_proj", "v_proj", "gate_proj", "down_proj", "up_proj"],
    "top_layers": 0,
    "population": 4,
}


def add_flags(parser) -> None:
    about = "longest self-edit, in tokens"
    parser.add_argument("--max-new", type=at_least(1), default=160, help=about)
    add = parser.add_argument_group("test-time training").add_argument
    about = "most training tasks made of one task"
    add("--augmented", type=at_least(1), default=32, help=about)


# -----------------------------------------------------------------------------
# training

# Field of a model's config.json: ids of the tasks that experiments/warm.py trained it on.
SEEN = "arc_tasks_seen"
LONGEST = 2048  # tokens of a training sequence
# Largest sum, over a step's sequences, of their squared lengths: attention keeps as much a head.
ROOM = 1 << 20
NOTHING = {"flaw": "", "steps": 0, "tokens": 0, "loss": None, "diverged": False}
NOTHING |= {"solved": 0.0, "voted": 0.0, "cells": 0.0, "logprob": -100.0, "predictions": []}


def puzzle_candidate(
    tok, task: Task, settings: dict, limit: int, seed: int, context: int
) -> Candidate:
    """A task and the training sequences that the settings make of it, at most `limit`; none longer
    than `context` or LONGEST. Equal settings of one task have one name, and are trained once."""
    rng = np.random.default_rng([seed, *task.id.encode()])

    def example(t: Task) -> Example:
        return task_example(tok, t, settings["every_token"])

    fits = lambda t: len(example(t).ids) <= min(context, LONGEST)  # noqa: E731
    examples = list(map(example, training_tasks(task, settings["groups"], limit, rng, fits)))
    config = SFTConfig(
        settings["lr"], settings["epochs"], schedule="cosine", row_len=0, batch=BATCH
    )
    return Candidate(json.dumps([task.id, settings]), task, examples, config)


def refusal(c: Candidate) -> str:
    """Why a candidate is not trained: "too long", no training sequence fits; "too many steps", as
    in the paper; or ""."""
    if not c.examples:
        return "too long"
    return "too many steps" if c.config.total_steps(len(c.examples)) > MAX_STEPS else ""


def longest_sequence(c: Candidate) -> int:
    return max(len(e.ids) for e in c.examples)


def memory_groups(lengths: list[int], size: int) -> list[list[int]]:
    """Which candidates train together, by the lengths of their longest sequences, which ascend: at
    most `size`, and fewer where sequences are long. memory_groups([100, 100, 900, 900], 4) -> [[0,
    1], [2], [3]]."""
    groups = []
    for n, length in enumerate(lengths):
        if (
            not groups
            or len(groups[-1]) >= size
            or (len(groups[-1]) + 1) * BATCH * length**2 > ROOM
        ):
            groups.append([])
        groups[-1].append(n)
    return groups


class Puzzles:
    """The domain as train_outer.py and eval_arc.py see it: prompts, sampling, candidates, quiz,
    credit."""

    def __init__(self, args, model, tok, student, its_tok):
        self.args, self.tok, self.its_tok = args, tok, its_tok
        self.context = min(m.config.max_seq_len for m in (model, student))
        tasks = chosen_tasks(args)
        for name, m in ((args.model, model), (args.student, student)):
            if both := tasks.keys() & {*m.config.hf.get(SEEN, [])}:
                told = f"error: {name} was trained on {len(both)} of these tasks"
                raise SystemExit(f"{told}; leave them out")
        prompts = {i: settings_prompt(tok, t, args.shots) for i, t in tasks.items()}
        self.left_out = []
        for i, prompt in prompts.items():
            answer = answer_room(its_tok, tasks[i], with_prompt=True)
            needed = max(len(prompt) + args.max_new, answer)
            self.left_out += [i] if needed > self.context else []
        if self.left_out:
            counts = f"{len(self.left_out)} of {len(prompts)} tasks left out"
            print(f"{counts}, their prompts are longer than the context: {' '.join(self.left_out)}")
        self.prompts = {i: [p] for i, p in prompts.items() if i not in self.left_out}
        self.tasks = {i: tasks[i] for i in self.prompts}
        if not self.tasks:
            raise SystemExit(f"error: {args.tasks or args.data}: no tasks left to work on")
        keys = repr([t.key for t in self.tasks.values()]).encode()
        # What a resumed run must find unchanged, wherever the tasks come from.
        self.pinned = {"ids": list(self.tasks), "data_sha256": fingerprint(keys)}

    @staticmethod
    def read(id: str, sampled: list[tuple]) -> SelfEdit:
        [(text, ended)] = sampled
        settings, flaw = parse_settings(text, ended)
        part = Part(text, target="" if flaw else settings_text(settings), flaw=flaw)
        return SelfEdit(id, [part], "settings", flaw, config=settings)

    def sample(self, model, k: int, seed: int, log: Path, label: str) -> list[SelfEdit]:
        """SE_1 .. SE_M for each task, by the model as it is now, in any round k."""
        how = (self.args.samples, self.args, seed, log, label)
        return sample_self_edits(model, self.tok, self.prompts, self.read, *how)

    def seed(self, k: int) -> int:
        """Of round k's training: one for all rounds, so that what the base model was trained on in
        an earlier round need not be trained again; a policy that learns is another model in every
        round."""
        return sub_seed(self.args.seed, k, 1) if self.args.learner == "policy" else self.args.seed

    def log(self, path: Path) -> Log:
        """Results at `path`; those of the same model in the rounds, or rows, beside it are known,
        too."""
        others = {*path.parent.parent.glob(f"*/{path.name}")} - {path}
        known = [] if self.args.learner == "policy" else sorted(others)
        needed = NOTHING.keys() - {"voted"}
        return Log(path, lambda result: result["solved"], known, needed)

    def candidate(self, task: Task, settings: dict, seed: int) -> Candidate:
        how = (self.args.augmented, seed, self.context)
        return puzzle_candidate(self.its_tok, task, settings, *how)

    def candidates(self, edits: list[SelfEdit], seed: int) -> list[Candidate | None]:
        """One for each self-edit; None for a flawed one, which is not trained and earns nothing."""
        return [
            None if e.flaw else self.candidate(self.tasks[e.passage], e.config, seed) for e in edits
        ]

    def populations(self, candidates: list, log: Log) -> list[list[Candidate]]:
        """What is left to be trained, each once, in groups that fit the memory, like lengths
        together."""
        unique = {c.name: c for c in candidates if c and not refusal(c) and c.name not in log.known}
        order = sorted(
            unique.values(),
            key=lambda c: (longest_sequence(c), c.config.total_steps(len(c.examples)), c.name),
        )
        groups = memory_groups([longest_sequence(c) for c in order], self.args.population)
        return [list(map(order.__getitem__, group)) for group in groups]

    def quiz(
        self, model, tok, candidates, adapters: Adapters, outcomes: list[Outcome]
    ) -> list[dict]:
        """Let each candidate predict under its adapter. Returns for each {"flaw", "steps",
        "tokens", "loss", "diverged", and what predict() says}; a diverged one has solved nothing.
        With --vote, also "voted": 1 if every test output is one of vote()'s two.
        """
        results = []
        for outcome, result in zip(
            outcomes, predict(model, tok, [c.subject for c in candidates], adapters)
        ):
            failed = ("solved", "voted", "cells", "logprob") if outcome.diverged else ()
            results.append(
                {"flaw": ""} | outcome.record() | result | {k: NOTHING[k] for k in failed}
            )
        views = vars(self.args).get("vote", 0)  # votes are the ladder's
        for n, c in enumerate(candidates if views else []):
            if not results[n]["diverged"]:
                rng = np.random.default_rng(sub_seed(self.args.seed, 1))
                attempts = vote(model, tok, c.subject, adapters.pick([n]), views, rng)
                right = []
                for grids, (_, truth) in zip(attempts, c.subject.test):
                    right.append(any(np.array_equal(g, truth) for g in grids))
                results[n]["voted"] = float(all(right))
        return results

    def result(self, task: Task, c: Candidate | None, log: Log, flaw: str = "") -> dict:
        """Of one self-edit: the log's, or nothing solved and why it was not trained."""
        flaw = refusal(c) if c else flaw
        if not flaw:
            return log[c]
        return NOTHING | {"flaw": flaw, "predictions": [flaw] * len(task.test)}

    def credit(self, edits: list[SelfEdit], candidates: list, log: Log) -> dict:
        """Fill in every self-edit's scores and reward. Returns {id: reward of doing nothing}."""
        for e, c in zip(edits, candidates):
            r = self.result(self.tasks[e.passage], c, log, e.flaw)
            e.flaw = r["flaw"] or "diverged" * r["diverged"]
            e.score = {"accuracy": r["solved"], "cells": r["cells"], "logprob": r["logprob"]}
            e.steps, e.loss, e.reward = r["steps"], r["loss"], e.score[self.args.reward]
            e.parts[0].credit = e.reward
        nothing = NOTHING["solved" if self.args.reward == "accuracy" else "logprob"]
        return dict.fromkeys(self.prompts, nothing)


# -----------------------------------------------------------------------------
# predicting


def answer_room(tok: Tokenizer, task: Task, with_prompt: bool = False) -> int:
    """Most tokens of an answer: twice the largest grid that is shown, which hardly any output
    exceeds, or the right answer. `with_prompt`: together with the longest prompt."""
    shown = [g for pair in task.train for g in pair] + [a for a, _ in task.test]
    room = 2 + 2 * max(len(grid_ids(tok, g)) for g in shown)
    room = max(room, *(len(pair_ids(tok, a, b)[1]) for a, b in task.test))
    return room + with_prompt * max(len(task_prompt(tok, task, i)) for i in range(len(task.test)))


def predict(model, tok, tasks: list[Task], adapters: Adapters | None = None) -> list[dict]:
    """Greedy outputs of every test input of tasks[n], under the n-th adapter. For each task:

        solved       1 if all its outputs are right
        cells        share of right cells, 0 for an output of the wrong shape; mean over its outputs
        logprob      mean log-likelihood per token of the right outputs
        predictions  what was predicted, as text, or why it is no grid

    The right outputs are used to score, and so that the room for an answer is never too small for
    them.
    """
    asked = [(n, i) for n, task in enumerate(tasks) for i in range(len(task.test))]
    prompts = [task_prompt(tok, tasks[n], i) for n, i in asked]
    golds = [pair_ids(tok, *tasks[n].test[i])[1] for n, i in asked]
    # A task that fits the context should not fail for the room that another one needs.
    room = min(
        max(answer_room(tok, t) for t in tasks), model.config.max_seq_len - max(map(len, prompts))
    )
    logprobs = {}

    def score_golds(order, batch, x):
        logprobs.update(zip(order, answer_logprobs([golds[i] for i in order], batch, x)))

    owner, room = [n for n, _ in asked], max(room, *map(len, golds))
    options = {"adapters": adapters, "owner": owner, "on_prefill": score_golds}
    outputs = generate(model, prompts, room, tok.end_ids, **options)
    results = [{"solved": [], "cells": [], "logprob": [], "predictions": []} for _ in tasks]
    for k, ((n, i), ids) in enumerate(zip(asked, outputs)):
        text = tok.decode([t for t in ids if t not in tok.end_ids])
        grid, why = read_grid(text) if ids[-1] in tok.end_ids else (None, "endless")
        truth, result = tasks[n].test[i][1], results[n]
        alike = grid is not None and grid.shape == truth.shape
        result["cells"].append(float((grid == truth).mean()) if alike else 0.0)
        result["solved"].append(float(result["cells"][-1] == 1.0))
        result["logprob"].append(logprobs[k])
        result["predictions"].append(why or text)
    for r in results:
        r["solved"] = min(r["solved"])
        r["cells"], r["logprob"] = float(np.mean(r["cells"])), float(np.mean(r["logprob"]))
    return results


def vote(
    model, tok, task: Task, adapter: Adapters, views: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """For each test input of `task` the two outputs predicted most often over `views` views: a
    symmetry of all grids, the demonstrations in another order, at times without one of them; each
    prediction is turned back before it counts.
    """
    names = ["", *SYMMETRIES]
    seen, undo = [], []
    for v in range(views):
        name = names[v % len(names)]
        n = max(1, len(task.train) - (v >= len(names)))
        kept = rng.permutation(len(task.train))[:n].tolist()
        view = Task(task.id, tuple(task.train[i] for i in kept), task.test)
        seen.append(view.map(SYMMETRIES[name]) if name else view)
        undo.append(SYMMETRIES[INVERSE[name]] if name else lambda g: g)
    found, attempts = [], []
    for some in chunks(seen, 4):  # each reads a prompt of its own
        found += predict(model, tok, some, adapter.pick([0] * len(some)))
    for i in range(len(task.test)):
        grids = [
            back(g)
            for r, back in zip(found, undo)
            if (g := read_grid(r["predictions"][i])[0]) is not None
        ]
        counts = Counter((g.shape, g.tobytes()) for g in grids)
        attempts.append(
            [
                np.frombuffer(data, np.int8).reshape(shape)
                for (shape, data), _ in counts.most_common(2)
            ]
        )
    return attempts
