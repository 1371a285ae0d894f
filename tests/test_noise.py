"""experiments/noise.py: components and correlations with known answers, and a whole run."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import run_script

from data.qa import Passage, Question, load_passages
from experiments import noise
from experiments.noise import PARTS, components, judge
from lm.files import read_json, read_jsonl
from selfedit import settings_of

pytestmark = pytest.mark.usefixtures("brief_answers")

SPREAD = {"question": 2.0, "candidate": 1.0, "its questions": 0.7, "study": 0.5, "rest": 0.3}


def simulated(spread: dict, passages: int = 3000, c: int = 4, s: int = 3, q: int = 6) -> np.ndarray:
    """(passages, c, s, q) scores with these standard deviations."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1, q), (c, 1, 1), (c, 1, q), (c, s, 1), (c, s, q)]
    return sum(
        rng.normal(0, spread[name], (passages, *shape)) for name, shape in zip(PARTS, shapes)
    )


@pytest.mark.parametrize("changed", [{}, {"rest": 2.0}, *({name: 0.0} for name in PARTS)])
def test_components_are_what_was_put_in(changed):
    spread = SPREAD | changed
    found = np.mean([components(y) for y in simulated(spread)], axis=0)
    assert found == pytest.approx([spread[name] ** 2 for name in PARTS], rel=0.1, abs=0.05)


def test_a_score_predicts_other_wordings_under_another_seed():
    """`sentence` is what accuracy will be under the last seed on other wordings, `answer` noise;
    two seeds of noise see the worth of a part better than one."""
    text = "Ada cast it. Bo rang it."
    quiz = tuple(
        Question(f"Who {did} it?", (who,)) for did, who in (("cast", "Ada"), ("rang", "Bo"))
    )
    passage, rng = Passage("p", "", text, quiz * 3), np.random.default_rng(1)
    worth = rng.normal(0, 1, (300, 4, 1, 2))
    noisy = worth + rng.normal(0, 1, (300, 4, 3, 2))
    table = []
    for w, n in zip(worth, noisy):
        scores = np.empty((4, 3, 6), dtype=object)
        for at, _ in np.ndenumerate(scores):
            k = at[2] % 2
            later = at[1] == 2 and at[2] >= 2
            right = w[at[0], 0, k] if later else 0.0
            scores[at] = {"accuracy": right, "sentence": w[at[0], 0, k]}
            scores[at]["answer"] = n[at[0], at[1], k] if at[2] < 2 else 0.0
        table.append(scores)
    perfect = judge(table, [passage] * 300, "sentence", 0)["predicts"]
    # A question about no sentence is no part: with that one alone there is nothing to compare.
    none = replace(passage, questions=tuple(replace(q, answers=("Cy",)) for q in quiz) * 3)
    blind = judge(table, [none] * 300, "sentence", 0)["predicts"]["1"]
    assert blind["whole"]["value"] == pytest.approx(1) and blind["part"]["value"] == 0
    for kind in ("whole", "part"):
        assert perfect["1"][kind]["value"] == pytest.approx(1)
        blind = judge(table, [passage] * 300, "accuracy", 0)["predicts"]["1"][kind]
        assert blind == {"value": 0.0, "ci95": [0.0, 0.0]}
    seen = judge(table, [passage] * 300, "answer", 0)["predicts"]
    # One seed has as much noise as worth, two have half.
    assert seen["1"]["part"]["value"] == pytest.approx(0.5**0.5, abs=0.05)
    assert seen["2"]["part"]["value"] == pytest.approx((1 / 1.5) ** 0.5, abs=0.05)
    low, high = seen["1"]["part"]["ci95"]
    assert low < seen["1"]["part"]["value"] < high < low + 0.15


def wordings_of(passages_file, tmp_path, **changed):
    wordings = {}
    for p in load_passages(passages_file):
        wordings[p.id] = [[f"Now, {q.question}", f"So, {q.question}"] for q in p.questions]
    path = tmp_path / "wordings.json"
    path.write_text(json.dumps({"wordings": wordings | changed}))
    return path


def run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags):
    small = ["--max-new", 12, "--top-layers", 2, "--split", "", "--samples", 2, "--seeds", 2]
    out = ["--work", tmp_path / "work", "--out", tmp_path / "noise.json"]
    small += ["--data", passages_file, *out, *flags]
    run_script(monkeypatch, noise, tiny_folder, *small)
    return read_json(tmp_path / "noise.json")


def test_a_run(tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    flags = ["--wordings", wordings_of(passages_file, tmp_path), "--recipe", "default", "epochs"]
    monkeypatch.setitem(noise.RECIPES, "default", {"steps": 2})
    monkeypatch.setitem(noise.RECIPES, "epochs", {"steps": 0, "epochs": 1})
    result = run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags)
    assert [row["recipe"] for row in result["rows"]] == ["default", "epochs"]
    assert [row["steps"] for row in result["rows"]] == [2, 0]
    for row in result["rows"]:
        assert list(row["scores"]) == ["accuracy", "answer", "sentence"]
        for score in row["scores"].values():
            assert list(score["variance"]) == list(PARTS) and list(score["predicts"]) == ["1"]
    assert result["rows"][0]["scores"]["sentence"]["variance"]["question"] > 0
    assert "default: accuracy" in capsys.readouterr().out
    for name in ("reward.inner_update", "reward.ask", "selfedit.generate"):
        monkeypatch.setattr(name, None)  # everything is found in the work folder
    assert run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags)["rows"] == result["rows"]


def test_those_that_say_how_are_studied_as_they_say(
    tiny_folder, passages_file, tmp_path, monkeypatch
):
    """One of three is flawed, and left out; of one passage all are."""
    flags, calls = ["--wordings", wordings_of(passages_file, tmp_path), "--settings"], []

    def said(text, ended):
        calls.append(text)
        n = len(calls)
        settings = settings_of(["passage"], 0, 0, 0, "all", 0.001 * n, n)
        return ({}, "malformed") if n % 3 == 0 or n <= 3 else (settings, "")

    monkeypatch.setattr("selfedit.parse_settings", said)
    flags += ["--samples", 3]
    [row] = run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags)["rows"]
    passages = len(load_passages(passages_file))
    assert row["recipe"] == "said" and row["n"] == 2 * (passages - 1) and "lr" not in row
    assert row["scores"]["sentence"]["variance"]["candidate"] != 0
    logs = read_jsonl(tmp_path / "work" / "said-0.jsonl")
    assert sorted(r["steps"] for r in logs) == [n for n in range(4, 3 * passages) if n % 3]
    monkeypatch.setattr("selfedit.parse_settings", lambda *_: ({}, "malformed"))
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(SystemExit, match="no self-edit is sound"):
        run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags)
    for more in (["--steps", 3], ["--recipe", "dose"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags, *more)
    with pytest.raises(SystemExit):
        run(monkeypatch, tiny_folder, passages_file, tmp_path, *flags[:2], "--budget", 9)


@pytest.mark.parametrize(
    "own", [[], [["Who?", "Whom?"]], [["Who?"]] * 9, "Who?", [[1, "Who?"]] * 9]
)
def test_wordings_that_do_not_fit_are_refused(
    own, tiny_folder, passages_file, tmp_path, monkeypatch
):
    first = load_passages(passages_file)[0]
    path = wordings_of(passages_file, tmp_path, **{first.id: own})
    monkeypatch.setattr("selfedit.generate", None)  # before the work
    with pytest.raises(SystemExit, match=f"no two wordings of each question of {first.id}"):
        run(monkeypatch, tiny_folder, passages_file, tmp_path, "--wordings", path)
