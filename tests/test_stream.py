"""experiments/stream.py: passages one after another."""

import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dies_at, run_script

from experiments import stream
from selfedit import parse


def notes_on(model, tok, passages, copies, args, seed, log):
    """In place of write_self_edits(): a random model writes none."""
    edits = []
    for p in passages:
        sentence = p.text.split(". ")[0] + "."
        notes, _ = parse(f"Who founded {p.title}?", "questions", True, sentence)
        edits.append(SimpleNamespace(notes=notes))
    return edits


@pytest.fixture
def small(tiny_folder, passages_file, brief_general, tmp_path, monkeypatch):
    """Runs it on three passages, and returns the result file."""
    monkeypatch.setattr(stream, "write_self_edits", notes_on)

    def run(*extra, out="out.json"):
        args = ["--count", 3, "--seeds", 1, "--steps", 2, "--top-layers", 2, "--rank", 2]
        args += ["--split", "", "--data", passages_file, "--population", 2]
        args += ["--work", tmp_path / "work", "--out", tmp_path / out, *extra]
        run_script(monkeypatch, stream, tiny_folder, *args)
        return tmp_path / out

    return run


def test_every_row_and_killed_on_the_way(small, tmp_path, monkeypatch):
    """What a killed run had finished is not made again, and nothing else is left behind: the next
    row begins with the base model's weights."""
    whole = json.loads(small("--work", tmp_path / "whole").read_text())["rows"]
    calls, update = [], stream.update_one
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        dies_at(patch, "experiments.stream.update_one", 5)
        small()
    monkeypatch.setattr(stream, "update_one", lambda *a: calls.append(a[-1]) or update(*a))
    path = small()
    assert calls.count("seal 1") == 0 and calls.count("top-layers 1") == 1
    result = json.loads(path.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == stream.ROWS
    for row, unbroken in zip(result["rows"], whole):
        assert row | {"seconds": 0} == unbroken | {"seconds": 0}
    for row in rows.values():
        assert np.array(row["matrix"]).shape == (3, 3)
        assert 0 <= row["retained"] <= 1 and row["seconds"] >= 0
    perplexities = {name: row["perplexity"] for name, row in rows.items()}
    for name in ("separate", "retrieval"):
        assert perplexities[name] == perplexities["base"]
    for name in (*stream.MERGED, "consolidated"):
        assert perplexities[name] != perplexities["base"]
    assert rows["separate"]["bytes"] == 3 * rows["consolidated"]["bytes"] > 0
    assert rows["seal"]["bytes"] == 2 * rows["top-layers"]["bytes"]  # four layers, not two
    assert rows["retrieval"]["prompt_tokens"] > rows["separate"]["prompt_tokens"]
    assert (result["n_passages"], result["n_distinct"]) == (3, 3)
    work = path.parent / "work"
    before = {p.name: p.read_bytes() for p in work.glob("*.json")}
    small(out="again.json")
    assert {p.name: p.read_bytes() for p in work.glob("*.json")} == before


def test_what_a_router_sees(tok, passages_file):
    """A question on a passage that is known is asked under its title, of its adapter; others under
    none."""
    s = object.__new__(stream.Stream)
    s.tok, s.args = tok, SimpleNamespace(count=5)
    s.passages = stream.load_passages(passages_file)
    s.notes = [[] for _ in s.passages]
    asked = s.routed(s.passages, 2)
    assert [item.owner for item in asked][:4] == [0, 0, 1, 1]
    assert "Topic: Town 1" in tok.decode(list(asked[2].prompt))
    shown = s.routed(s.passages, 5, shown=True)
    assert s.passages[3].text in tok.decode(list(shown[6].prompt))
    assert {item.owner for item in shown} == {5}


def test_what_is_asked_again_is_answered_once(tiny, tok, passages_file, monkeypatch):
    """The matrix is that of asking all questions after each passage."""
    s = object.__new__(stream.Stream)
    s.model, s.tok, s.args = tiny, tok, SimpleNamespace(count=5)
    s.passages = stream.load_passages(passages_file)
    s.notes = [[] for _ in s.passages]
    asked = [s.routed(s.passages, n) for n in (1, 3, 5)]
    truth = {item: float(n % 3 == 0) for n, item in enumerate(dict.fromkeys(chain(*asked)))}
    calls = []

    def answered(model, tok, items, adapters=None):
        calls.append(len(items))
        return [truth[item] for item in items]

    monkeypatch.setattr(stream, "accuracies", answered)
    monkeypatch.setattr("quiz.accuracies", answered)
    matrix = s.after_each(asked)
    assert calls == [len(truth)] and len(truth) < sum(map(len, asked))
    assert matrix == [s.known(items) for items in asked]


def test_perplexity_is_that_of_a_plain_forward_pass(tiny, tok):
    texts, nll = [tok.encode("Rolm fell."), tok.encode("Salt is sold to the coast.")], []
    for ids in texts:
        ids = torch.tensor([ids])
        logits = tiny(ids)[0, :-1]
        nll.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = torch.cat(nll).mean().exp().item()
    assert stream.perplexity(tiny, texts) == pytest.approx(expected, rel=1e-4)


def test_who_is_told_the_title(small, monkeypatch):
    """One set of weights as in the paper; who has a router must find it, consolidated, too."""
    monkeypatch.setattr("lm.memory.Router.best", lambda *_: None)  # finds nothing
    found = json.loads(small().read_text())
    tokens = {row["method"]: row["prompt_tokens"] for row in found["rows"]}
    without = tokens["separate"]
    assert tokens["consolidated"] == tokens["retrieval"] == without < tokens["base"]
    assert {tokens[name] for name in stream.MERGED} == {tokens["base"]}


def test_more_passages_than_there_are(small, monkeypatch):
    monkeypatch.setattr(stream, "load", None)  # before the model is loaded
    with pytest.raises(SystemExit, match="--count 9999: there are "):
        small("--count", 9999)


def test_summary():
    """Two passages: one is learnt and half forgotten, the other falls below where it began."""

    def result(matrix, general):
        about = {"perplexity": 10.0, "prompt_tokens": 30.0, "bytes": 8, "seconds": 1.0}
        about |= {"ids": ["p1", "p2"], "diverged": 0}
        now = [row[n] for n, row in enumerate(matrix)]
        return about | {"matrix": matrix, "immediate": now, "general": general}

    found = {"base": [result([[0.125, 0.25], [0.125, 0.25]], 0.8)]}
    found["seal"] = [result([[1.0, 0.0], [0.5, 0.125]], 0.7)]
    found["separate"] = [result([[1.0, 0.0], [1.0, 0.5]], 0.8)]
    found["replay"] = [result([[1.0, 0.0], [0.5, 0.5]], 0.8)]
    base, seal, separate, replay = stream.summarize(found, 0)
    assert (replay["below_immediate"], replay["below_before"]) == (1, 0)
    assert base["before"] == seal["before"] == 0.1875 and base["general_drop"] == 0
    assert (seal["immediate"], seal["retained"], seal["below_before"]) == (0.5625, 0.3125, 1)
    assert seal["ratio"]["value"] == 5 / 9 and separate["ratio"]["value"] == 1.0
    assert seal["ratio"]["ci95"] == [0.5, 1.0] and "ratio" not in base
    assert (seal["below_immediate"], separate["below_immediate"]) == (1, 0)
    assert seal["by_seed"] == {"immediate": [0.5625], "retained": [0.3125], "general": [0.7]}
    assert seal["general_drop"] == pytest.approx(10)
    assert separate["below_before"] == 0 and separate["against_seal"]["delta"] == 0.4375
    assert separate["against_seal"]["ci95"] == [0.375, 0.5] and "against_seal" not in base
    assert separate["matrix"] == [[1.0, 0.0], [1.0, 0.5]]


def test_a_passage_of_several_seeds_counts_once():
    """Three seeds, of two passages each out of three: as many values as passages."""
    results = []
    for ids, last in ((["a", "b"], [1.0, 0.0]), (["b", "c"], [1.0, 0.5]), (["b", "a"], [0.5, 0.0])):
        results.append({"ids": ids, "matrix": [[0, 0], last], "immediate": [1.0, 1.0]})
    assert stream.by_passage(results, "retained").tolist() == [0.5, 0.5, 0.5]
    assert stream.by_passage(results, "immediate").tolist() == [1.0, 1.0, 1.0]


def test_one_that_diverges_is_not_merged(small):
    rows = json.loads(small("--lr", "1e38", "--rows", "top-layers", "separate").read_text())["rows"]
    base, *others = rows
    for row in others:
        assert row["diverged"] == 3 and row["perplexity"] == base["perplexity"]
