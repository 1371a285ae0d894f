"""ARC as something to learn from: the self-edit is *how to study* a puzzle, studying is test-time training, the quiz is
its test grid.

A self-edit is a JSON object (arXiv 2506.10943, section 4); the model chooses from the task's demonstrations:

    {"data_generation": {"use_basic_augmentations": true, "use_size_augmentations": false,
                         "use_chain_augmentations": false, "use_repeat_augmentations": false},
     "training": {"strategy": "train_using_output_tokens", "learning_rate": 0.001, "num_train_epochs": 2}}

data/arc.py makes training tasks out of the demonstrations as it says; an inner update trains on them; then the model
predicts the outputs of the test inputs, which no training task contains.

How this departs from the paper:
 1. A grid is compact text, one token for a cell and one for a row's end, whatever the tokenizer would have merged.
 2. The prompt shows six worked examples by default, since a 135M model hardly ever keeps to a form that it is only told;
    what is sampled is never asked for again: a malformed self-edit is counted by its flaw and earns nothing.
 3. The learning rate may be at most 0.01.
 4. Candidates of different data, learning rates, epochs and losses train side by side; the same settings of the same task
    train once in a run.
 5. A training sequence of more than 2,048 tokens is left out: attention's memory grows with the square.

Top to bottom: grids as tokens, the self-edit, studying, predicting.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from common import fingerprint, read_jsonl
from data.arc import GROUPS, INVERSE, LARGEST, SYMMETRIES, Task, chosen_tasks, training_tasks
from inner import Example, Study, inner_update
from lora import Adapters
from quiz import answer_logprobs, lora_config, study_groups
from sampler import generate
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# grids as tokens


@functools.cache
def symbols(tok: Tokenizer) -> list[int]:
    """The tokens of the colours 0 to 9, and last that of a row's end."""
    return [tok.encode(symbol)[0] for symbol in "0123456789\n"]


def grid_ids(tok: Tokenizer, grid: np.ndarray) -> list[int]:
    """One token per cell, one newline token after each row: [[1, 2], [3, 4]] -> "1" "2" "\\n" "3" "4" "\\n"."""
    *digits, newline = symbols(tok)
    return [t for row in grid for t in (*(digits[c] for c in row), newline)]


def read_grid(text: str) -> tuple[np.ndarray | None, str]:
    """Predicted text -> (grid, ""), or (None, why it is none)."""
    rows = text.strip("\n").split("\n")
    if not text.strip() or not all(row and set(row) <= set("0123456789") for row in rows):
        return None, "not a grid"
    if len({len(row) for row in rows}) > 1:
        return None, "rows of unequal length"
    if max(len(rows), len(rows[0])) > LARGEST:
        return None, f"larger than {LARGEST} x {LARGEST}"
    return np.array([[int(c) for c in row] for row in rows], dtype=np.int8), ""


def pair_ids(tok: Tokenizer, a: np.ndarray, b: np.ndarray | None) -> tuple[list[int], list[int]]:
    """Token ids of one pair: what asks ("input:\\n" grid "output:\\n"), and what answers (grid, end); b None: no answer."""
    ask = [*tok.encode("input:\n"), *grid_ids(tok, a), *tok.encode("output:\n")]
    return ask, [] if b is None else [*grid_ids(tok, b), tok.end_ids[0]]


def task_prompt(tok: Tokenizer, task: Task, test: int = 0) -> list[int]:
    """The demonstrations, then a test input, up to where its output begins."""
    ids = [t for a, b in task.train for part in pair_ids(tok, a, b) for t in part]
    return ids + pair_ids(tok, task.test[test][0], None)[0]


def task_example(tok: Tokenizer, task: Task, every_token: bool) -> Example:
    """One training task as a training sequence. The loss counts every token, or those of the outputs; not of the first
    demonstration's, which nothing tells."""
    ids, counts = [], []
    for n, (a, b) in enumerate((*task.train, *task.test)):
        for part, counted in zip(pair_ids(tok, a, b), (every_token, every_token or n > 0)):
            ids += part
            counts += [counted] * len(part)
    return Example(tuple(ids), tuple(counts))


# -----------------------------------------------------------------------------
# the self-edit

STRATEGIES = ("train_using_all_tokens", "train_using_output_tokens")
MAX_LR, MAX_EPOCHS, MAX_STEPS, BATCH = 1e-2, 100, 375, 2  # the last two are the paper's

ASK = (
    "A model is to learn the rule of a puzzle from the examples below. Decide how it should be trained. Which data: basic "
    "augmentations (rotations, flips, shifts, mirrors), size augmentations (larger cells), chain augmentations (a rotation "
    "or flip, then larger), repeat augmentations (tiling). Which tokens the loss counts, the learning rate and the number "
    "of epochs. Reply with one JSON object and nothing else."
)
EXAMPLE = {"groups": ["use_basic_augmentations"], "every_token": False, "lr": 1e-3, "epochs": 2}
WORKED = [  # what the prompt shows: tiny puzzles, and settings from all over the range
    ([[1, 0], [2, 0]], [[0, 1], [0, 2]], EXAMPLE),
    ([[1, 2]], [[3, 4]], EXAMPLE | {"groups": [], "every_token": True, "lr": 2e-3, "epochs": 5}),
    ([[5]], [[5, 5], [5, 5]], EXAMPLE | {"groups": list(GROUPS)[1:3], "lr": 5e-4, "epochs": 3}),
    ([[0, 7], [0, 0]], [[7, 0], [0, 0]], EXAMPLE | {"groups": list(GROUPS), "every_token": True, "epochs": 1}),
    ([[3, 0]], [[3, 0, 3, 0]], EXAMPLE | {"groups": list(GROUPS)[::3], "lr": 3e-3, "epochs": 4}),
    ([[6, 6], [0, 6]], [[8, 8], [0, 8]], EXAMPLE | {"groups": [], "lr": 2e-3, "epochs": 8}),
]
SCHEMA = (
    f'{{"data_generation": {{{", ".join(f"{g!r}: true or false" for g in GROUPS)}}}, "training": {{"strategy": '
    f'"{STRATEGIES[0]}" or "{STRATEGIES[1]}", "learning_rate": number, "num_train_epochs": whole number}}}}'
).replace("'", '"')


def settings_text(settings: dict) -> str:
    """The self-edit that says so: what parse_settings() reads as these settings."""
    data = {g: g in settings["groups"] for g in GROUPS}
    strategy = STRATEGIES[0 if settings["every_token"] else 1]
    training = {"strategy": strategy, "learning_rate": settings["lr"], "num_train_epochs": settings["epochs"]}
    return json.dumps({"data_generation": data, "training": training})


def settings_prompt(tok: Tokenizer, task: Task, shots: int = 1) -> list[int]:
    """Token ids of the chat that asks how to study `task`, after six worked examples, or with shots=0 after a form."""

    def question(pairs):
        shown = tok.decode([t for a, b in pairs for t in (*pair_ids(tok, a, None)[0], *grid_ids(tok, b))])
        return {"role": "user", "content": f"{ASK}{'' if shots else ' Its form: ' + SCHEMA}\n\n{shown.strip()}"}

    worked = [(question([(np.array(a), np.array(b))]), settings_text(settings)) for a, b, settings in WORKED * shots]
    replied = [m for asked, reply in worked for m in (asked, {"role": "assistant", "content": reply})]
    return tok.chat([*replied, question(task.train)])


def parse_settings(text: str, ended: bool) -> tuple[dict, str]:
    """Sampled text -> (settings, flaw): {"groups": [...], "every_token": bool, "lr": float, "epochs": int}, or {} and one of
    "empty", "endless", "malformed" (no JSON object of the form), "out of bounds". Text around the first object is ignored.
    """
    if not text.strip():
        return {}, "empty"
    try:
        value, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    except (ValueError, RecursionError):
        return {}, "malformed" if ended else "endless"
    try:
        data, training = value["data_generation"], value["training"]
        chosen = {g: data[g] for g in GROUPS}
        strategy, lr, epochs = (training[k] for k in ("strategy", "learning_rate", "num_train_epochs"))
        number = type(lr) in (int, float) and type(epochs) is int
        if not number or strategy not in STRATEGIES or not all(type(v) is bool for v in chosen.values()):
            return {}, "malformed"
    except (KeyError, TypeError):
        return {}, "malformed"
    if not (0 < lr <= MAX_LR and 1 <= epochs <= MAX_EPOCHS):
        return {}, "out of bounds"
    groups = [g for g in GROUPS if chosen[g]]
    return {"groups": groups, "every_token": strategy == STRATEGIES[0], "lr": float(lr), "epochs": epochs}, ""


# -----------------------------------------------------------------------------
# studying

SEEN = "arc_tasks_seen"  # field of a model's config.json: ids of the tasks that warm.py trained it on
LONGEST = 2048  # tokens of a training sequence
ROOM = 1 << 20  # largest sum, over the sequences of a step, of their squared lengths: attention keeps as much for each head
NOTHING = {"flaw": "", "steps": 0, "tokens": 0, "loss": None, "diverged": False}
NOTHING |= {"solved": 0.0, "voted": 0.0, "cells": 0.0, "logprob": -100.0, "predictions": []}


def examples_of(tok: Tokenizer, task: Task, settings: dict, limit: int, seed: int, context: int) -> list[Example]:
    """The training sequences that the settings make of a task, at most `limit`; none longer than `context` or LONGEST."""
    rng = np.random.default_rng([seed, *task.id.encode()])
    made = training_tasks(task, settings["groups"], limit, rng)
    examples = [task_example(tok, t, settings["every_token"]) for t in made]
    return [e for e in examples if len(e.ids) <= min(context, LONGEST)]


def n_steps(examples: list, settings: dict) -> int:
    return settings["epochs"] * math.ceil(len(examples) / BATCH)


def study_and_predict(model, tok, candidates: list[tuple], examples: list, lora, seed, views=0, tick=None) -> list[dict]:
    """One population: each candidate (task, settings) trains on its own examples as its settings say, then predicts.

    Returns for each {"steps", "tokens", "loss", "diverged", and what predict() says}; a diverged one has solved nothing.
    With `views`, also "voted": 1 if every test output is one of vote()'s two.
    """
    adapters = Adapters.init(model, lora, len(candidates), seed)
    how = [Study(lr=s["lr"], epochs=s["epochs"], schedule="cosine", row_len=0, batch=BATCH) for _, s in candidates]
    outcomes = inner_update(model, adapters, examples, how, seed, tick)
    results = []
    for outcome, result in zip(outcomes, predict(model, tok, [task for task, _ in candidates], adapters)):
        done = {"steps": outcome.steps, "tokens": outcome.tokens, "loss": outcome.loss, "diverged": outcome.diverged}
        failed = {k: NOTHING[k] for k in ("solved", "voted", "cells", "logprob")} if outcome.diverged else {}
        results.append(done | result | failed)
    for n, (task, _) in enumerate(candidates if views else []):
        if not results[n]["diverged"]:
            attempts = vote(model, tok, task, adapters.pick([n]), views, np.random.default_rng(seed))
            right = [any(np.array_equal(g, b) for g in mine) for mine, (_, b) in zip(attempts, task.test)]
            results[n]["voted"] = float(all(right))
    return results


def side_by_side(lengths: list[int], size: int) -> list[list[int]]:
    """Which candidates train together, by the lengths of their longest sequences, which ascend: at most `size`, and fewer
    where sequences are long. side_by_side([100, 100, 900, 900], 4) -> [[0, 1], [2], [3]]."""
    groups = []
    for n, length in enumerate(lengths):
        if not groups or len(groups[-1]) >= size or (len(groups[-1]) + 1) * BATCH * length**2 > ROOM:
            groups.append([])
        groups[-1].append(n)
    return groups


def study_puzzles(model, tok, candidates: list[tuple], lora, args, seed: int, log, label: str, known=()) -> list[dict]:
    """study_and_predict() for any number of candidates (task, settings), in the order given; equal ones are trained once,
    and those in the logs `known`, of earlier calls, are not trained again.

    Settings that would take more than MAX_STEPS steps are not trained, {"flaw": "too many steps", "solved": 0, ...}, as in
    the paper; nor are tasks of which no training sequence fits the context, {"flaw": "too long"}. `log` as in
    quiz.study_groups().
    """
    names = [json.dumps([task.id, settings]) for task, settings in candidates]
    done, todo, examples = {r["n"]: r for path in known for r in read_jsonl(path)}, {}, {}
    for name, (task, settings) in dict(zip(names, candidates)).items():
        if name in done:
            continue
        made = examples_of(tok, task, settings, args.augmented, seed, model.config.max_seq_len)
        flaw = "too long" if not made else "too many steps" if n_steps(made, settings) > MAX_STEPS else ""
        if flaw:
            done[name] = NOTHING | {"flaw": flaw, "predictions": [flaw] * len(task.test)}
        else:
            todo[name], examples[name] = (task, settings), made

    def run(group, tick):
        some, theirs = [todo[name] for name in group], [examples[name] for name in group]
        return [{"flaw": ""} | r for r in study_and_predict(model, tok, some, theirs, lora, seed, args.vote, tick)]

    def size(name):
        return max(len(e.ids) for e in examples[name]), n_steps(examples[name], todo[name][1]), name

    order = sorted(todo, key=size)
    groups = side_by_side([size(name)[0] for name in order], args.population)
    groups = [[order[n] for n in group] for group in groups]
    done |= study_groups(groups, run, lambda r: r["solved"], log, label)
    return [done[name] for name in names]


def known_logs(args, folder: Path, pattern: str, log: Path) -> list[Path]:
    """The logs in `folder`, other than `log`, of what the same model studied: none if policies study, each another model."""
    return [] if args.learner == "policy" else sorted({*folder.glob(pattern)} - {log})


class Puzzles:
    """train_outer.py's --task arc: what self-edits are about, how they are read, and what they earn."""

    def __init__(self, args, model, tok):
        tasks = chosen_tasks(args)
        if both := tasks.keys() & {*model.config.hf.get(SEEN, [])}:
            raise SystemExit(f"error: {args.model} was trained on {len(both)} of these tasks (warm.py); leave them out")
        prompts, context = {i: settings_prompt(tok, t, args.shots) for i, t in tasks.items()}, model.config.max_seq_len
        needs = {i: max(len(p) + args.max_new, answer_room(tok, tasks[i], asked=True)) for i, p in prompts.items()}
        self.left_out = [i for i, n in needs.items() if n > context]
        if self.left_out:
            some = f"{len(self.left_out)} of {len(prompts)} tasks left out"
            print(f"{some}, their prompts are longer than the context: {' '.join(self.left_out)}")
        self.prompts = {i: [p] for i, p in prompts.items() if i not in self.left_out}
        self.tasks = {i: tasks[i] for i in self.prompts}
        if not self.tasks:
            raise SystemExit(f"error: {args.tasks or args.data}: no tasks left to work on")
        keys = repr([t.key for t in self.tasks.values()]).encode()
        # What a resumed run must find unchanged, wherever the tasks come from.
        self.pinned = {"ids": list(self.tasks), "data_sha256": fingerprint(keys)}

    @staticmethod
    def read(_, parts: list[tuple]) -> dict:
        settings, flaw = parse_settings(*parts[0])
        mended = ["" if flaw else settings_text(settings)]
        return {"style": "settings", "settings": settings, "mended": mended, "flaws": [flaw], "flaw": flaw}

    def results(self, model, tok, edits, args, seed: int, log, label: str, known) -> list[dict]:
        """What study_puzzles() says of every self-edit; flawed ones are not studied and earn nothing."""
        sound = [e for e in edits if not e.flaw]
        candidates = [(self.tasks[e.passage], e.settings) for e in sound]
        lora = lora_config(args, model)
        studied = iter(study_puzzles(model, tok, candidates, lora, args, seed, log, label, known))
        return [NOTHING | {"flaw": e.flaw, "predictions": [e.flaw]} if e.flaw else next(studied) for e in edits]

    def score(self, model, tok, edits, args, seed: int, folder) -> dict:
        """Fill in every self-edit's scores and reward. Returns {id: reward of doing nothing}. What the base model studied
        in an earlier round is not studied again; so all rounds study with one seed."""
        log = folder / "studied.jsonl"
        seed = seed if args.learner == "policy" else args.seed
        known = known_logs(args, folder.parent, f"*/{log.name}", log)
        results = self.results(model, tok, edits, args, seed, log, f"{folder.name} study", known)
        for e, r in zip(edits, results):
            e.flaw = r["flaw"] or "diverged" * r["diverged"]
            e.score = {"accuracy": r["solved"], "cells": r["cells"], "logprob": r["logprob"]}
            e.steps, e.loss, e.reward = r["steps"], r["loss"], e.score[args.reward]
        return dict.fromkeys(self.prompts, NOTHING["solved"] if args.reward == "accuracy" else NOTHING["logprob"])


# -----------------------------------------------------------------------------
# predicting


def answer_room(tok: Tokenizer, task: Task, asked: bool = False) -> int:
    """Most tokens of an answer: twice the largest grid that is shown, which hardly any output exceeds, or the right answer.
    With `asked`, together with the longest prompt."""
    shown = [*(g for pair in task.train for g in pair), *(a for a, _ in task.test)]
    room = 2 + 2 * max(len(grid_ids(tok, g)) for g in shown)
    room = max(room, *(len(pair_ids(tok, a, b)[1]) for a, b in task.test))
    return room + asked * max(len(task_prompt(tok, task, i)) for i in range(len(task.test)))


def predict(model, tok, tasks: list[Task], adapters: Adapters | None = None) -> list[dict]:
    """Greedy outputs of every test input of tasks[n], under the n-th adapter. For each task:

        solved       1 if all its outputs are right
        cells        share of right cells, 0 for an output of the wrong shape; mean over its outputs
        logprob      mean log-likelihood per token of the right outputs
        predictions  what was predicted, as text, or why it is no grid

    The right outputs are used to score, and so that the room for an answer is never too small for them.
    """
    asked = [(n, i) for n, task in enumerate(tasks) for i in range(len(task.test))]
    prompts = [task_prompt(tok, tasks[n], i) for n, i in asked]
    golds = [pair_ids(tok, *tasks[n].test[i])[1] for n, i in asked]
    # A task that fits the context should not fail for the room that another one needs.
    room = min(max(answer_room(tok, t) for t in tasks), model.config.max_seq_len - max(map(len, prompts)))
    logprobs = {}

    def score_golds(order, batch, x):
        logprobs.update(zip(order, answer_logprobs([golds[i] for i in order], batch, x)))

    how = {"adapters": adapters, "owner": [n for n, _ in asked], "on_prefill": score_golds}
    outputs = generate(model, prompts, max(room, *map(len, golds)), tok.end_ids, **how)
    results = [{"solved": [], "cells": [], "logprob": [], "predictions": []} for _ in tasks]
    for k, ((n, i), ids) in enumerate(zip(asked, outputs)):
        text = tok.decode([t for t in ids if t not in tok.end_ids])
        grid, why = read_grid(text) if ids[-1] in tok.end_ids else (None, "endless")
        truth, mine = tasks[n].test[i][1], results[n]
        alike = grid is not None and grid.shape == truth.shape
        mine["cells"].append(float((grid == truth).mean()) if alike else 0.0)
        mine["solved"].append(float(mine["cells"][-1] == 1.0))
        mine["logprob"].append(logprobs[k])
        mine["predictions"].append(why or text)
    return [
        {"solved": min(r["solved"]), "cells": float(np.mean(r["cells"])), "logprob": float(np.mean(r["logprob"])),
         "predictions": r["predictions"]}
        for r in results
    ]  # fmt: skip


def vote(model, tok, task: Task, adapters: Adapters | None, views: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """For each test input of `task` the two outputs predicted most often over `views` views: a symmetry of all grids, the
    demonstrations in another order, at times without one of them; each prediction is turned back before it counts.
    """
    names = ["", *SYMMETRIES]
    seen, undo = [], []
    for v in range(views):
        name = names[v % len(names)]
        kept = [int(i) for i in rng.permutation(len(task.train))][: max(1, len(task.train) - (v >= len(names)))]
        view = Task(task.id, tuple(task.train[i] for i in kept), task.test)
        seen.append(view.map(SYMMETRIES[name]) if name else view)
        undo.append(SYMMETRIES[INVERSE[name]] if name else lambda g: g)
    if adapters is not None:
        adapters = adapters.pick([0] * views)
    found = predict(model, tok, seen, adapters)
    attempts = []
    for i in range(len(task.test)):
        grids = [back(g) for r, back in zip(found, undo) if (g := read_grid(r["predictions"][i])[0]) is not None]
        counts = Counter((g.shape, g.tobytes()) for g in grids)
        attempts.append([np.frombuffer(data, np.int8).reshape(shape) for (shape, data), _ in counts.most_common(2)])
    return attempts
