"""arc.py: grids as tokens, settings out of text, training, predictions, on tiny models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dies_at
from test_tokenizer import vocabulary

import eval_arc
from arc import (
    EXAMPLE,
    MAX_STEPS,
    SCHEMA,
    STRATEGIES,
    WORKED,
    Puzzles,
    answer_room,
    grid_ids,
    memory_groups,
    parse_settings,
    predict,
    puzzle_candidate,
    read_grid,
    refusal,
    settings_prompt,
    settings_text,
    task_example,
    task_prompt,
    vote,
)
from data.arc import GROUPS, Task
from lm.files import read_jsonl
from lm.tokenizer import Tokenizer
from lora import PROJECTIONS, Adapters, LoRAConfig
from reward import update_and_quiz

LORA = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 0, 4)
SETTINGS = {"groups": [], "every_token": False, "lr": 1e-3, "epochs": 1}


def copying(n: int = 0) -> Task:
    """A task whose outputs equal its inputs: 2 x 2 grids."""
    grids = np.random.default_rng(n).integers(1, 10, (4, 2, 2)).astype(np.int8)
    pairs = tuple((g, g) for g in grids)
    return Task(f"copy{n}", pairs[:3], pairs[3:])


# -----------------------------------------------------------------------------
# grids as tokens


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen"])
def test_one_token_per_cell(name, tok, tmp_path):
    tok = tok if name == "smollm2" else Tokenizer(vocabulary(name, tmp_path))
    grid = np.array([[1, 0, 9], [2, 2, 2]], dtype=np.int8)
    ids = grid_ids(tok, grid)
    assert len(ids) == 8 and tok.decode(ids) == "109\n222\n"
    back, why = read_grid(tok.decode(ids))
    assert np.array_equal(back, grid) and why == ""


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "not a grid"),
        ("I cannot", "not a grid"),
        ("12\n\n34", "not a grid"),
        ("1 2\n3 4", "not a grid"),
        ("12\n345\n", "rows of unequal length"),
        ("1" * 31, "larger than 30 x 30"),
    ],
)
def test_what_is_no_grid(text, why):
    assert read_grid(text) == (None, why)


def test_training_sequences(tok):
    grids = [np.array([[n]]) for n in range(1, 7)]
    task = Task("t", (tuple(grids[:2]), tuple(grids[2:4])), (tuple(grids[4:]),))
    example = task_example(tok, task, every_token=False)
    pairs = "".join(f"input:\n{a}\noutput:\n{b}\n<|im_end|>" for a, b in ((1, 2), (3, 4), (5, 6)))
    assert tok.decode(example.ids) == pairs
    counted = tok.decode([t for t, c in zip(example.ids, example.counts) if c])
    assert counted == "4\n<|im_end|>6\n<|im_end|>"  # nothing could tell the first output
    assert all(task_example(tok, task, every_token=True).counts)
    prompt = task_prompt(tok, task)
    assert list(example.ids[: len(prompt)]) == prompt and tok.decode(prompt).endswith(
        "input:\n5\noutput:\n"
    )


# -----------------------------------------------------------------------------
# the self-edit


def text(**changes):
    value = json.loads(settings_text(EXAMPLE))
    for key, v in changes.items():
        value["data_generation" if key in GROUPS else "training"][key] = v
    return json.dumps(value)


def test_the_worked_example_is_one():
    assert json.loads(text())["training"] == {
        "strategy": "train_using_output_tokens", "learning_rate": 0.001, "num_train_epochs": 2,
    }  # fmt: skip
    assert parse_settings(f"Sure! Here it is:\n```json\n{text()}\n```", True) == (EXAMPLE, "")
    assert parse_settings(f"{text()}}}\n{{'and", False) == (
        EXAMPLE,
        "",
    )  # nothing after the first object counts


def test_settings_are_read_as_they_are_written():
    for settings in (*eval_arc.GRID, EXAMPLE | {"lr": 1e-5, "groups": list(GROUPS)}):
        assert parse_settings(settings_text(settings), True) == (settings, "")


def test_what_is_imitated_is_the_settings_alone():
    """Without what was said around them."""
    said = f"Sure!\n{text()}\nGood luck!"
    edit = Puzzles.read("t", [(said, True)])
    [part] = edit.parts
    assert (part.text, part.target, edit.config) == (said, text(), EXAMPLE)
    assert (edit.passage, edit.style, edit.flaw) == ("t", "settings", "")
    edit = Puzzles.read("t", [("Sure!", True)])
    [part] = edit.parts
    assert (part.target, part.flaw, edit.flaw) == ("", "malformed", "malformed")


@pytest.mark.parametrize(
    "sample, ended, flaw",
    [
        (" \n", True, "empty"),
        (text()[:-1], False, "endless"),
        (text()[:-1], True, "malformed"),
        ("Sure!", True, "malformed"),
        ("{", True, "malformed"),
        ("{}", True, "malformed"),
        ("[1]", True, "malformed"),
        ('{"data_generation": 1, "training": 2}', True, "malformed"),
        (text(use_basic_augmentations="yes"), True, "malformed"),
        (text(use_basic_augmentations=1), True, "malformed"),
        (text(strategy="train"), True, "malformed"),
        (text(strategy=[]), True, "malformed"),
        (text(learning_rate="0.1"), True, "malformed"),
        (text(learning_rate=True), True, "malformed"),
        (text(num_train_epochs=1.5), True, "malformed"),
        (text(learning_rate=0), True, "out of bounds"),
        (text(learning_rate=0.5), True, "out of bounds"),
        (text(learning_rate=5e-324), True, "out of bounds"),
        (text(learning_rate=9e-7), True, "out of bounds"),
        (text(learning_rate=float("nan")), True, "out of bounds"),
        (text(num_train_epochs=0), True, "out of bounds"),
        (text(num_train_epochs=10**9), True, "out of bounds"),
        ("{} and", False, "malformed"),
        ('{"a":' * 100_000, True, "malformed"),
        ("__import__('os').system('true') {}", True, "malformed"),
    ],
)
def test_bad_settings_are_told_apart(sample, ended, flaw):
    assert parse_settings(sample, ended) == ({}, flaw)


def test_the_prompt_shows_the_demonstrations_and_not_the_test(tok):
    task = copying()
    shown = tok.decode(settings_prompt(tok, task))
    assert (
        all(settings_text(settings) in shown for _, _, settings in WORKED) and SCHEMA not in shown
    )
    assert "input:\n10\n20\noutput:\n01\n02<|im_end|>" in shown  # the first worked puzzle
    pairs = tuple((a, (a + 1) % 10) for a, _ in task.train)  # outputs of their own
    shown = tok.decode(settings_prompt(tok, Task("t", pairs, task.test)))
    for a, b in pairs:
        assert (
            f"input:\n{tok.decode(grid_ids(tok, a))}output:\n{tok.decode(grid_ids(tok, b)[:-1])}"
            in shown
        )
    assert tok.decode(grid_ids(tok, task.test[0][0])) not in shown
    assert (
        shown.count("<|im_end|>") == 14
    )  # of the turns: system, question and reply of six examples, question
    told = tok.decode(settings_prompt(tok, task, shots=0))
    assert told.count("<|im_end|>") == 2 and SCHEMA in told
    form = SCHEMA.replace("true or false", "true").replace(f'"{STRATEGIES[0]}" or ', "")
    form = form.replace("whole number", "2").replace("number", "0.001")
    assert parse_settings(form, True) == (EXAMPLE | {"groups": list(GROUPS)}, "")


# -----------------------------------------------------------------------------
# training


def domain(tok, **changes) -> Puzzles:
    """Puzzles without tasks of its own, for training on those made up here."""
    puzzles = object.__new__(Puzzles)
    args = {"augmented": 8, "population": 2, "vote": 0, "seed": 0, "learner": "base"}
    puzzles.args, puzzles.its_tok = SimpleNamespace(**args | changes), tok
    puzzles.context = 2048
    return puzzles


def trained(model, puzzles: Puzzles, work: list[tuple], path) -> list[dict]:
    """Results of (task, settings), as the ladder's rows get them."""
    log = puzzles.log(path)
    puzzles.tasks = {task.id: task for task, _ in work}
    candidates = [puzzles.candidate(task, settings, 0) for task, settings in work]
    groups = puzzles.populations(candidates, log)
    update_and_quiz(model, puzzles.its_tok, groups, LORA, 0, log, puzzles.quiz, "test")
    return [puzzles.result(t, c, log) for (t, _), c in zip(work, candidates)]


def test_a_population_of_unlike_settings_is_its_candidates_alone(tiny, tok, tmp_path):
    work = [
        (copying(0), SETTINGS),
        (copying(1), SETTINGS | {"lr": 5e-3, "epochs": 2}),
        (copying(0), SETTINGS | {"every_token": True}),
        (copying(0), SETTINGS),  # the same again
    ]
    path = tmp_path / "all" / "row" / "scored.jsonl"
    together = trained(tiny, domain(tok, population=4), work, path)
    assert together[0] is together[3] and len(read_jsonl(path)) == 3
    for n, own in enumerate(work):
        [alone] = trained(tiny, domain(tok), [own], tmp_path / str(n) / "row" / "scored.jsonl")
        assert alone["steps"] == together[n]["steps"]
        assert alone["loss"] == pytest.approx(together[n]["loss"], rel=1e-4)
        assert alone["logprob"] == pytest.approx(together[n]["logprob"], rel=1e-3)
    assert together[1]["steps"] == 2 * together[0]["steps"] == 8
    assert together[0]["loss"] != together[2]["loss"]


def test_the_settings_choose_the_data(tiny, tok, tmp_path):
    work = []
    for group in ("use_size_augmentations", "use_repeat_augmentations"):
        work.append((copying(), SETTINGS | {"groups": [group]}))
    results = trained(tiny, domain(tok, augmented=24), work, tmp_path / "row" / "scored.jsonl")
    assert results[0]["steps"] == results[1]["steps"] == 12
    assert results[0]["loss"] != results[1]["loss"]


def test_long_sequences_train_apart_and_the_longest_not_at_all(tok):
    assert memory_groups([100, 100, 900, 900], 4) == [[0, 1], [2], [3]]
    assert memory_groups([10] * 5, 2) == [[0, 1], [2, 3], [4]] and memory_groups([5000], 2) == [[0]]
    big = np.ones((30, 30), np.int8)
    task = Task("big", ((big, big),) * 3, ((big, big),))
    candidate = puzzle_candidate(tok, task, SETTINGS, 9, 0, 8192)
    assert len(candidate.examples) == 0  # two pairs: 3,700 tokens
    assert refusal(candidate) == "too long"


def test_what_is_too_long_is_not_drawn(tok):
    """Settings whose tasks are mostly too long get as many sequences as others, if so many fit."""
    task, groups = copying(), {"groups": ["use_size_augmentations"]}
    everything = puzzle_candidate(tok, task, SETTINGS | groups, 999, 0, 8192).examples
    lengths = sorted(len(e.ids) for e in everything)
    context = lengths[len(lengths) // 2]
    fit = [e for e in everything if len(e.ids) <= context]
    assert 4 < len(fit) < len(everything)
    drawn = puzzle_candidate(tok, task, SETTINGS | groups, len(fit) - 1, 0, context).examples
    assert len(drawn) == len(fit) - 1 and max(len(e.ids) for e in drawn) <= context


def test_like_lengths_train_together(tok, tmp_path):
    """And equal settings of one task once, and what is refused not at all."""
    puzzles, wide = domain(tok, population=2), np.ones((5, 5), np.int8)
    long = Task("long", ((wide, wide),) * 3, ((wide, wide),))
    tasks = [long, copying(0), Task("long2", long.train, long.test), copying(1), copying(0)]
    candidates = [puzzles.candidate(task, SETTINGS, 0) for task in tasks]
    candidates += [None, puzzles.candidate(copying(), SETTINGS | {"epochs": 10_000}, 0)]
    groups = puzzles.populations(candidates, puzzles.log(tmp_path / "row" / "scored.jsonl"))
    found = []
    for group in groups:
        found.append([c.subject.id for c in group])
    assert found == [["copy0", "copy1"], ["long", "long2"]]


def test_too_many_steps_is_a_flaw_and_not_a_training(tiny, tok, tmp_path, monkeypatch):
    candidate = puzzle_candidate(tok, copying(), SETTINGS, 8, 0, 2048)
    steps = candidate.config.total_steps(len(candidate.examples))
    most = SETTINGS | {"epochs": MAX_STEPS // steps}
    over = most | {"epochs": most["epochs"] + 1}
    for settings, why in ((most, ""), (over, "too many steps")):
        candidate = puzzle_candidate(tok, copying(), settings, 8, 0, 2048)
        taken = candidate.config.total_steps(len(candidate.examples))
        assert refusal(candidate) == why and (taken > MAX_STEPS) is bool(why)
    monkeypatch.setattr("reward.inner_update", None)
    path = tmp_path / "row" / "scored.jsonl"
    [result] = trained(tiny, domain(tok), [(copying(), over)], path)
    assert result["flaw"] == "too many steps" and result["solved"] == 0 and result["steps"] == 0
    assert result["predictions"] == ["too many steps"] and not path.exists()


def test_training_resumes(tiny, tok, tmp_path, monkeypatch):
    work = [(copying(n), SETTINGS) for n in range(4)]
    one, two = (tmp_path / name / "row" / "scored.jsonl" for name in "ab")
    whole = trained(tiny, domain(tok), work, one)
    calls = dies_at(monkeypatch, "reward.inner_update", 2)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, domain(tok), work, two)
    assert trained(tiny, domain(tok), work, two) == whole and len(calls) == 3
    assert one.read_bytes() == two.read_bytes()


def test_what_is_known_is_not_trained_again(tiny, tok, tmp_path, monkeypatch):
    """The row beside it has trained one of two; a policy that learns is another model each time."""
    [first] = trained(tiny, domain(tok), [(copying(0), SETTINGS)], tmp_path / "a" / "scored.jsonl")
    calls, work = dies_at(monkeypatch, "reward.inner_update", 0), []
    for n in (0, 1):
        work.append((copying(n), SETTINGS))
    again = trained(tiny, domain(tok), work, tmp_path / "b" / "scored.jsonl")
    assert again[0] == first and [len(examples) for _, _, examples, *_ in calls] == [1]
    [new] = read_jsonl(tmp_path / "b" / "scored.jsonl")
    assert json.loads(new["n"])[0] == "copy1"
    calls.clear()
    trained(tiny, domain(tok, learner="policy"), work, tmp_path / "c" / "scored.jsonl")
    assert [len(examples) for _, _, examples, *_ in calls] == [2]


# -----------------------------------------------------------------------------
# predicting


def test_predictions_are_scored(tiny, tok, monkeypatch):
    """Outputs that copy the input: right for one task, wrong for another, and for one of two tests
    of a third, which is then not solved; and an endless one."""
    right, other = copying(0), copying(1)
    wrong = Task("w", other.train, ((other.test[0][0], 1 + other.test[0][0] % 9),))
    half = Task("h", other.train, right.test + wrong.test)
    monkeypatch.setattr("arc.answer_logprobs", lambda golds, *a: [-1.0] * len(golds))

    def copies(model, prompts, max_new, ends, adapters, owner, on_prefill):
        on_prefill(list(range(len(prompts))), None, None)
        inputs = [a for a, _ in right.test + wrong.test + half.test]
        return [[*grid_ids(tok, a), tok.end_ids[0]] for a in inputs] + [[5] * max_new]

    monkeypatch.setattr("arc.generate", copies)
    a, b, c, d = predict(tiny, tok, [right, wrong, half, right])
    assert (a["solved"], a["cells"], a["logprob"]) == (1.0, 1.0, -1.0)
    assert b["solved"] == b["cells"] == 0.0 and read_grid(b["predictions"][0])[1] == ""
    assert (c["solved"], c["cells"]) == (0.0, 0.5)
    assert d["solved"] == 0.0 and d["predictions"] == ["endless"]


def test_votes_are_turned_back(tiny, tok, monkeypatch):
    """Views of a copying task, each solved as shown: turned back, all agree with the truth. They
    are read a few at a time, all under the one adapter, so that memory does not grow."""
    task, adapter = copying(), Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 2, 4), 1, seed=0)

    def sees(model, tok_, views, adapters):
        assert len(views) == len(adapters) <= 4
        assert all(torch.equal(flat, adapter.flat[0]) for flat in adapters.flat)
        return [{"predictions": [tok.decode(grid_ids(tok, v.test[0][0]))]} for v in views]

    monkeypatch.setattr("arc.predict", sees)
    [[first]] = vote(tiny, tok, task, adapter, 14, np.random.default_rng(0))
    assert np.array_equal(first, task.test[0][1])


def test_a_row_votes_with_its_own_adapter(tiny, tok, tmp_path, monkeypatch):
    """What the vote of each of three candidates is asked under, that one right output of two does
    not solve a task, and that a diverged candidate has no vote."""
    asked = []

    def votes(model, tok, task, adapters, *_):
        asked.append(adapters.flat)
        return [[task.test[0][1]]] * len(task.test)

    monkeypatch.setattr("arc.vote", votes)
    half = Task("half", copying(2).train, copying(2).test + copying(3).test)
    work = [(copying(0), SETTINGS), (copying(1), SETTINGS | {"lr": 9e-3}), (half, SETTINGS)]
    results = trained(tiny, domain(tok, vote=2), work, tmp_path / "a" / "row" / "scored.jsonl")
    assert [r["voted"] for r in results] == [1.0, 1.0, 0.0]
    assert [len(flat) for flat in asked] == [1, 1, 1]
    assert asked[1].norm() > asked[0].norm()  # it learnt faster
    asked.clear()
    del work[2]
    work[0] = (copying(0), SETTINGS | {"lr": float("inf")})
    results = trained(tiny, domain(tok, vote=2), work, tmp_path / "b" / "row" / "scored.jsonl")
    assert results[0]["diverged"] and results[0]["voted"] == 0.0 and len(asked) == 1


def test_logprobs_are_the_models(tiny, tok):
    """Against a plain forward pass over prompt and answer."""
    task = copying()
    [result] = predict(tiny, tok, [task])
    prompt, answer = task_prompt(tok, task), [*grid_ids(tok, task.test[0][1]), tok.end_ids[0]]
    with torch.inference_mode():
        logp = tiny(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logp.gather(-1, torch.tensor(answer)[:, None]).mean()
    assert result["logprob"] == pytest.approx(float(expected), rel=1e-4)


def test_answer_room(tok):
    small, wide = np.array([[1]], np.int8), np.array([[1] * 9], np.int8)
    shown = Task("t", ((small, small), (wide, small)), ((small, small),))
    assert answer_room(tok, shown) == 2 + 2 * 10  # nine cells and a row's end
    surprising = Task("t", ((small, small), (small, small)), ((small, wide),))
    assert answer_room(tok, surprising) == 11  # the right answer and its end
    assert answer_room(tok, shown, with_prompt=True) == 22 + len(task_prompt(tok, shown))
