"""experiments/choice.py: choosing among self-edits by two quizzes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import dies_at, run_script

from experiments import choice
from selfedit import Part, SelfEdit, parse


def test_who_is_chosen():
    judged = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    best, tie = np.array([[1.0], [0.0], [0.0]]), np.array([[1.0], [0.0], [1.0]])
    assert choice.chosen(best, judged) == 0.5
    assert choice.chosen(tie, judged) == 0.75
    assert choice.chosen(np.zeros((3, 0)), judged) == choice.chosen(0 * best, judged) == 0.5


def test_of_a_passage():
    """Two self-edits: the first knows all four answers of the quiz, the other none; the model's own
    question picks the other. Together they know half."""
    answers = [[1, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 0, 0, 1]]
    found = choice.of_passage(answers, 4, 0)
    assert found == {"mean": 0.5, "own": 0.0, "labelled": 1.0, "pooled": 0.5}
    assert choice.of_passage([row[:4] for row in answers], 4, 0)["own"] == 0.5  # asks nothing


def test_no_half_judges_itself():
    """Each self-edit knows one question of two: chosen by it, it does not know the other."""
    found = choice.of_passage([[1, 0], [0, 1], [0, 0]], 2, 0)
    assert found["labelled"] == 0.0 and found["mean"] == 0.5


def test_summary():
    found = [{"mean": 0.25, "own": 0.5, "labelled": 0.75, "pooled": 0.0}]
    found.append({"mean": 0.25, "own": 0.25, "labelled": 0.75, "pooled": 1.0})
    result = choice.summarize(found, 0)
    gains = {row["method"]: row["gain"] for row in result["rows"]}
    assert gains == {"mean": 0.0, "own": 0.125, "labelled": 0.5, "pooled": 0.25}
    assert result["kept"]["share"] == 0.25
    none = [own | {"labelled": 0.25} for own in found]
    assert choice.summarize(none, 0)["kept"]["share"] is None


def write(model, tok, passages, copies, args, seed, log=None, label=""):
    """In place of write_self_edits(): a random model writes none."""
    edits = []
    for p in passages:
        for n in range(copies):
            if args.style == "self-qa":
                notes = [f"Question: Who built {p.title}?\nAnswer: {p.title}"]
            else:
                sentence = p.text.split(". ")[0] + "."
                notes, _ = parse(f"Who founded it in {n}?", "questions", True, sentence)
            edits.append(SelfEdit(p.id, [Part("", notes)]))
    return edits


def test_a_whole_run(tiny_folder, passages_file, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "write_self_edits", write)
    sifted = []

    def self_quiz(model, tok, passages, edits, notes):
        sifted.append(notes)
        return [SimpleNamespace(id=p.id, questions=p.questions[:1]) for p in passages]

    monkeypatch.setattr(choice, "self_quiz", self_quiz)
    args = ["--data", passages_file, "--limit", 2, "--samples", 2, "--steps", 2]
    args += ["--top-layers", 2, "--rank", 2, "--population", 2, "--work", tmp_path / "work"]
    args += ["--out", tmp_path / "out.json"]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        dies_at(patch, "reward.inner_update", 2)
        run_script(patch, choice, tiny_folder, *args)
    kept = (tmp_path / "work/scored.jsonl").read_text()
    studied = dies_at(monkeypatch, "reward.inner_update", 0)
    run_script(monkeypatch, choice, tiny_folder, *args)
    assert len(studied) == 2 and kept in (tmp_path / "work/scored.jsonl").read_text()
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["method"] for row in result["rows"]] == list(choice.METHODS)
    assert result["asked"] == 1 and result["n_passages"] == 2 and len(sifted) == 1
    lines = (tmp_path / "work/scored.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answers"] for line in lines]
    assert len(answers) == 2 * 3 and {len(own) for own in answers} == {3}  # two and its own one
    [notes] = sifted  # of both self-edits on each of the two passages: none asks what they ask
    assert [len(own) for own in notes] == [2, 2]
