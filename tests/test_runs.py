"""lm/runs.py: settings, rounds, and what a ladder finds in a run's folder."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm.files import read_jsonl
from lm.runs import Rounds, find_policies, open_run, policy_digests, set_outputs


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


def work(folder, total, dies_at=None) -> list[int]:
    done = []
    rounds = Rounds(folder, total)
    for k, path in rounds.remaining():
        assert path == folder / f"round-{k}"
        if k == dies_at:
            raise KeyboardInterrupt
        done.append(k)
        rounds.finish({"round": k, "reward_mean": k / 2})
    return done


def test_finished_rounds_are_skipped(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, 3, dies_at=3)
    assert [m["round"] for m in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert Rounds(tmp_path, 3).done == 2 and work(tmp_path, 3) == [3]
    assert work(tmp_path, 3) == [] and work(tmp_path, 4) == [4]  # one more round goes on
    assert [m["round"] for m in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "round 4  reward_mean 2.000" in capsys.readouterr().out


def test_a_round_without_metrics_is_not_finished(tmp_path):
    rounds = Rounds(tmp_path, 2)
    assert rounds.done == 0 and rounds.folder(1) == tmp_path / "round-1"
    with pytest.raises(AssertionError, match="was not finished"):
        for _ in rounds.remaining():
            pass


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
    assert len(set(policy_digests(found).values())) == 11
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
