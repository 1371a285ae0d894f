"""experiments/many.py: many passages in one adapter."""

import json

import pytest
from conftest import dies_at, run_script
from test_choice import write

from experiments import many
from lm.adapters import save_adapter
from lm.files import read_jsonl
from lora import PROJECTIONS, Adapters, LoRAConfig


@pytest.fixture
def run(tiny_folder, passages_file, brief_general, tmp_path, monkeypatch):
    """Runs it on three passages; returns what is read from the result file."""

    def written(model, tok, passages, copies, args, seed, log, label, given):
        assert given == {"data": ["questions"]}
        return write(model, tok, passages, copies, args, seed, log)

    monkeypatch.setattr(many, "write_self_edits", written)

    def call(*extra, patch=monkeypatch):
        args = ["--data", passages_file, "--split", "train", "--counts", 2, 3, "--edits", 1, 2]
        args += ["--steps", 1, "--top-layers", 2, "--rank", 2, "--work", tmp_path / "work"]
        run_script(patch, many, tiny_folder, *args, "--out", tmp_path / "out.json", *extra)
        return json.loads((tmp_path / "out.json").read_text())

    return call


def test_every_row_and_killed_on_the_way(run, tiny, tmp_path, monkeypatch):
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, tuple(PROJECTIONS), 0, 4), 1, seed=0)
    save_adapter(policy, tmp_path / "policy", "checkpoint")
    seen, update = [], many.update_one
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        dies_at(patch, "experiments.many.update_one", 4)
        run("--policy", tmp_path / "policy", patch=patch)
    monkeypatch.setattr(many, "of_passages", lambda *a: [0.25] * len(a[2]))
    monkeypatch.setattr(many, "update_one", lambda *a: seen.append(a[2:4]) or update(*a))
    rows = run("--policy", tmp_path / "policy")["rows"]
    keys = [(row["method"], row["edits"], row["count"]) for row in rows]
    expected = [("passages", 0, 2), ("passages", 0, 3)]
    for name in ("untrained", "seal-1"):
        expected += [(name, edits, count) for edits in (1, 2) for count in (2, 3)]
    assert keys == expected and len(seen) == len(expected) - 3  # three were there
    for row in rows:
        assert row["tokens"] > 0 and row["lost"] == pytest.approx(row["alone"] - row["accuracy"])
    # Two notes on each of three passages. Alone each takes a step for each of its two self-edits;
    # all together take so many that the tokens differ by less than a row.
    examples, config = seen[-1]
    assert len(examples) == 3 * (1 + 2) and 1 < config.steps < 3 * 2
    alone = [r["tokens"] for r in read_jsonl(tmp_path / "work" / "seal-1-2-alone.jsonl")]
    assert len(alone) == 3 and abs(rows[-1]["tokens"] - sum(alone)) < 256
    last, others = rows[-1], {row["method"]: row for row in rows if row["edits"] in (0, 2)}
    for name, delta in last["alone_against"].items():
        assert delta["delta"] == pytest.approx(last["alone"] - others[name]["alone"])
    assert [*last["alone_against"]] == ["passages", "untrained"] and not rows[0]["alone_against"]
    again = run("--policy", tmp_path / "policy", "--no-alone")["rows"]
    assert len(again) == len(rows) and "alone" not in again[0]


def test_more_passages_than_there_are(run):
    with pytest.raises(SystemExit, match="--counts 4: there are 3 passages"):
        run("--counts", 4)


def test_steps_are_needed(run, capsys):
    with pytest.raises(SystemExit):
        run("--steps", 0)
    assert "how many for each passage and self-edit?" in capsys.readouterr().err
