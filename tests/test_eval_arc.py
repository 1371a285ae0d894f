"""eval_arc.py, and train_outer.py arc: the scripts on ARC, on tiny models."""

import json
import sys
from functools import partial

import pytest
from conftest import dies_at, run_script, watch_weights, write_checkpoint
from test_arc import SETTINGS, text

import arc
import eval_arc
import eval_qa
import train_outer
from arc import EXAMPLE, parse_settings
from eval_arc import Ladder
from lm.adapters import save_adapter
from lm.files import read_jsonl
from lora import Adapters, LoRAConfig


def small(tasks_file, *extra) -> list:
    """Flags for a ladder or a run that takes seconds."""
    args = ["--data", tasks_file, "--augmented", 4, "--rank", 2, "--max-new", 8]
    return [*args, *extra]


def a_policy(tiny, tiny_folder, folder, change: float = 0.05):
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 0, 4), 1, seed=0)
    policy.flat += change
    save_adapter(policy, folder, tiny_folder)
    return folder


@pytest.mark.parametrize("family", ["smollm2", "llama3", "qwen2"])
def test_the_outer_loop_and_the_ladder(
    family, tiny_folder, tasks_file, tmp_path, monkeypatch, capsys
):
    """Self-edits of a random model are no settings; here it "samples" sound ones, and one that is
    not. The ladder finds the run, and writes beside it."""
    folder = tiny_folder
    if family != "smollm2":
        folder = write_checkpoint(tmp_path / family, family, vocab_size=49152)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_folder / name).read_bytes())
    good, calls = parse_settings(text(num_train_epochs=1), True), []

    def sampled(sample, ended):
        calls.append(1)
        return [({}, "malformed"), good, (EXAMPLE, "")][len(calls) % 3]

    monkeypatch.setattr("arc.parse_settings", sampled)
    # So that unsolved ones are reinforced.
    monkeypatch.setattr("arc.NOTHING", {**arc.NOTHING, "solved": -1.0})
    common, run = small(tasks_file, "--samples", 3), tmp_path / "run"
    common += [] if family == "smollm2" else ["--shots", 0]  # worked examples take time
    extra = ["--out", run, "--rounds", 1, "--outer-rank", 2]
    run_script(monkeypatch, train_outer, folder, "arc", *common, *extra)
    [metrics] = read_jsonl(run / "metrics.jsonl")
    assert metrics["total"] == 6 and metrics["flaws"] == {"malformed": 2} and metrics["kept"] == 4
    for r in read_jsonl(run / "round-1" / "candidates.jsonl"):
        [part] = r["parts"]
        assert part["credit"] == r["reward"] == (-1.0 if r["flaw"] else 0.0)
        assert part["kept"] is not bool(r["flaw"]) and r["style"] == "settings"
    settings = json.loads((run / "settings.json").read_text())
    assert settings["domain"] == "arc" and settings["ids"] == ["t1", "t2"]
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"heldout": ["t3"]}))
    extra = ["--tasks", tasks, "--run", run, "--show", "--vote", 3]
    run_script(monkeypatch, eval_arc, folder, *common, *extra)
    result = json.loads((run / "ladder.json").read_text())
    methods = ["icl", "ttt-fixed", "self-edit", "seal-1", "best-of-3"]
    assert [r["method"] for r in result["rows"]] == methods
    assert result["n_tasks"] == 1 and len(result["tasks"]) == 8
    assert {t["id"] for t in result["tasks"]} == {"t3"}
    written = [(r.get("sound"), r.get("copied")) for r in result["rows"][2:]]
    copied = 1 / 2 if "--shots" not in common else 0  # of what was not shown nothing is copied
    assert written == [(2 / 3, copied), (2 / 3, copied), (None, None)]
    assert [r["attempts"] for r in result["rows"]] == [1, 1, 1, 1, 3]
    assert [r["voted"]["attempts"] for r in result["rows"][1:]] == [2, 2, 2, 6]
    assert all({"config", "solved", "prediction", "flaw"} <= t.keys() for t in result["tasks"])
    pairs = {(s["from"], s["to"]) for s in result["steps"]}
    assert {("icl", "seal-1"), ("ttt-fixed", "seal-1")} <= pairs
    printed = capsys.readouterr().out
    assert "voted" in result["rows"][1] and "\x1b[48;5;" in printed
    assert "ttt-fixed to seal-1: " in printed and "seal-1, two attempts by vote: " in printed
    for row in ("self-edit", "seal-1"):
        assert len(read_jsonl(run / "ladder" / row / "sampled.jsonl")) == 3
    assert (run / "ladder" / "ttt-fixed" / "scored.jsonl").is_file()


@pytest.mark.parametrize("who", ["base", "policy"])
def test_a_policy_writes_and_its_learner_trains(
    who, tiny, tiny_folder, tasks_file, tmp_path, monkeypatch
):
    seen, policy = [], a_policy(tiny, tiny_folder, tmp_path / "policy")
    watch_weights(monkeypatch, "arc.sample_self_edits", tiny, seen)
    watch_weights(monkeypatch, "eval_arc.update_and_quiz", tiny, seen)
    args = small(tasks_file, "--limit", 1, "--samples", 1, "--policy", policy, "--learner", who)
    args += ["--out", tmp_path / "o.json", "--work", tmp_path / "work"]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    fixed, *rows = seen
    assert fixed == ("update_and_quiz", False)
    assert [name for name, _ in rows] == ["sample_self_edits", "update_and_quiz"] * 2
    assert [changed for _, changed in rows] == [False, False, True, who == "policy"]
    rows = {r["method"]: r for r in json.loads((tmp_path / "o.json").read_text())["rows"]}
    # None of a random model's self-edits is sound, but nobody voted on them.
    assert "voted" not in rows["self-edit"]


def test_a_student_trains_and_predicts_what_another_writes(
    tiny_folder, student_folder, tasks_file, tmp_path, monkeypatch
):
    seen = []

    def watched(of, who, model, *rest, **options):
        seen.append((who, model.config.qkv_bias))  # only the student has these
        return of(model, *rest, **options)

    for who in ("arc.sample_self_edits", "eval_arc.update_and_quiz", "eval_arc.predict"):
        module, name = who.split(".")
        of = getattr(sys.modules[module], name)
        monkeypatch.setattr(who, partial(watched, of, name))
    monkeypatch.setattr("arc.parse_settings", lambda text, ended: (SETTINGS, ""))
    args = small(tasks_file, "--limit", 1, "--samples", 1, "--shots", 0)
    args += ["--student", student_folder, "--out", tmp_path / "o.json", "--work", tmp_path / "work"]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    assert set(seen) == {
        ("sample_self_edits", False),
        ("update_and_quiz", True),
        ("predict", True),
    }


def test_a_killed_ladder_goes_on(tiny_folder, tasks_file, tmp_path, monkeypatch):
    """Nothing that its folder holds is sampled or trained again, and the result is the same."""
    settings = [SETTINGS, SETTINGS | {"lr": 2e-3}]
    monkeypatch.setattr("arc.parse_settings", lambda sample, ended: (settings[len(sample) % 2], ""))

    def climb(name):
        args = small(tasks_file, "--samples", 2, "--population", 1, "--shots", 0)
        args += ["--out", tmp_path / f"{name}.json", "--work", tmp_path / name]
        run_script(monkeypatch, eval_arc, tiny_folder, *args)
        return json.loads((tmp_path / f"{name}.json").read_text())

    whole = climb("a")
    calls = dies_at(monkeypatch, "reward.inner_update", 4)  # two of ttt-fixed, one of self-edit
    with pytest.raises(KeyboardInterrupt):
        climb("b")
    sampled = dies_at(monkeypatch, "selfedit.generate", 1)
    again = climb("b")
    trained = sum(len(read_jsonl(f)) for f in tmp_path.glob("a/*/scored.jsonl"))
    assert len(calls) == trained + 1 and not sampled
    assert again["rows"] == whole["rows"] and again["tasks"] == whole["tasks"]
    for file in tmp_path.glob("a/*/*.jsonl"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_what_does_not_fit_is_counted(tiny_folder, tasks_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("arc.LONGEST", 3)
    out = tmp_path / "out.json"
    args = small(tasks_file, "--samples", 1, "--out", out, "--work", tmp_path / "work")
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    icl, fixed, *_ = json.loads(out.read_text())["rows"]
    assert (icl["too_long"], fixed["too_long"]) == (0, fixed["n"])
    told = f"ttt-fixed: {fixed['n']} attempts without a training sequence that fits"
    assert told in capsys.readouterr().out


def test_choosing(tiny_folder, tasks_file, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_arc, "GRID", [SETTINGS, SETTINGS | {"lr": 2e-3}])
    real = Ladder.fixed

    def solves_t2(ladder, method, tasks, settings):
        results = []
        for task, r in zip(tasks, real(ladder, method, tasks, settings)):
            solved = task.id == "t2" and settings["lr"] == 2e-3
            results.append(r | {"solved": float(solved)})
        return results

    monkeypatch.setattr(Ladder, "fixed", solves_t2)
    out = tmp_path / "tasks.json"
    args = small(tasks_file, "--choose", "--out", out, "--work", tmp_path / "work")
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    chosen = json.loads(out.read_text())
    assert chosen["train"] == ["t2"] and chosen["heldout"] == []
    assert chosen["solved_by"] == {"t1": None, "t2": 1}


def test_choosing_tries_the_smallest_first_and_what_is_solved_no_more(
    tiny_folder, tasks_file, tmp_path, monkeypatch
):
    data, tried = json.loads(tasks_file.read_text()), []
    pairs = [{"input": [[c, c, c]], "output": [[c, c, c]]} for c in (1, 2, 3)]
    data["train"]["small"] = {"train": pairs[:2], "test": pairs[2:]}
    tasks_file.write_text(json.dumps(data))
    monkeypatch.setattr(eval_arc, "GRID", [SETTINGS, SETTINGS | {"lr": 2e-3}])

    def fixed(ladder, method, tasks, settings):
        tried.append([(task.id, settings["lr"]) for task in tasks])
        return [{"solved": float(task.id == "small")} for task in tasks]

    monkeypatch.setattr(Ladder, "fixed", fixed)
    out = tmp_path / "tasks.json"
    args = ["--data", tasks_file, "--limit", 2, "--choose", "--out", out, "--work", tmp_path / "w"]
    run_script(monkeypatch, eval_arc, tiny_folder, *args)
    assert tried == [[("small", 1e-3), ("t1", 1e-3)], [("t1", 2e-3)]]
    assert json.loads(out.read_text())["train"] == ["small"]
    with pytest.raises(SystemExit, match="no task with all grids up to 1 x 1"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args, "--largest", 1)


@pytest.mark.parametrize(
    "script, args, complaint",
    [
        (train_outer, "arc --lr 1e-3", "unrecognized arguments: --lr 1e-3"),
        (train_outer, "arc --style self-qa", "unrecognized arguments: --style self-qa"),
        (train_outer, "arc --steps 4", "unrecognized arguments: --steps 4"),
        (train_outer, "arc --epochs 4", "unrecognized arguments: --epochs 4"),
        (train_outer, "arc --row-len 4", "unrecognized arguments: --row-len 4"),
        (train_outer, "arc --keep 2", "unrecognized arguments: --keep 2"),
        (train_outer, "arc --vote 2", "unrecognized arguments: --vote 2"),
        (train_outer, "arc --select notes", "--select: invalid choice: 'notes'"),
        (train_outer, "arc --reward proxy", "--reward: invalid choice: 'proxy'"),
        (train_outer, "arc --split eval", "--split has no effect without --tasks"),
        (train_outer, "arc --reward logprob", "--reward logprob needs --select best"),
        (train_outer, "qa --augmented 3", "unrecognized arguments: --augmented 3"),
        (train_outer, "qa --tasks t.json", "unrecognized arguments: --tasks t.json"),
        (train_outer, "qa --largest 3", "unrecognized arguments: --largest 3"),
        (train_outer, "", "the following arguments are required: qa|arc"),
        (train_outer, "--task qa", "error: "),  # as it was once called
        (train_outer, "qa --samp 3", "unrecognized arguments: --samp 3"),  # no abbreviations
        (eval_arc, "--steps 4", "unrecognized arguments: --steps 4"),
        (eval_arc, "--epochs 3", "unrecognized arguments: --epochs 3"),
        (eval_arc, "--largest 3 --tasks t.json", "--largest has no effect with --tasks"),
        (eval_arc, "--choose --oracle", "--oracle has no effect with --choose"),
        (eval_arc, "--choose --temperature 1", "--temperature has no effect with --choose"),
        (eval_arc, "--choose", "--choose writes a list of tasks: where to (--out)?"),
        (eval_arc, "--seed 9223372036854775808", "is not a number below 9223372036854775808"),
        (eval_qa, "--match both --steps 0", "--match steps needs --steps above 0"),
    ],
)
def test_settings_without_effect_are_refused(script, args, complaint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script.__name__, *args.split()])
    with pytest.raises(SystemExit) as e:
        script.parse_arguments()
    said = capsys.readouterr().err
    assert complaint in said and said.startswith("error: ") and said.count("\n") == 1
    assert e.value.code == 2


def test_help_shows_the_domains_own_settings_and_defaults(monkeypatch, capsys):
    shown = {}
    scripts = ((train_outer, []), (train_outer, ["qa"]), (train_outer, ["arc"]), (eval_arc, []))
    for script, args in scripts:
        monkeypatch.setattr("sys.argv", [script.__name__, *args, "-h"])
        with pytest.raises(SystemExit):
            script.parse_arguments()
        name = " ".join([script.__name__, *args])
        shown[name] = " ".join(capsys.readouterr().out.split())
    assert "(default: improving)" in shown["train_outer arc"]
    assert "whoever wrote them (default: parts)" in shown["train_outer qa"]
    own = {name: ("--augmented" in h, "a row per sequence" in h) for name, h in shown.items()}
    assert own == {
        "train_outer": (False, False),
        "train_outer qa": (False, True),
        "train_outer arc": (True, False),
        "eval_arc": (True, False),
    }


def test_prompts_longer_than_the_context_are_counted(
    tiny_folder, tasks_file, tmp_path, monkeypatch, capsys
):
    args = ["--data", tasks_file, "--work", tmp_path / "w"]
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args, "--max-new", 2000)
    assert "2 of 2 tasks left out" in capsys.readouterr().out
    # The prompt fits, what is to be predicted does not.
    monkeypatch.setattr("arc.answer_room", lambda *a, **k: 3000)
    with pytest.raises(SystemExit, match="no tasks left"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)


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
    args = small(tasks_file, "--choose", "--work", tmp_path / "w", "--out", tmp_path / "o")
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
    settings = {"domain": "arc", "ids": ["t2"], "shots": 1, "learner": "base"}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    args = ["--data", tasks_file, "--run", tmp_path / "run", "--work", tmp_path / "w"]
    with pytest.raises(SystemExit, match="was trained on 1 of these tasks"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)
    by_folder = ["--data", tasks_file, "--policy", policy, "--work", tmp_path / "w"]
    with pytest.raises(SystemExit, match=f"{policy} was trained on 1 of these tasks"):
        run_script(monkeypatch, eval_arc, tiny_folder, *by_folder)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:  # asked for
        dies_at(patch, "eval_arc.open_run", 1)
        (policy / "adapter_model.safetensors").touch()
        (tmp_path / "tasks.json").write_text(json.dumps({"train": ["t2"]}))
        chosen = ["--tasks", tmp_path / "tasks.json", "--split", "train"]
        run_script(patch, eval_arc, tiny_folder, *args, *chosen)
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {"domain": "qa"}))
    with pytest.raises(SystemExit, match=r"was trained with train_outer\.py qa"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)
    del settings["domain"]
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {"task": "arc"}))
    with pytest.raises(SystemExit, match="was written by an older version"):
        run_script(monkeypatch, eval_arc, tiny_folder, *args)


@pytest.mark.parametrize("who", ["base", "policy"])
def test_what_the_base_model_trained_is_trained_once(
    who, tiny, tiny_folder, tasks_file, tmp_path, monkeypatch
):
    """In the ladder's rows, and in the rounds of training; a policy that learns is another model
    each time."""
    policy = a_policy(tiny, tiny_folder, tmp_path / "policy", 0.0)
    monkeypatch.setattr("arc.parse_settings", lambda sample, ended: (eval_arc.GRID[0], ""))
    common = small(tasks_file, "--limit", 1, "--samples", 2, "--learner", who, "--shots", 0)
    args = ["--policy", policy, "--out", tmp_path / "o.json", "--work", tmp_path / "work"]
    trained = dies_at(monkeypatch, "reward.inner_update", 0)
    run_script(monkeypatch, eval_arc, tiny_folder, *common, *args)
    # ttt-fixed, self-edit and seal-1 ask for the same.
    once = who == "base"
    assert [len(examples) for _, _, examples, *_ in trained] == ([1] if once else [1, 1, 1])
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert not any("voted" in r for r in rows)  # nobody voted
    trained = dies_at(monkeypatch, "train_outer.inner_update", 0)
    args = ["--select", "best", "--rounds", 2, "--outer-rank", 2, "--out", tmp_path / "run"]
    run_script(monkeypatch, train_outer, tiny_folder, "arc", *common, *args)
    assert [len(examples) for _, _, examples, *_ in trained] == ([1] if once else [1, 1])
