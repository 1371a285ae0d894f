"""puzzle.py: grids as tokens, settings out of text, test-time training, predictions, on tiny models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dies_at
from test_tokenizer import vocabulary

import eval_arc
import puzzle
from common import read_jsonl
from data.arc import GROUPS, Task
from lora import PROJECTIONS, LoRAConfig
from puzzle import (
    EXAMPLE,
    MAX_STEPS,
    SCHEMA,
    STRATEGIES,
    WORKED,
    answer_room,
    examples_of,
    grid_ids,
    n_steps,
    parse_settings,
    predict,
    read_grid,
    settings_prompt,
    settings_text,
    side_by_side,
    study_puzzles,
    task_example,
    task_prompt,
    vote,
)
from tokenizer import Tokenizer

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
    task = Task(
        "t",
        ((np.array([[1]]), np.array([[2]])), (np.array([[3]]), np.array([[4]]))),
        ((np.array([[5]]), np.array([[6]])),),
    )
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
    read = puzzle.Puzzles.read("t", [(f"Sure!\n{text()}\nGood luck!", True)])
    assert read["mended"] == [text()] and read["settings"] == EXAMPLE
    assert puzzle.Puzzles.read("t", [("Sure!", True)])["mended"] == [""]


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
# studying and predicting


def options(**changes):
    return SimpleNamespace(**({"augmented": 8, "population": 2, "vote": 0} | changes))


def test_a_population_of_unlike_settings_is_its_candidates_alone(tiny, tok, tmp_path):
    candidates = [
        (copying(0), SETTINGS),
        (copying(1), SETTINGS | {"lr": 5e-3, "epochs": 2}),
        (copying(0), SETTINGS | {"every_token": True}),
        (copying(0), SETTINGS),  # the same again
    ]
    together = study_puzzles(
        tiny, tok, candidates, LORA, options(population=4), 0, tmp_path / "a.jsonl", "test"
    )
    assert together[0] is together[3] and len(read_jsonl(tmp_path / "a.jsonl")) == 3
    for n, c in enumerate(candidates):
        [alone] = study_puzzles(tiny, tok, [c], LORA, options(), 0, tmp_path / f"{n}.jsonl", "test")
        assert alone["steps"] == together[n]["steps"] and alone["loss"] == pytest.approx(
            together[n]["loss"], rel=1e-4
        )
        assert alone["logprob"] == pytest.approx(together[n]["logprob"], rel=1e-3)
    assert (
        together[1]["steps"] == 2 * together[0]["steps"] == 8
        and together[0]["loss"] != together[2]["loss"]
    )


def test_the_settings_choose_the_data(tiny, tok, tmp_path):
    candidates = [
        (copying(), SETTINGS | {"groups": [g]})
        for g in ("use_size_augmentations", "use_repeat_augmentations")
    ]
    results = study_puzzles(
        tiny, tok, candidates, LORA, options(augmented=24), 0, tmp_path / "a.jsonl", "test"
    )
    assert (
        results[0]["steps"] == results[1]["steps"] == 12
        and results[0]["loss"] != results[1]["loss"]
    )


def test_long_sequences_train_apart_and_the_longest_not_at_all(tok):
    assert side_by_side([100, 100, 900, 900], 4) == [[0, 1], [2], [3]]
    assert side_by_side([10] * 5, 2) == [[0, 1], [2, 3], [4]] and side_by_side([5000], 2) == [[0]]
    big = np.ones((30, 30), np.int8)
    task = Task("big", ((big, big),) * 3, ((big, big),))
    made = examples_of(tok, task, SETTINGS, 9, 0, 8192)
    assert len(made) == 0  # two pairs: 3,700 tokens


def test_too_many_steps_is_a_flaw_and_not_a_training(tiny, tok, tmp_path, monkeypatch):
    examples = examples_of(tok, copying(), SETTINGS, 8, 0, 2048)
    most = SETTINGS | {"epochs": MAX_STEPS // n_steps(examples, SETTINGS)}
    assert (
        n_steps(examples, most)
        <= MAX_STEPS
        < n_steps(examples, most | {"epochs": most["epochs"] + 1})
    )
    monkeypatch.setattr("puzzle.study_and_predict", None)
    over = (copying(), most | {"epochs": most["epochs"] + 1})
    [result] = study_puzzles(tiny, tok, [over], LORA, options(), 0, tmp_path / "a.jsonl", "test")
    assert result["flaw"] == "too many steps" and result["solved"] == 0 and result["steps"] == 0


def test_studying_resumes(tiny, tok, tmp_path, monkeypatch):
    candidates = [(copying(n), SETTINGS) for n in range(4)]
    how = (LORA, options(), 0)
    whole = study_puzzles(tiny, tok, candidates, *how, tmp_path / "a.jsonl", "test")
    calls = dies_at(monkeypatch, "puzzle.study_and_predict", 2)
    with pytest.raises(KeyboardInterrupt):
        study_puzzles(tiny, tok, candidates, *how, tmp_path / "b.jsonl", "test")
    assert (
        study_puzzles(tiny, tok, candidates, *how, tmp_path / "b.jsonl", "test") == whole
        and len(calls) == 3
    )


def test_what_is_known_is_not_trained_again(tiny, tok, tmp_path, monkeypatch):
    how, log = (LORA, options(), 0), tmp_path / "a.jsonl"
    first = study_puzzles(tiny, tok, [(copying(0), SETTINGS)], *how, log, "test")
    trained, real = [], puzzle.study_and_predict
    monkeypatch.setattr(
        "puzzle.study_and_predict",
        lambda m, t, some, *a: trained.extend(some) or real(m, t, some, *a),
    )
    both = [(copying(0), SETTINGS), (copying(1), SETTINGS)]
    again = study_puzzles(tiny, tok, both, *how, tmp_path / "b.jsonl", "test", [log])
    assert again[0] == first[0] and [task.id for task, _ in trained] == ["copy1"]
    assert len(read_jsonl(tmp_path / "b.jsonl")) == 1


def test_predictions_are_scored(tiny, tok, monkeypatch):
    """Outputs that copy the input: right for one task, wrong for another; and one that never ends."""
    right, other = copying(0), copying(1)
    wrong = Task("w", other.train, ((other.test[0][0], 1 + other.test[0][0] % 9),))
    monkeypatch.setattr("puzzle.answer_logprobs", lambda golds, *a: [-1.0] * len(golds))

    def copies(model, prompts, max_new, ends, adapters, owner, on_prefill):
        on_prefill(list(range(len(prompts))), None, None)
        return [[*grid_ids(tok, t.test[0][0]), tok.end_ids[0]] for t in (right, wrong)] + [
            [5] * max_new
        ]

    monkeypatch.setattr("puzzle.generate", copies)
    a, b, c = predict(tiny, tok, [right, wrong, right])
    assert (a["solved"], a["cells"], a["logprob"]) == (1.0, 1.0, -1.0)
    assert b["solved"] == b["cells"] == 0.0 and read_grid(b["predictions"][0])[1] == ""
    assert c["solved"] == 0.0 and c["predictions"] == ["endless"]


def test_votes_are_turned_back(tiny, tok, monkeypatch):
    """Views of a copying task, each solved as shown: turned back, all agree with the truth."""
    task = copying()

    def sees(model, tok_, views, adapters):
        return [{"predictions": [tok.decode(grid_ids(tok, v.test[0][0]))]} for v in views]

    monkeypatch.setattr("puzzle.predict", sees)
    [[first]] = vote(tiny, tok, task, None, 14, np.random.default_rng(0))
    assert np.array_equal(first, task.test[0][1])


def test_a_row_votes_with_its_own_adapter(tiny, tok, monkeypatch):
    """The second of two candidates: what its vote is asked under, and that a diverged one has none."""
    asked = []
    monkeypatch.setattr(
        "puzzle.vote",
        lambda m, t, task, adapters, *a: asked.append(adapters.flat) or [[task.test[0][1]]],
    )
    candidates = [(copying(0), SETTINGS), (copying(1), SETTINGS | {"lr": 9e-3})]
    examples = [examples_of(tok, *c, 8, 0, 2048) for c in candidates]
    results = puzzle.study_and_predict(tiny, tok, candidates, examples, LORA, 0, views=2)
    assert [r["voted"] for r in results] == [1.0, 1.0] and [len(flat) for flat in asked] == [1, 1]
    assert asked[1].norm() > asked[0].norm()  # it learnt faster
    asked.clear()
    candidates[0] = (copying(0), SETTINGS | {"lr": float("inf")})
    results = puzzle.study_and_predict(tiny, tok, candidates, examples, LORA, 0, views=2)
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
    assert answer_room(tok, shown, asked=True) == 22 + len(task_prompt(tok, shown))
