"""experiments/exercises.py on a tiny model; docs/EXERCISES.md has its figures, and its solutions
are as short as it says."""

import ast
import json
import math
import re
from functools import partial

import pytest
from conftest import ROOT, run_script

from data.text import sentences
from experiments import exercises
from experiments.exercises import EXERCISES, figure_lines, measured
from lm.files import read_json
from quiz import ask
from selfedit import STYLES, Part, SelfEdit

DOCUMENT = (ROOT / "docs" / "EXERCISES.md").read_text()
RESULT = ROOT / "results" / "exercises.json"
SMALL = "--limit 2 --steps 2 --max-new 2 --top-layers 2 --rank 2".split()


# -----------------------------------------------------------------------------
# the document


def test_the_document_has_the_figures():
    """Of each exercise in the result file; of the others, how to get them."""
    shown = re.findall(r"^(?:figure: |change: |Not measured yet: ).*$", DOCUMENT, re.MULTILINE)
    entries = read_json(RESULT)["exercises"] if RESULT.is_file() else {}
    lines = []
    for name in EXERCISES:
        command = f"Not measured yet: `python experiments/exercises.py --only {name}`."
        lines += figure_lines(entries[name]["measures"]) if name in entries else [command]
    assert shown == lines and set(entries) <= set(EXERCISES)
    assert max(map(len, lines)) <= 100


def test_the_document_has_every_exercise():
    numbered = re.findall(r"^## (\d)\. ", DOCUMENT, re.MULTILINE)
    assert numbered == [str(n) for n in range(1, len(EXERCISES) + 1)]
    solutions = re.findall(r"\[`(\w+)\(\)`\]\(\.\./experiments/exercises\.py\)", DOCUMENT)
    assert solutions == list(EXERCISES)
    for n, function in enumerate(EXERCISES.values(), 1):
        assert function.__doc__.startswith(f"{n}. ")


def test_the_document_names_what_there_is():
    """After "Where": `name` in `file.py`."""
    for where in re.findall(r"\*\*Where\.\*\* (.*?)\n\n", DOCUMENT, re.DOTALL):
        for name, path in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", " ".join(where.split())):
            source = (ROOT / path).read_text()
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), (name, path)
        assert re.search(r"`[\w.]+` in `", " ".join(where.split())), where


def test_solutions_are_short():
    tree = ast.parse((ROOT / "experiments" / "exercises.py").read_text())
    lengths = {}
    for f in tree.body:
        if isinstance(f, ast.FunctionDef) and f.name in EXERCISES:
            lengths[f.name] = f.end_lineno - f.lineno + 1
    assert lengths.keys() == EXERCISES.keys() and max(lengths.values()) <= 30


def test_lines():
    values = {"default": [0.5, 0.5], "other": [0.25, 0.25]}
    assert figure_lines([measured("accuracy", values, 0)]) == [
        "figure: accuracy default 50.0 % [50.0, 50.0], other 25.0 % [25.0, 25.0], n = 2",
        "change: accuracy other against default -25.0 points [-25.0, -25.0], n = 2",
    ]
    values |= {"third": [-0.001, -0.001]}
    assert figure_lines([measured("gain", values, 0, "")]) == [
        "figure: gain default 0.50 [0.50, 0.50], other 0.25 [0.25, 0.25], n = 2",
        "figure: gain third 0.00 [0.00, 0.00], n = 2",
        "change: gain other against default -0.25 [-0.25, -0.25], n = 2",
        "change: gain third against default -0.50 [-0.50, -0.50], n = 2",
    ]


# -----------------------------------------------------------------------------
# the script


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Short answers, and self-edits with something in them where several are compared: the tiny
    model writes no questions."""
    monkeypatch.setattr("reward.ask", partial(ask, max_new=4))
    monkeypatch.setattr("experiments.exercises.ask", partial(ask, max_new=4))
    monkeypatch.setattr("experiments.exercises.ANSWER_LEN", 4)
    real = exercises.write_self_edits

    def write(model, tok, passages, copies, *more, **options):
        if copies == 1:
            return real(model, tok, passages, copies, *more, **options)
        edits = []
        for p in passages:
            for n in range(copies):
                asked = p.questions[0].question if n == 1 else f"Is it {n}?"
                parts = []
                for s in sentences(p.text):
                    parts.append(Part(asked, [f"Question: {asked}\nAnswer: {s}"], asked))
                edits.append(SelfEdit(p.id, parts))
        return edits

    monkeypatch.setattr(exercises, "write_self_edits", write)


def test_exercises(tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    out, styles = tmp_path / "out.json", list(STYLES)
    how = (exercises, tiny_folder, "--data", passages_file, "--out", out, *SMALL)
    run_script(monkeypatch, *how)
    result = json.loads(out.read_text())
    assert result["command"].startswith("python experiments/exercises.py")
    assert list(result["exercises"]) == list(EXERCISES) and result["n_passages"] == 2
    assert list(STYLES) == styles
    rows, printed = {}, capsys.readouterr().out.splitlines()
    for name, entry in result["exercises"].items():
        for m in entry["measures"]:
            assert m["n"] == (1 if name == "stream" else 2)
            for row in (*m["rows"], *m["changes"]):
                mean = row.get("mean", row.get("delta"))
                low, high = row["ci95"]
                assert all(map(math.isfinite, (mean, low, high))) and low <= high
            rows[name, m["measure"]] = {r["name"]: r["mean"] for r in m["rows"]}
        assert set(figure_lines(entry["measures"])) <= set(printed)
    kept, dropped = rows["advantage", "gain of kept"], rows["advantage", "gain of dropped"]
    assert kept["ReST-EM"] > 0 and kept["advantage"] > dropped["advantage"]

    # One of them anew, the others as they are; other settings are refused.
    result["exercises"]["targets"]["seconds"] = -1
    result["exercises"]["noise"] = {"measures": []}
    out.write_text(json.dumps(result))
    run_script(monkeypatch, *how, "--only", "targets")
    again = json.loads(out.read_text())["exercises"]
    assert again["targets"]["measures"] == result["exercises"]["targets"]["measures"]
    assert again["targets"]["seconds"] > 0 and again["noise"] == {"measures": []}
    assert list(again) == list(EXERCISES)
    with pytest.raises(SystemExit, match="other settings"):
        run_script(monkeypatch, *how, "--only", "targets", "--steps", 3)
    run_script(monkeypatch, *how, "--only", "stream")
    capsys.readouterr()
    run_script(monkeypatch, *how, "--lines")
    shown = capsys.readouterr().out.splitlines()
    assert [line[:-1] for line in shown if line.endswith(":")] == list(EXERCISES)
    assert set(figure_lines(again["choices"]["measures"])) < set(shown)
