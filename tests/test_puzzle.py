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
    pairs = tuple((a, (a + 1) % 10) for a, _ in task.train)  # outputs of their own
    shown = tok.decode(settings_prompt(tok, Task("t", pairs, task.test)))
    for a, b in pairs:
        assert f"input:\n{tok.decode(grid_ids(tok, a))}output:\n{tok.decode(grid_ids(tok, b)[:-1])}" in shown
    assert tok.decode(grid_ids(tok, task.test[0][0])) not in shown
    assert shown.count("<|im_end|>") == 4  # of the turns: system, question and reply of the example, question


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


def test_the_settings_choose_the_data(tiny, tok, tmp_path):
    candidates = [(copying(), SETTINGS | {"groups": [g]}) for g in ("use_size_augmentations", "use_repeat_augmentations")]
    results = study_puzzles(tiny, tok, candidates, LORA, options(augmented=24), 0, tmp_path / "a.jsonl", "test")
    assert results[0]["steps"] == results[1]["steps"] == 12 and results[0]["loss"] != results[1]["loss"]


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


def test_a_row_votes_with_its_own_adapter(tiny, tok, monkeypatch):
    """The second of two candidates: what its vote is asked under, and that a diverged one has none."""
    asked = []
    monkeypatch.setattr("puzzle.vote", lambda m, t, task, adapters, *a: asked.append(adapters.flat) or [[task.test[0][1]]])
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


@pytest.mark.parametrize(
    "script, args, complaint",
    [
        (train_outer, "--task arc --lr 1e-3", "--lr has no effect on --task arc"),
        (train_outer, "--task arc --style self-qa", "--style has no effect on --task arc"),
        (train_outer, "--task arc --split eval", "--split has no effect without --tasks"),
        (train_outer, "--task qa --augmented 3", "--augmented has no effect on --task qa"),
        (train_outer, "--task arc --reward logprob", "--reward logprob needs --select best"),
        (train_outer, "--task", "--task: expected one argument"),
        (eval_arc, "--steps 4", "--steps has no effect on ARC"),
        (eval_arc, "--epochs 3", "--epochs has no effect on ARC"),
        (eval_arc, "--largest 3", "--largest has no effect without --choose"),
        (eval_arc, "--choose --oracle", "--oracle has no effect with --choose"),
    ],
)
def test_settings_without_effect_are_refused(script, args, complaint, tiny_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, script, tiny_folder, *args.split())
    assert complaint in capsys.readouterr().err


def test_help_shows_the_tasks_own_defaults(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_outer.py", "--task", "arc", "-h"])
    with pytest.raises(SystemExit):
        train_outer.parse_arguments()
    assert "best notes (default: improving)" in " ".join(capsys.readouterr().out.split())


def test_prompts_longer_than_the_context_are_counted(tiny_folder, tasks_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(monkeypatch, eval_arc, tiny_folder, "--data", tasks_file, "--max-new", 2000, "--work", tmp_path / "w")
    assert "2 of 2 tasks left out" in capsys.readouterr().out
    monkeypatch.setattr("puzzle.answer_room", lambda *a, **k: 3000)  # the prompt fits, what is to be predicted does not
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(monkeypatch, eval_arc, tiny_folder, "--data", tasks_file, "--work", tmp_path / "w")


def test_answer_room(tok):
    small, wide = np.array([[1]], np.int8), np.array([[1] * 9], np.int8)
    shown = Task("t", ((small, small), (wide, small)), ((small, small),))
    assert answer_room(tok, shown) == 2 + 2 * 10  # nine cells and a row's end
    surprising = Task("t", ((small, small), (small, small)), ((small, wide),))
    assert answer_room(tok, surprising) == 11  # the right answer and its end
    assert answer_room(tok, shown, asked=True) == 22 + len(task_prompt(tok, shown))


@pytest.mark.parametrize("value", [{"train": ["t1"], "heldout": []}, {"train": ["t1"]}, {"heldout": 3}])
def test_a_split_without_tasks_is_an_error(value, tiny_folder, tasks_file, tmp_path, monkeypatch):
    """And not all tasks there are."""
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(value))
    args = ["--data", tasks_file, "--tasks", path, "--work", tmp_path / "w"]
    with pytest.raises(SystemExit, match="no list of task ids under 'heldout'"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)


def test_tasks_that_changed_are_not_resumed(tiny_folder, tasks_file, tmp_path, monkeypatch):
    args = [
        "--data",
        tasks_file,
        "--choose",
        "--augmented",
        4,
        "--rank",
        2,
        "--work",
        tmp_path / "w",
        "--out",
        tmp_path / "o",
    ]
    monkeypatch.setattr(eval_arc, "GRID", [])
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    data = json.loads(tasks_file.read_text())
    data["train"]["t1"]["test"][0]["output"] = [[1]]
    tasks_file.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="data_sha256"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)


def test_a_policy_is_not_judged_by_its_training_tasks(tiny_folder, tasks_file, tmp_path, monkeypatch):
    policy = tmp_path / "run" / "round-1" / "policy"
    policy.mkdir(parents=True)
    (policy / "adapter_config.json").write_text("{}")
    settings = {"task": "arc", "ids": ["t2"], "style": "questions", "shots": 1, "learner": "base"}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    args = ["--data", tasks_file, "--run", tmp_path / "run", "--work", tmp_path / "w"]
    with pytest.raises(SystemExit, match="was trained on 1 of these tasks"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {"task": "qa"}))
    with pytest.raises(SystemExit, match="was trained with --task qa"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)


@pytest.mark.parametrize("learner", ["base", "policy"])
def test_what_the_base_model_studied_is_studied_once(learner, tiny, tiny_folder, tasks_file, tmp_path, monkeypatch):
    """The ladder's rows, and the rounds of training; a policy that studies is another model each time."""
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 0, 4), 1, seed=0)
    save_adapter(policy, tmp_path / "policy", tiny_folder)
    trained, real = [], puzzle.study_and_predict
    monkeypatch.setattr("puzzle.study_and_predict", lambda m, t, some, *a: trained.extend(some) or real(m, t, some, *a))
    monkeypatch.setattr("puzzle.parse_settings", lambda sample, ended: (EXAMPLE, ""))
    common = ["--data", tasks_file, "--limit", 1, "--augmented", 4, "--rank", 2, "--max-new", 8, "--samples", 2]
    common += ["--learner", learner]
    run_script(
        monkeypatch, eval_arc, tiny_folder, *common, "--policy", tmp_path / "policy", "--out", tmp_path / "o.json",
        "--work", tmp_path / "work",
    )  # fmt: skip
    assert len(trained) == (1 if learner == "base" else 3)  # ttt-fixed, self-edit and seal-1 ask for the same
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert not any("voted" in r for r in rows)  # nobody voted
    trained.clear()
    extra = ["--task", "arc", "--select", "best", "--rounds", 2, "--outer-rank", 2, "--out", tmp_path / "run"]
    run_script(monkeypatch, train_outer, tiny_folder, *common, *extra)
    assert len(trained) == (1 if learner == "base" else 2)
