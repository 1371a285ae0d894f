"""experiments/chosen.py: what self-edits asked for, round by round, and what it earned."""

import json
import sys

import numpy as np
import pytest

from experiments import chosen, figures
from lm.files import read_json, write_jsonl
from selfedit import Part, SelfEdit, settings_of


def edit(passage: str, accuracy: float, *settings) -> dict:
    e = SelfEdit(passage, [Part("x")], score={"accuracy": accuracy})
    if settings:
        data, loss, rate, epochs = settings
        e.settings = settings_of(data, 1, 0, 0, loss, rate, epochs)
    return e.record()


@pytest.fixture
def a_run(tmp_path):
    """Two rounds on two passages; in the second round all ask for the same."""
    first = [edit("a", 0.0), edit("a", 0.5, ["questions"], "all", 0.0059, 1)]
    first += [
        edit("b", 0.25, ["questions"], "all", 0.006, 2),
        edit("b", 0.75, [], "answers", 0.02, 30),
    ]
    second = [edit(p, 1.0, ["passage", "facts"], "all", 0.009, 12) for p in "aabb"]
    for k, edits in enumerate((first, second), 1):
        (tmp_path / f"round-{k}").mkdir()
        write_jsonl(tmp_path / f"round-{k}" / "candidates.jsonl", edits)
    write_jsonl(tmp_path / "metrics.jsonl", [{"round": 1}, {"round": 2}])
    settings = {"domain": "qa", "seed": 0, "settings": True, "model": "m"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path


def run(monkeypatch, folder, out):
    command = ["experiments/chosen.py", "--run", str(folder), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    chosen.main()


def test_what_was_asked_for_and_earned(a_run, tmp_path, monkeypatch):
    run(monkeypatch, a_run, tmp_path / "out.json")
    one, two = read_json(tmp_path / "out.json")["rounds"]
    counts = {name: (own["n"], own["value"]) for name, own in one["learning_rate"].items()}
    assert counts == {
        "none": (1, 0.0), "from 0.003": (1, 0.5), "from 0.006": (1, 0.25), "from 0.012": (1, 0.75)
    }  # fmt: skip
    assert set(one["epochs"]) == {"none", "from 0", "from 2", "from 12"}
    assert one["data"]["none of these"]["value"] == 0.75 and one["loss"]["all"]["n"] == 2
    assert (one["all"]["n"], one["all"]["value"]) == (4, 0.375)
    assert (one["best"]["n"], one["best"]["value"]) == (2, 0.625)
    low, high = one["best"]["ci95"]
    assert (low, high) == (0.5, 0.75)  # either passage
    assert list(two["data"]) == ["passage, facts"] and two["all"]["ci95"] == [1.0, 1.0]
    [left, right] = figures.draw_chosen({"rounds": [one, two]}).axes
    heights = [bar.get_height() for bar in left.patches]
    assert heights == [0, 25, 25, 0, 25, 0, 0, 0, 100, 0]
    marks = [line.get_ydata() for line in right.lines if line.get_linestyle() == "None"]
    assert [list(m) for m in marks] == [[50, 25, 75], [100]]


def test_what_each_setting_is_worth():
    """Passages differ, and settings go together; what they are worth is found all the same."""
    rng, edits = np.random.default_rng(0), []
    for p in range(12):
        for _ in range(20):
            fast = rng.random() < 0.5
            data = ["questions"] * (rng.random() < (0.8 if fast else 0.3)) + ["passage"]
            rate, epochs = (0.01 if fast else 0.001), int(rng.choice([1, 5]))
            earned = p / 20 + 0.3 * fast - 0.1 * ("questions" in data) + 0.2 * (epochs > 1)
            e = edit(f"p{p}", earned + rng.normal(0, 0.05), data, "all", rate, epochs)
            edits.append(SelfEdit.from_record(e))
    edits.append(SelfEdit.from_record(edit("p0", 0.0)))  # without settings, and
    edits.append(SelfEdit.from_record(edit("p0", 9.0, ["facts"], "answers", 0.02, 50)))
    edits[-1].flaw = "diverged"
    found = chosen.worth(edits, 0)
    true = {"questions": -0.1, "learning_rate from 0.009": 0.3, "epochs from 4": 0.2}
    for name, own in found.items():
        low, high = own["ci95"]
        assert own["value"] == pytest.approx(true.get(name, 0.0), abs=0.02)
        assert name not in true or low < own["value"] < high < low + 0.08
    assert found["questions"]["n"] == sum("questions" in e.settings.get("data", "") for e in edits)
    assert found["passage"] == {"n": 240, "value": 0.0, "ci95": [0.0, 0.0]}  # all have it
    assert found["answers only"]["n"] == 0 and chosen.worth(edits[-1:], 0) == {}


def test_features_of_settings():
    found = chosen.features(settings_of(["facts"], 0, 2, 0, "answers", 0.006, 3))
    names = ["facts", "masked", "answers only", "learning_rate from 0.006", "epochs from 2"]
    assert [name for name, so in found.items() if so] == names
    assert not any(chosen.features(settings_of([], 0, 0, 0, "all", 0.001, 1)).values())


def test_a_run_that_does_not_say_how(a_run, tmp_path, monkeypatch):
    settings = json.loads((a_run / "settings.json").read_text())
    (a_run / "settings.json").write_text(json.dumps(settings | {"settings": False}))
    with pytest.raises(SystemExit, match="do not say how they are studied"):
        run(monkeypatch, a_run, tmp_path / "out.json")
    with pytest.raises(SystemExit, match="cannot write README.md/x"):
        run(monkeypatch, a_run, "README.md/x.json")
