"""lm/runs.py: settings, rounds, and what a ladder finds in a run's folder."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from lm.files import read_jsonl, write_jsonl
from lm.runs import (
    Rounds,
    find_policies,
    open_run,
    policy_digests,
    read_settings,
    set_outputs,
    trained_as,
    weights_of,
)


def test_runs_are_resumed_as_what_they_were(tmp_path):
    open_run(tmp_path / "run", {"lr": 0.1, "layers": (1, 2)})
    open_run(tmp_path / "run", {"lr": 0.1, "layers": (1, 2)})
    for other, what in (
        ({"lr": 0.2, "layers": (1, 2)}, "lr = 0.1, now it is 0.2"),
        ({"lr": 0.1}, r"layers = \[1, 2\], now it is None"),
        ({"lr": 0.1, "layers": (1, 2), "rank": 4}, "rank = None, now it is 4"),
    ):
        with pytest.raises(SystemExit, match=what):
            open_run(tmp_path / "run", other)


def test_what_came_later_was_not_there_before(tmp_path):
    """A run that was begun without --student and --agents is resumed without them only."""
    now = {"lr": 0.1, "student": "", "agents": 1, "exchange": "all"}
    open_run(tmp_path, {"lr": 0.1})
    open_run(tmp_path, now)
    for key, value in (("student", "x"), ("agents", 2)):
        (tmp_path / "settings.json").unlink()
        open_run(tmp_path, {"lr": 0.1})
        with pytest.raises(SystemExit, match=f"was started with {key} = "):
            open_run(tmp_path, now | {key: value})


def test_only_what_cannot_change_a_result_may_differ(tmp_path):
    before = {"population": 8, "compile": "off", "device": "auto", "seed": 0}
    open_run(tmp_path, before)
    open_run(tmp_path, before | {"population": 3, "compile": "inductor", "device": "cpu"})
    with pytest.raises(SystemExit, match="seed = 0, now it is 1"):
        open_run(tmp_path, before | {"seed": 1})


def test_other_weights_are_not_resumed_with(tmp_path, model):
    open_run(tmp_path, {}, model)
    with pytest.raises(SystemExit, match="was started with dtype = 'torch.float32', now it is 't"):
        open_run(tmp_path, {}, model.bfloat16())
    assert weights_of(model.float()) == weights_of(model.bfloat16())
    model.float()
    open_run(tmp_path, {}, model)
    with torch.no_grad():
        model.layers[2].mlp.up_proj.weight[0, 5] += 0.1
    with pytest.raises(SystemExit, match="was started with weights = '.*', now it is '"):
        open_run(tmp_path, {}, model)


def test_a_student_that_is_the_writer_is_no_other(tmp_path, model):
    open_run(tmp_path, {}, model, model)
    open_run(tmp_path, {}, model)
    with pytest.raises(SystemExit, match="was started with student_weights = None, now it is '"):
        open_run(tmp_path, {}, model, copy.deepcopy(model))


def test_other_code_is_said(tmp_path, monkeypatch, capsys):
    for name in ("model.py", "lm/runs.py", "experiments/noise.py", "tests/test_runs.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("lm.runs.ROOT", tmp_path)
    open_run(tmp_path / "run", {})
    for name, changed in (("tests/test_runs.py", False), ("experiments/noise.py", True)):
        (tmp_path / name).write_text("x")
        for _ in range(2):  # what is mixed stays so
            open_run(tmp_path / "run", {})
            told = "run was not made by today's code alone: its results may be mixed"
            assert (told in capsys.readouterr().err) is changed


@pytest.mark.parametrize(
    "last, signs",
    [
        ({"repeats": 0.5, "distinct": 0.5, "notes_mean": 6.0}, []),
        ({"repeats": 0.72, "distinct": 0.9, "notes_mean": 12.0}, ["72 % of the texts say"]),
        (
            {"repeats": 0.1, "distinct": 0.25, "notes_mean": 12.0},
            ["25 % of the texts on a passage"],
        ),
        ({"repeats": 0.1, "distinct": 0.9, "notes_mean": 5.0}, ["5.0 notes, of 12.0 at first"]),
        ({"endless": 0.72, "notes_mean": 12.0}, ["72 % of the texts do not end"]),
        ({"endless": 0.45, "notes_mean": 12.0}, []),
        ({"notes_mean": 12.0}, []),  # by an older version
    ],
)
def test_a_collapse_is_said_while_it_runs(last, signs, tmp_path, capsys):
    rounds = Rounds(tmp_path, 2)
    for k, metrics in enumerate(({"repeats": 0.2, "distinct": 0.9, "notes_mean": 12.0}, last), 1):
        for _ in rounds.remaining():
            rounds.finish({"round": k} | metrics)
            break
    said = capsys.readouterr().err
    assert said.count("note:") == bool(signs) and all(f"round 2: {sign}" in said for sign in signs)


def test_a_folder_is_one_processs_own(tmp_path):
    code = f"from lm.runs import open_run\nopen_run({str(tmp_path / 'run')!r}, {{}})"
    start = [sys.executable, "-c", code + "\nprint(1, flush=True)\ninput()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen(start, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="another process is at work in .*run"):
            open_run(tmp_path / "run", {})
        other.kill()
    open_run(tmp_path / "run", {})
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "file/run"):
        with pytest.raises(SystemExit, match=f"cannot write .*{path}: "):
            open_run(tmp_path / path, {})


def work(folder, total, dies_at=None) -> list[int]:
    done = []
    rounds = Rounds(folder, total)
    for k, path in rounds.remaining():
        assert path == folder / f"round-{k}"
        if k == dies_at:
            raise KeyboardInterrupt
        done.append(k)
        rounds.finish({"round": k, "reward_mean": k / 2, "reward_agents": [k / 3, 1.0]})
    return done


def test_finished_rounds_are_skipped(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, 3, dies_at=3)
    assert [m["round"] for m in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert Rounds(tmp_path, 3).done == 2 and work(tmp_path, 3) == [3]
    assert work(tmp_path, 3) == [] and work(tmp_path, 4) == [4]  # one more round goes on
    assert [m["round"] for m in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "round 4  reward_mean 2.000  reward_agents 1.333 1.000\n" in capsys.readouterr().out


def test_a_round_without_metrics_is_not_finished(tmp_path):
    rounds = Rounds(tmp_path, 2)
    assert rounds.done == 0 and rounds.folder(1) == tmp_path / "round-1"
    with pytest.raises(AssertionError, match="was not finished"):
        for _ in rounds.remaining():
            pass


@pytest.mark.parametrize("rounds", [[2], [1, 1], [1, None]])
def test_metrics_of_other_rounds_are_refused(rounds, tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"round": k} for k in rounds])
    with pytest.raises(SystemExit, match=f"line {len(rounds)} is not of round {len(rounds)}"):
        Rounds(tmp_path, 3)


def test_metrics_that_are_no_numbers_are_refused(tmp_path):
    """Before a round's work, not after it."""
    for value in ("x", None, 10**400):
        write_jsonl(tmp_path / "metrics.jsonl", [{"round": 1, "distinct": value}])
        with pytest.raises(SystemExit, match=f"metrics.jsonl line 1: distinct is {value!r:.10}"):
            Rounds(tmp_path, 3)


@pytest.mark.parametrize(
    "run, out, work, expected",
    [
        (None, None, None, ("results/l.json", "runs/eval-l")),
        (None, "x/y.json", None, ("x/y.json", "runs/eval-y")),
        ("runs/qa", None, None, ("runs/qa/ladder.json", "runs/qa/ladder")),
        ("runs/qa", "x/y.json", None, ("x/y.json", "runs/eval-y")),
        ("runs/qa", None, "w", ("runs/qa/ladder.json", "w")),
    ],
)
def test_a_ladder_writes_beside_its_run(run, out, work, expected):
    args = set_outputs(SimpleNamespace(run=run, out=out, work=work), "results/l.json")
    assert (args.out, args.work) == expected


@pytest.fixture
def a_run(tmp_path):
    """A run with eleven rounds, and an adapter beside it."""
    for k in range(1, 12):
        policy = tmp_path / "run" / f"round-{k}" / "policy"
        policy.mkdir(parents=True)
        (policy / "adapter_config.json").write_text("{}")
        (policy / "adapter_model.safetensors").write_text(str(k))
    (tmp_path / "run" / "round-12").mkdir()  # killed
    settings = {"domain": "qa", "style": "questions", "shots": 1, "learner": "base"}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    return tmp_path / "run"


def arguments(run, **changes):
    args = {"run": run, "policy": [], "style": "questions", "shots": 1, "learner": "base"}
    return SimpleNamespace(**args | changes)


def test_the_policies_of_a_run_in_order(a_run):
    found = find_policies(arguments(a_run, policy=["other"]), "qa")
    assert list(found) == [f"seal-{k}" for k in range(1, 13)]
    assert found["seal-10"] == a_run / "round-10" / "policy" and found["seal-12"] == Path("other")
    del found["seal-12"]
    digests = policy_digests(found)
    assert len({digests[name] for name in found}) == 11
    (found["seal-1"] / "adapter_config.json").write_text('{"lora_alpha": 5}')  # another policy
    changed = policy_digests(found)
    assert [name for name in changed if changed[name] != digests[name]] == ["seal-1 config"]
    assert find_policies(arguments(None, policy=["other"]), "qa") == {"seal-1": Path("other")}
    assert find_policies(arguments(None), "qa") == {}


@pytest.mark.parametrize("key, other", [("style", "rewrite"), ("shots", 0), ("learner", "policy")])
def test_a_run_that_was_to_write_otherwise_is_refused(a_run, key, other):
    with pytest.raises(SystemExit, match=f"was trained with --{key} "):
        find_policies(arguments(a_run, **{key: other}), "qa")


def test_a_run_of_another_domain_or_version_is_refused(a_run, tmp_path):
    with pytest.raises(SystemExit, match="was trained with train_outer.py qa"):
        find_policies(arguments(a_run), "arc")
    (a_run / "settings.json").write_text(json.dumps({"task": "qa", "style": "questions"}))
    with pytest.raises(SystemExit, match="was written by an older version"):
        find_policies(arguments(a_run), "qa")
    with pytest.raises(SystemExit, match="no finished round"):
        find_policies(arguments(tmp_path), "qa")


def test_a_policy_in_a_runs_folder_was_trained_as_the_run(a_run):
    """However it is named: a second agent's has to be given by --policy."""
    shutil.copytree(a_run / "round-2" / "policy", a_run / "round-2" / "policy-2")
    policy = a_run / "round-2" / "policy-2"
    assert find_policies(arguments(None, policy=[policy]), "qa") == {"seal-1": policy}
    with pytest.raises(SystemExit, match=f"{policy} was trained with --shots 1"):
        find_policies(arguments(None, policy=[policy], shots=0), "qa")
    args = arguments(None, policy=["elsewhere"], proxy=a_run / "round-1" / "policy")
    assert not trained_as(args)
    [(where, settings)] = trained_as(args, proxy=True)
    assert where == args.proxy and settings["domain"] == "qa"


def test_a_copy_of_a_round_is_left_out(a_run, capsys):
    for name in ("round-1-old", "round-01", "round-0"):
        shutil.copytree(a_run / "round-1", a_run / name)
    found = find_policies(arguments(a_run), "qa")
    assert list(found) == [f"seal-{k}" for k in range(1, 12)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("is not the name of a round" in line for line in lines)


def test_other_agents_are_named(a_run, capsys):
    shutil.copytree(a_run / "round-2" / "policy", a_run / "round-2" / "policy-2")
    assert find_policies(arguments(a_run), "qa")["seal-2"] == a_run / "round-2" / "policy"
    other = a_run / "round-2" / "policy-2"
    told = f"seal-2 is the first agent's policy; for others there is --policy {other}"
    assert told in capsys.readouterr().err


def test_a_ladders_policies_come_and_go(tmp_path):
    """As rows do: but one that was used before must be the same."""
    for policies in ({"seal-1": "a"}, {"seal-1": "a", "seal-2": "b"}, {"proxy": "c"}, {}):
        open_run(tmp_path / "run", {"lr": 0.1, "policies": policies})
    known = json.loads((tmp_path / "run/settings.json").read_text())["policies"]
    assert known == {"seal-1": "a", "seal-2": "b", "proxy": "c"}
    with pytest.raises(SystemExit, match="was started with policies = "):
        open_run(tmp_path / "run", {"lr": 0.1, "policies": {"seal-2": "other", "seal-3": "d"}})
    with pytest.raises(SystemExit, match="was started with lr = 0.1"):
        open_run(tmp_path / "run", {"lr": 0.2, "policies": {"seal-4": "e"}})
    assert json.loads((tmp_path / "run/settings.json").read_text())["policies"] == known


def ship(folder, **changes):
    """A shipped policy that says how it was trained."""
    folder.mkdir()
    before = {"domain": "qa", "style": "questions", "shots": 1, "learner": "base"}
    (folder / "policy.json").write_text(json.dumps({"settings": before | changes}))
    return folder


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"shots": 0}, "was trained with --shots 0; give this script the same"),
        ({"domain": "arc"}, "was trained with train_outer.py arc"),
        ({"settings": True, "budget": 99}, "was trained with --settings; give this script"),
    ],
)
def test_a_shipped_policy_says_how_it_was_trained(changes, told, tmp_path):
    sound = ship(tmp_path / "sound")
    assert find_policies(arguments(None, policy=[sound]), "qa") == {"seal-1": sound}
    with pytest.raises(SystemExit, match=f"other {told}"):
        find_policies(arguments(None, policy=[sound, ship(tmp_path / "other", **changes)]), "qa")
    with pytest.raises(SystemExit, match="policy.json: field 'data' is missing"):
        trained_as(arguments(None, policy=[sound]), "data")


def test_a_shipped_policy_is_named_after_its_round(a_run, tmp_path):
    """Others count on; so does a second one of the same round."""
    shipped, broken = ship(tmp_path / "shipped"), ship(tmp_path / "broken")
    settings = json.loads((shipped / "policy.json").read_text())
    (shipped / "policy.json").write_text(json.dumps(settings | {"round": "round-3"}))
    (broken / "policy.json").write_text(json.dumps(settings | {"round": "round-0"}))
    assert find_policies(arguments(None, policy=[shipped]), "qa") == {"seal-3": shipped}
    found = find_policies(arguments(None, policy=[broken, shipped, "other", shipped]), "qa")
    assert list(found) == ["seal-1", "seal-3", "seal-4", "seal-5"]
    assert list(found.values()) == [broken, shipped, Path("other"), shipped]
    rounds = find_policies(arguments(a_run), "qa")
    taken = int(list(rounds)[-1].removeprefix("seal-"))
    (shipped / "policy.json").write_text(json.dumps(settings | {"round": f"round-{taken}"}))
    assert find_policies(arguments(a_run, policy=[shipped]), "qa") == rounds | {
        f"seal-{taken + 1}": shipped
    }


def test_settings_that_a_ladder_needs(a_run):
    assert read_settings(a_run, "style")["shots"] == 1
    with pytest.raises(SystemExit, match="settings.json: field 'ids' is missing"):
        read_settings(a_run, "style", "ids")


@pytest.mark.parametrize(
    "before, said",
    [
        ({"lr": 4e-3, "rank": 16}, ""),
        ({"lr": 1e-3, "top_layers": 5}, "was trained with --top-layers 5, --lr 0.001, other than"),
        ({"lr": 1e-3, "reward": "proxy"}, ""),
        ({"student": "another"}, "was trained with --student another, other than this ladder"),
    ],
)
def test_another_inner_update_than_the_runs_is_said(before, said, a_run, capsys):
    settings = json.loads((a_run / "settings.json").read_text())
    (a_run / "settings.json").write_text(json.dumps(settings | before))
    find_policies(arguments(a_run, rank=16, top_layers=10, lr=4e-3, student=""), "qa")
    assert said in capsys.readouterr().err if said else capsys.readouterr().err == ""
