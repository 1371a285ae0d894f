"""puzzle.py and eval_arc.py: grids as tokens, settings out of text, test-time training, the ladder, on tiny models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dies_at, run_script, watch_weights, write_checkpoint
from test_tokenizer import vocabulary

import eval_arc
import puzzle
import train_outer
from common import read_jsonl
from data.arc import GROUPS, Task
from lora import PROJECTIONS, Adapters, LoRAConfig, save_adapter
from puzzle import (
    EXAMPLE,
    MAX_STEPS,
    examples_of,
    grid_ids,
    n_steps,
    parse_settings,
    predict,
    read_grid,
    settings_prompt,
    settings_text,
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
        "t", ((np.array([[1]]), np.array([[2]])), (np.array([[3]]), np.array([[4]]))), ((np.array([[5]]), np.array([[6]])),)
    )
    example = task_example(tok, task, every_token=False)
    pairs = "".join(f"input:\n{a}\noutput:\n{b}\n<|im_end|>" for a, b in ((1, 2), (3, 4), (5, 6)))
    assert tok.decode(example.ids) == pairs
    counted = tok.decode([t for t, c in zip(example.ids, example.counts) if c])
    assert counted == "4\n<|im_end|>6\n<|im_end|>"  # nothing could tell the first output
    assert all(task_example(tok, task, every_token=True).counts)
    prompt = task_prompt(tok, task)
    assert list(example.ids[: len(prompt)]) == prompt and tok.decode(prompt).endswith("input:\n5\noutput:\n")


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
        (text(), False, "endless"),
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
        ("{" * 100_000 + "}", True, "malformed"),
        ("__import__('os').system('true') {}", True, "malformed"),
    ],
)
def test_bad_settings_are_told_apart(sample, ended, flaw):
    assert parse_settings(sample, ended) == ({}, flaw)


def test_the_prompt_shows_the_demonstrations_and_not_the_test(tok):
    task = copying()
    shown = tok.decode(settings_prompt(tok, task))
    assert settings_text(EXAMPLE) in shown and all(g in shown for g in GROUPS)
    for a, _ in task.train:
        assert tok.decode(grid_ids(tok, a)) in shown
    assert tok.decode(grid_ids(tok, task.test[0][0])) not in shown


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
    together = study_puzzles(tiny, tok, candidates, LORA, options(population=4), 0, tmp_path / "a.jsonl", "test")
    assert together[0] is together[3] and len(read_jsonl(tmp_path / "a.jsonl")) == 3
    for n, c in enumerate(candidates):
        [alone] = study_puzzles(tiny, tok, [c], LORA, options(), 0, tmp_path / f"{n}.jsonl", "test")
        assert alone["steps"] == together[n]["steps"] and alone["loss"] == pytest.approx(together[n]["loss"], rel=1e-4)
        assert alone["logprob"] == pytest.approx(together[n]["logprob"], rel=1e-3)
    assert together[1]["steps"] == 2 * together[0]["steps"] == 8 and together[0]["loss"] != together[2]["loss"]


def test_too_many_steps_is_a_flaw_and_not_a_training(tiny, tok, tmp_path, monkeypatch):
    examples = examples_of(tok, copying(), SETTINGS, 8, 0, 2048)
    most = SETTINGS | {"epochs": MAX_STEPS // n_steps(examples, SETTINGS)}
    assert n_steps(examples, most) <= MAX_STEPS < n_steps(examples, most | {"epochs": most["epochs"] + 1})
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
    assert study_puzzles(tiny, tok, candidates, *how, tmp_path / "b.jsonl", "test") == whole and len(calls) == 3


def test_what_is_known_is_not_trained_again(tiny, tok, tmp_path, monkeypatch):
    how, log = (LORA, options(), 0), tmp_path / "a.jsonl"
    first = study_puzzles(tiny, tok, [(copying(0), SETTINGS)], *how, log, "test")
    trained, real = [], puzzle.study_and_predict
    monkeypatch.setattr("puzzle.study_and_predict", lambda m, t, some, *a: trained.extend(some) or real(m, t, some, *a))
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
        return [[*grid_ids(tok, t.test[0][0]), tok.end_ids[0]] for t in (right, wrong)] + [[5] * max_new]

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


def test_logprobs_are_the_models(tiny, tok):
    """Against a plain forward pass over prompt and answer."""
    task = copying()
    [result] = predict(tiny, tok, [task])
    prompt, answer = task_prompt(tok, task), [*grid_ids(tok, task.test[0][1]), tok.end_ids[0]]
    with torch.inference_mode():
        logp = tiny(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = logp.gather(-1, torch.tensor(answer)[:, None]).mean()
    assert result["logprob"] == pytest.approx(float(expected), rel=1e-4)


# -----------------------------------------------------------------------------
# the scripts


@pytest.fixture
def tasks_file(tmp_path):
    grids = [[[a, b], [b, a]] for a, b in ((1, 2), (3, 4), (5, 6), (7, 8))]
    task = {"train": [{"input": g, "output": g} for g in grids[:3]], "test": [{"input": grids[3], "output": grids[3]}]}
    path = tmp_path / "arc.json"
    path.write_text(json.dumps({"train": {"t1": task, "t2": {**task, "train": task["train"][::-1]}}, "eval": {"t3": task}}))
    return path


@pytest.mark.parametrize("family", ["smollm2", "llama3", "qwen2"])
def test_the_outer_loop_and_the_ladder(family, tiny_folder, tasks_file, tmp_path, monkeypatch, capsys):
    """Self-edits of a random model are no settings; here it "samples" sound ones, and one that is not."""
    folder = tiny_folder
    if family != "smollm2":
        folder = write_checkpoint(tmp_path / family, family, vocab_size=49152)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_folder / name).read_bytes())
    good, calls = parse_settings(text(num_train_epochs=1), True), []

    def sampled(sample, ended):
        calls.append(1)
        return good if len(calls) % 3 else ({}, "malformed")

    monkeypatch.setattr("puzzle.parse_settings", sampled)
    monkeypatch.setattr("puzzle.NOTHING", {**puzzle.NOTHING, "solved": -1.0})  # so that unsolved ones are reinforced
    common = ["--data", tasks_file, "--augmented", 4, "--rank", 2, "--max-new", 8, "--samples", 3]
    run = tmp_path / "run"
    extra = ["--task", "arc", "--out", run, "--rounds", 1, "--outer-rank", 2]
    run_script(monkeypatch, train_outer, folder, *common, *extra)
    [metrics] = read_jsonl(run / "metrics.jsonl")
    assert metrics["total"] == 6 and metrics["flaws"] == {"malformed": 2} and metrics["kept"] == 4
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"heldout": ["t3"]}))
    out = tmp_path / "ladder.json"
    extra = ["--tasks", tasks, "--run", run, "--out", out, "--work", tmp_path / "work", "--show", "--vote", 3]
    run_script(monkeypatch, eval_arc, folder, *common, *extra)
    result = json.loads(out.read_text())
    assert [r["method"] for r in result["rows"]] == ["icl", "ttt-fixed", "self-edit", "seal-1", "best-of-3"]
    assert result["n_tasks"] == 1 and {t["id"] for t in result["tasks"]} == {"t3"} and len(result["tasks"]) == 8
    assert all({"config", "solved", "prediction", "flaw"} <= t.keys() for t in result["tasks"])
    assert "voted" in result["rows"][1] and "\x1b[48;5;" in capsys.readouterr().out


@pytest.mark.parametrize("learner", ["base", "policy"])
def test_a_policy_writes_and_its_learner_trains(learner, tiny, tiny_folder, tasks_file, tmp_path, monkeypatch):
    policy, seen = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 0, 4), 1, seed=0), []
    policy.flat += 0.05
    save_adapter(policy, tmp_path / "policy", tiny_folder)
    watch_weights(monkeypatch, "eval_arc.sample_self_edits", tiny, seen)
    watch_weights(monkeypatch, "puzzle.Puzzles.results", tiny, seen)
    args = ["--data", tasks_file, "--limit", 1, "--augmented", 4, "--rank", 2, "--max-new", 8, "--samples", 1]
    args += [
        "--policy",
        tmp_path / "policy",
        "--learner",
        learner,
        "--out",
        tmp_path / "o.json",
        "--work",
        tmp_path / "work",
    ]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    assert [changed for _, changed in seen] == [False, False, True, learner == "policy"]
    assert [name for name, _ in seen] == ["sample_self_edits", "Puzzles.results"] * 2


def test_choosing(tiny_folder, tasks_file, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_arc, "GRID", [SETTINGS, SETTINGS | {"lr": 2e-3}])
    real = eval_arc.study_puzzles

    def solves_t2(*args):
        results = real(*args)
        return [r | {"solved": float(task.id == "t2" and s["lr"] == 2e-3)} for (task, s), r in zip(args[2], results)]

    monkeypatch.setattr(eval_arc, "study_puzzles", solves_t2)
    out = tmp_path / "tasks.json"
    args = ["--data", tasks_file, "--augmented", 4, "--rank", 2, "--choose", "--out", out, "--work", tmp_path / "work"]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    chosen = json.loads(out.read_text())
    assert chosen["train"] == ["t2"] and chosen["heldout"] == [] and chosen["solved_by"] == {"t1": None, "t2": 1}


def test_choosing_tries_the_smallest_first_and_what_is_solved_no_more(tiny_folder, tasks_file, tmp_path, monkeypatch):
    data, tried = json.loads(tasks_file.read_text()), []
    pairs = [{side: [[c, c, c]] for side in ("input", "output")} for c in (1, 2, 3)]
    data["train"]["small"] = {"train": pairs[:2], "test": pairs[2:]}
    tasks_file.write_text(json.dumps(data))
    monkeypatch.setattr(eval_arc, "GRID", [SETTINGS, SETTINGS | {"lr": 2e-3}])

    def study(model, tok, candidates, *args):
        tried.append([(task.id, s["lr"]) for task, s in candidates])
        return [{"solved": float(task.id == "small")} for task, s in candidates]

    monkeypatch.setattr(eval_arc, "study_puzzles", study)
    out = tmp_path / "tasks.json"
    args = ["--data", tasks_file, "--limit", 2, "--choose", "--out", out, "--work", tmp_path / "work"]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    assert tried == [[("small", 1e-3), ("t1", 1e-3)], [("t1", 2e-3)]]
    assert json.loads(out.read_text())["train"] == ["small"]
    with pytest.raises(SystemExit, match="no task with all grids up to 1 x 1"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args, "--largest", 1)


@pytest.mark.parametrize("flag", [("--lr", 1e-3), ("--steps", 4), ("--style", "self-qa"), ("--epochs", 3)])
@pytest.mark.parametrize("script", [train_outer, eval_arc])
def test_settings_without_effect_are_refused(script, flag, tiny_folder, monkeypatch, capsys):
    task = ["--task", "arc"] if script is train_outer else []
    with pytest.raises(SystemExit):
        run_script(monkeypatch, script, tiny_folder, *task, *flag)
    assert f"{flag[0]} has no effect on --task arc" in capsys.readouterr().err


def test_prompts_longer_than_the_context_are_counted(tiny_folder, tasks_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(monkeypatch, eval_arc, tiny_folder, "--data", tasks_file, "--max-new", 2000, "--work", tmp_path / "w")
    assert "2 of 2 tasks left out" in capsys.readouterr().out
