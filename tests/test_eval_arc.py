"""eval_arc.py, and train_outer.py --task arc: the scripts on ARC, on tiny models."""

import json

import pytest
from conftest import run_script, watch_weights, write_checkpoint
from test_puzzle import SETTINGS, text

import eval_arc
import puzzle
import train_outer
from common import read_jsonl
from lora import Adapters, LoRAConfig, save_adapter
from puzzle import EXAMPLE, parse_settings


@pytest.mark.parametrize("family", ["smollm2", "llama3", "qwen2"])
def test_the_outer_loop_and_the_ladder(
    family, tiny_folder, tasks_file, tmp_path, monkeypatch, capsys
):
    """Self-edits of a random model are no settings; here it "samples" sound ones, and one that is not."""
    folder = tiny_folder
    if family != "smollm2":
        folder = write_checkpoint(tmp_path / family, family, vocab_size=49152)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_folder / name).read_bytes())
    good, calls = parse_settings(text(num_train_epochs=1), True), []

    def sampled(sample, ended):
        calls.append(1)
        return [({}, "malformed"), good, (EXAMPLE, "")][len(calls) % 3]

    monkeypatch.setattr("puzzle.parse_settings", sampled)
    monkeypatch.setattr(
        "puzzle.NOTHING", {**puzzle.NOTHING, "solved": -1.0}
    )  # so that unsolved ones are reinforced
    common = ["--data", tasks_file, "--augmented", 4, "--rank", 2, "--max-new", 8, "--samples", 3]
    run = tmp_path / "run"
    extra = ["--task", "arc", "--out", run, "--rounds", 1, "--outer-rank", 2]
    run_script(monkeypatch, train_outer, folder, *common, *extra)
    [metrics] = read_jsonl(run / "metrics.jsonl")
    assert metrics["total"] == 6 and metrics["flaws"] == {"malformed": 2} and metrics["kept"] == 4
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"heldout": ["t3"]}))
    out = tmp_path / "ladder.json"
    extra = [
        "--tasks",
        tasks,
        "--run",
        run,
        "--out",
        out,
        "--work",
        tmp_path / "work",
        "--show",
        "--vote",
        3,
    ]
    run_script(monkeypatch, eval_arc, folder, *common, *extra)
    result = json.loads(out.read_text())
    assert [r["method"] for r in result["rows"]] == [
        "icl",
        "ttt-fixed",
        "self-edit",
        "seal-1",
        "best-of-3",
    ]
    assert (
        result["n_tasks"] == 1
        and {t["id"] for t in result["tasks"]} == {"t3"}
        and len(result["tasks"]) == 8
    )
    assert [(r.get("sound"), r.get("copied")) for r in result["rows"][2:]] == [
        (2 / 3, 1 / 2),
        (2 / 3, 1 / 2),
        (None, None),
    ]
    assert all({"config", "solved", "prediction", "flaw"} <= t.keys() for t in result["tasks"])
    assert {("icl", "seal-1"), ("ttt-fixed", "seal-1")} <= {
        (s["from"], s["to"]) for s in result["steps"]
    }
    printed = capsys.readouterr().out
    assert (
        "voted" in result["rows"][1]
        and "\x1b[48;5;" in printed
        and "ttt-fixed to seal-1: " in printed
    )


@pytest.mark.parametrize("learner", ["base", "policy"])
def test_a_policy_writes_and_its_learner_trains(
    learner, tiny, tiny_folder, tasks_file, tmp_path, monkeypatch
):
    policy, seen = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 0, 4), 1, seed=0), []
    policy.flat += 0.05
    save_adapter(policy, tmp_path / "policy", tiny_folder)
    watch_weights(monkeypatch, "eval_arc.sample_self_edits", tiny, seen)
    watch_weights(monkeypatch, "puzzle.Puzzles.results", tiny, seen)
    args = [
        "--data",
        tasks_file,
        "--limit",
        1,
        "--augmented",
        4,
        "--rank",
        2,
        "--max-new",
        8,
        "--samples",
        1,
    ]
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
    rows = {r["method"]: r for r in json.loads((tmp_path / "o.json").read_text())["rows"]}
    assert (
        "voted" not in rows["self-edit"]
    )  # none of a random model's self-edits is sound, but nobody voted on them


def test_choosing(tiny_folder, tasks_file, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_arc, "GRID", [SETTINGS, SETTINGS | {"lr": 2e-3}])
    real = eval_arc.study_puzzles

    def solves_t2(*args):
        results = real(*args)
        return [
            r | {"solved": float(task.id == "t2" and s["lr"] == 2e-3)}
            for (task, s), r in zip(args[2], results)
        ]

    monkeypatch.setattr(eval_arc, "study_puzzles", solves_t2)
    out = tmp_path / "tasks.json"
    args = [
        "--data",
        tasks_file,
        "--augmented",
        4,
        "--rank",
        2,
        "--choose",
        "--out",
        out,
        "--work",
        tmp_path / "work",
    ]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    chosen = json.loads(out.read_text())
    assert (
        chosen["train"] == ["t2"]
        and chosen["heldout"] == []
        and chosen["solved_by"] == {"t1": None, "t2": 1}
    )


def test_choosing_tries_the_smallest_first_and_what_is_solved_no_more(
    tiny_folder, tasks_file, tmp_path, monkeypatch
):
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
    args = [
        "--data",
        tasks_file,
        "--limit",
        2,
        "--choose",
        "--out",
        out,
        "--work",
        tmp_path / "work",
    ]
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
        (eval_arc, "--largest 3 --tasks t.json", "--largest has no effect with --tasks"),
        (eval_arc, "--choose --oracle", "--oracle has no effect with --choose"),
    ],
)
def test_settings_without_effect_are_refused(script, args, complaint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script.__name__, *args.split()])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert complaint in capsys.readouterr().err


def test_help_shows_the_tasks_own_settings_and_defaults(monkeypatch, capsys):
    shown = {}
    for script, args in ((train_outer, []), (train_outer, ["--task", "arc"]), (eval_arc, [])):
        monkeypatch.setattr("sys.argv", [script.__name__, *args, "-h"])
        with pytest.raises(SystemExit):
            script.parse_arguments()
        shown[" ".join([script.__name__, *args])] = " ".join(capsys.readouterr().out.split())
    assert "best notes (default: improving)" in shown["train_outer --task arc"]
    assert {
        s: ("--augmented" in text, "a row per sequence" in text) for s, text in shown.items()
    } == {
        "train_outer": (False, True),
        "train_outer --task arc": (True, False),
        "eval_arc": (True, False),
    }


def test_prompts_longer_than_the_context_are_counted(
    tiny_folder, tasks_file, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(
            monkeypatch,
            eval_arc,
            tiny_folder,
            "--data",
            tasks_file,
            "--max-new",
            2000,
            "--work",
            tmp_path / "w",
        )
    assert "2 of 2 tasks left out" in capsys.readouterr().out
    monkeypatch.setattr(
        "puzzle.answer_room", lambda *a, **k: 3000
    )  # the prompt fits, what is to be predicted does not
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(
            monkeypatch, eval_arc, tiny_folder, "--data", tasks_file, "--work", tmp_path / "w"
        )


@pytest.mark.parametrize(
    "value", [{"train": ["t1"], "heldout": []}, {"train": ["t1"]}, {"heldout": 3}]
)
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


def test_a_policy_is_not_judged_by_its_training_tasks(
    tiny_folder, tasks_file, tmp_path, monkeypatch
):
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
def test_what_the_base_model_studied_is_studied_once(
    learner, tiny, tiny_folder, tasks_file, tmp_path, monkeypatch
):
    """The ladder's rows, and the rounds of training; a policy that studies is another model each time."""
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 0, 4), 1, seed=0)
    save_adapter(policy, tmp_path / "policy", tiny_folder)
    trained, real = [], puzzle.study_and_predict
    monkeypatch.setattr(
        "puzzle.study_and_predict",
        lambda m, t, some, *a: trained.extend(some) or real(m, t, some, *a),
    )
    monkeypatch.setattr("puzzle.parse_settings", lambda sample, ended: (eval_arc.GRID[0], ""))
    common = [
        "--data",
        tasks_file,
        "--limit",
        1,
        "--augmented",
        4,
        "--rank",
        2,
        "--max-new",
        8,
        "--samples",
        2,
    ]
    common += ["--learner", learner]
    run_script(
        monkeypatch, eval_arc, tiny_folder, *common, "--policy", tmp_path / "policy", "--out", tmp_path / "o.json",
        "--work", tmp_path / "work",
    )  # fmt: skip
    assert len(trained) == (
        1 if learner == "base" else 3
    )  # ttt-fixed, self-edit and seal-1 ask for the same
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert not any("voted" in r for r in rows)  # nobody voted
    trained.clear()
    extra = [
        "--task",
        "arc",
        "--select",
        "best",
        "--rounds",
        2,
        "--outer-rank",
        2,
        "--out",
        tmp_path / "run",
    ]
    run_script(monkeypatch, train_outer, tiny_folder, *common, *extra)
    assert len(trained) == (1 if learner == "base" else 2)
