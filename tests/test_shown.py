"""experiments/shown.py: what the policy is shown, and that the ladder takes it for what it is."""

import json

import pytest
import torch
from conftest import run_script

import eval_qa
from data.qa import load_passages
from experiments import shown
from lm.adapters import load_adapter


def test_the_questions_about_a_sentence_are_its_reply(tok, passages_file):
    passage = load_passages(passages_file)[0]
    [(prompt, reply)] = shown.shown(tok, passage)  # nothing is asked about its second sentence
    assert reply == "Who founded Town 0?\nWhat did Person 0 found?"
    told = tok.decode(prompt)
    assert "Sentence: Town 0 was founded by Person 0" in told and "red bricks" not in told


def test_a_policy_that_was_shown_them(tiny_folder, tiny, passages_file, tmp_path, monkeypatch):
    out = tmp_path / "policy"
    args = ["--data", passages_file, "--rank", 2, "--epochs", 3, "--out", out]
    run_script(monkeypatch, shown, tiny_folder, *args)
    about = json.loads((out / "policy.json").read_text())
    assert about["n"] == 3 and about["settings"]["reward"] == "shown"
    policy = load_adapter(tiny, out)
    assert policy.config.rank == 2 and torch.any(policy.flat != 0)
    ladder = ["--data", passages_file, "--policy", out, "--out", tmp_path / "l.json"]
    ladder += ["--work", tmp_path / "work", "--max-new", 4]
    with pytest.raises(SystemExit, match="was trained on 1 of these passages"):
        run_script(monkeypatch, eval_qa, tiny_folder, *ladder, "--split", "", "--skip", 2)
    with pytest.raises(SystemExit, match="was trained without --settings"):
        run_script(monkeypatch, eval_qa, tiny_folder, *ladder, "--settings")


def test_a_quiz_about_nothing(tiny_folder, tmp_path, monkeypatch):
    entry = {"title": "Rolm", "passage": "Rolm fell.", "split": "train"}
    entry |= {"questions": [{"question": "Who?", "answer": "Ada"}]}
    (tmp_path / "p.json").write_text(json.dumps([entry]))
    args = ["--data", tmp_path / "p.json", "--out", tmp_path / "policy"]
    with pytest.raises(SystemExit, match="no question is about a sentence"):
        run_script(monkeypatch, shown, tiny_folder, *args)
    assert not (tmp_path / "policy").exists()
