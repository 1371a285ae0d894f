"""experiments/warm.py: the warm-up on other puzzles, and that nobody is tested on those."""

import json

import numpy as np
import pytest
import torch
from conftest import dies_at, run_script
from safetensors.torch import load_file

import eval_arc
import train_outer
from data.arc import Task
from experiments import warm


def warm_up(monkeypatch, folder, tasks_file, out, *more):
    args = ["--data", tasks_file, "--rank", 2, "--augmented", 3, "--parts", 2, "--batch", 2]
    args += ["--work", out.parent / "work", "--out", out]
    run_script(monkeypatch, warm, folder, *args, *more)
    return load_file(out / "model.safetensors")


def tasks_seen(folder) -> list:
    return json.loads((folder / "config.json").read_text())["arc_tasks_seen"]


def test_a_warmed_model_is_a_model_folder_and_is_refused_its_tasks(
    tiny_folder, tasks_file, tmp_path, monkeypatch
):
    out = tmp_path / "warmed"
    after = warm_up(monkeypatch, tiny_folder, tasks_file, out, "--skip", 1)
    before = load_file(tiny_folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    [seen] = tasks_seen(out)
    common = ["--data", tasks_file, "--max-new", 4, "--samples", 1, "--augmented", 2]
    for script, extra in ((train_outer, ["arc", "--rounds", 1]), (eval_arc, [])):
        with pytest.raises(SystemExit, match="was trained on 1 of these tasks"):
            extra += [*common, "--out", tmp_path / "refused"]
            run_script(monkeypatch, script, out, *extra)
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"heldout": [({"t1", "t2"} - {seen}).pop()]}))
    extra = ["--tasks", tasks, "--rank", 2, "--out", tmp_path / "o.json", "--work", tmp_path / "l"]
    run_script(monkeypatch, eval_arc, out, *common, *extra)
    assert json.loads((tmp_path / "o.json").read_text())["n_tasks"] == 1
    with pytest.raises(SystemExit, match="exists already"):
        warm_up(monkeypatch, tiny_folder, tasks_file, out)
    again = tmp_path / "again" / "warmed"  # what it has seen before, it has still seen
    warm_up(monkeypatch, out, tasks_file, again, "--limit", 1, "--parts", 1)
    assert tasks_seen(again) == ["t1", "t2"]


def test_killed_and_resumed_it_ends_alike(tiny_folder, tasks_file, tmp_path, monkeypatch):
    parts = ["--parts", 3]
    whole = warm_up(monkeypatch, tiny_folder, tasks_file, tmp_path / "a" / "model", *parts)
    with monkeypatch.context() as m:
        dies_at(m, "experiments.warm.train_part", 3)
        with pytest.raises(KeyboardInterrupt):
            warm_up(m, tiny_folder, tasks_file, tmp_path / "b" / "model", *parts)
    assert not (tmp_path / "b" / "model").exists()
    calls = dies_at(monkeypatch, "experiments.warm.train_part", 0)
    resumed = warm_up(monkeypatch, tiny_folder, tasks_file, tmp_path / "b" / "model", *parts)
    assert [args[4] for args in calls] == [3]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_tasks_too_long_to_train_on_are_left_out_and_stay_allowed(
    tiny_folder, tasks_file, tmp_path, monkeypatch
):
    tasks, wide = json.loads(tasks_file.read_text()), [[1] * 9] * 9
    pair = {"input": wide, "output": wide}
    tasks["train"]["t2"] = {"train": [pair] * 2, "test": [pair]}
    tasks_file.write_text(json.dumps(tasks))
    calls = dies_at(monkeypatch, "inner.inner_update", 0)
    warm_up(monkeypatch, tiny_folder, tasks_file, tmp_path / "model", "--longest", 300)
    assert tasks_seen(tmp_path / "model") == ["t1"] and len(calls) == 2
    assert all(len(e.ids) <= 300 for args in calls for e in args[2][0])
    with pytest.raises(SystemExit, match="no task of at most 10 tokens"):
        warm_up(monkeypatch, tiny_folder, tasks_file, tmp_path / "other" / "model", "--longest", 10)


def test_the_parts_differ_and_their_learning_rate_falls(
    tiny_folder, tasks_file, tmp_path, monkeypatch
):
    calls = dies_at(monkeypatch, "inner.inner_update", 0)
    warm_up(monkeypatch, tiny_folder, tasks_file, tmp_path / "model")
    assert [args[3][0].lr for args in calls] == [5e-4, 2.5e-4]
    [one], [two] = (args[2] for args in calls)
    assert len(one) == len(two) == 6 and [e.ids for e in one] != [e.ids for e in two]
    assert not any(e.counts[0] for e in one + two), "an input counts"


def test_a_view_keeps_every_pair_together():
    pairs = [(np.full((1, 2), n, np.int8), np.full((2, 1), n, np.int8)) for n in (1, 2, 3)]
    task, colours, shapes = Task("t", tuple(pairs[:2]), tuple(pairs[2:])), set(), set()
    for n in range(60):
        seen = warm.view(task, np.random.default_rng(n))
        assert len(seen.train) == 3 and not seen.test
        for a, b in seen.train:
            assert a.size == b.size == 2 and a[0, 0] == b[0, 0] and a.shape == b.shape[::-1]
        colours.add(tuple(int(a[0, 0]) for a, _ in seen.train))
        shapes.add(seen.train[0][0].shape)
    assert shapes == {(1, 2), (2, 1)} and len(colours) > 12
    own = [order for order in colours if set(order) == {1, 2, 3}]
    assert 0 < len(own) < len(colours)  # with other colours, or not
    assert len(own) == 6, "an order of the pairs is missing"
