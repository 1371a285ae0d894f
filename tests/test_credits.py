"""experiments/credits.py: agreements with known answers, gradients, and a whole run."""

import numpy as np
import pytest
import torch
from conftest import run_script
from test_noise import wordings_of

from data.qa import Passage, Question
from experiments import credits
from experiments.credits import (
    Lot,
    Pool,
    agreement,
    credits_of,
    gradients,
    influences,
    note_credits,
    notes_about,
    random_halves,
)
from inner import SFTConfig, inner_update
from lm.files import read_json
from lora import PROJECTIONS, Adapters, LoRAConfig
from reward import passage_examples

pytestmark = pytest.mark.usefixtures("brief_answers")

TEXT = "Ada Quell cast the bell. Bo Larn rang it in Rolm."
QUIZ = (Question("Who cast it?", ("Ada Quell",)), Question("Who rang it?", ("Bo Larn",)))
PASSAGE = Passage("p", "Rolm", TEXT, QUIZ)
LORA = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4)


def note(question: str, k: int) -> str:
    return f"Question: {question}\nAnswer: {TEXT.split('. ')[k].rstrip('.')}."


NOTES = (note("Who cast it?", 0), note("What is it?", 0), note("Who rang it?", 1), "A fact.")


def test_agreement_is_the_correlation_within_sentences():
    """Of sentences with other means, and notes that only one side knows."""
    rng = np.random.default_rng(0)
    found, truth = [], []
    for _ in range(300):
        own, true = [], []
        for shift in (0.0, 50.0):
            worth, error = rng.normal(0, 1, 5), rng.normal(0, 1, 5)
            true.append(dict(zip("abcde", worth)))
            own.append(dict(zip("abcdx", worth + error + shift)))
        found.append(own)
        truth.append(true)
    r = agreement(found, truth, 0)
    assert r["value"] == pytest.approx(0.5**0.5, abs=0.04)
    assert r["ci95"][0] < r["value"] < r["ci95"][1] < r["ci95"][0] + 0.15
    assert agreement(truth, truth, 0)["value"] == pytest.approx(1)
    assert agreement([[{"a": 1.0}]], [[{"a": 1.0}]], 0)["value"] == 0  # nothing to compare


@pytest.mark.parametrize("n", [2, 7, 8])
def test_halves_come_in_complementary_pairs(n):
    notes = tuple("abcdefgh"[:n])
    halves = random_halves(notes, 40, 0)
    assert len(halves) == 40 and halves == random_halves(notes, 40, 0)
    assert halves != random_halves(notes, 40, 1)
    for half, rest in zip(halves[0::2], halves[1::2]):
        assert sorted([*half, *rest]) == list(notes) and abs(len(half) - len(rest)) <= n % 2
        assert list(half) == sorted(half) and list(rest) == sorted(rest)
    assert {len(half) for half in halves} == {n // 2, n - n // 2}
    assert set().union(*halves[0::2]) == set(notes)  # each note is drawn


def test_a_notes_credit_is_the_score_with_it_minus_without():
    """Scores that are sums of the notes' worth give it back."""
    worth = {"a": 0.4, "b": -0.2, "c": 0.0, "d": 0.1, "e": 0.3}
    halves = random_halves(tuple(worth), 4000, 0)
    scores = np.array([sum(map(worth.get, half)) for half in halves])
    exact = note_credits(halves, scores, worth)
    for note, own in worth.items():
        # Beside it are 1.6 of the other four on average (it is oftener in the half of three), and
        # 2.4 in the half without it.
        others = (sum(worth.values()) - own) / 4
        assert exact[note] == pytest.approx(own + (1.6 - 2.4) * others, abs=0.02)


def test_a_pair_with_a_diverged_study_says_nothing():
    halves = random_halves(tuple("abcd"), 8, 0)
    scores = np.arange(8.0) ** 2
    without = note_credits(halves[2:], scores[2:], "abcd")
    scores[1] = np.nan
    assert note_credits(halves, scores, "abcd") == without
    scores[3:] = np.nan
    assert note_credits(halves, scores, "abcd") == dict.fromkeys("abcd", 0.0)


def test_credit_is_by_the_own_wording_or_by_the_others():
    """Question 1 is answered with the first note, its other wordings with the second; nothing is
    said where a study diverged."""
    pool = Pool(PASSAGE, NOTES, random_halves(NOTES, 40, 0))
    assert notes_about(pool) == [[NOTES[0], NOTES[1]], [NOTES[2]]]
    answers = []
    for half in pool.halves:
        right = [NOTES[0] in half, 0, NOTES[1] in half, 0, NOTES[1] in half, 0]
        answers.append([{"accuracy": float(value)} for value in right])
    answers[0] = None
    lot = Lot([pool], [answers])
    own, others = (credits_of(lot, 0, "accuracy", which) for which in (False, True))
    assert own[0][NOTES[0]] == others[0][NOTES[1]] == 1
    assert abs(own[0][NOTES[1]]) < 1 and own[1] == {NOTES[2]: 0.0}


def test_a_gradient_is_that_of_the_first_step(tiny, tok):
    """A step of plain descent along it is what lowers the note's own loss."""
    grads = gradients(tiny, tok, "Rolm", list(NOTES[:3]), LORA, 0)
    alone = gradients(tiny, tok, "Rolm", [NOTES[2]], LORA, 0)
    torch.testing.assert_close(grads[2], alone[0], atol=1e-6, rtol=1e-3)
    adapters = Adapters.init(tiny, LORA, 1, 0)
    losses = []
    for _ in range(2):
        [example] = passage_examples(tok, "Rolm", [NOTES[0]])
        copy = adapters.pick([0])
        [outcome] = inner_update(tiny, copy, [[example]], [SFTConfig(lr=1e-9, steps=1)], 0)
        losses.append(outcome.loss)
        adapters.flat -= 1e-3 * grads[0] / grads[0].norm()
    expected = -1e-3 * float(grads[0].norm())
    assert losses[1] - losses[0] == pytest.approx(expected, rel=0.05)


def test_influence_knows_the_quizs_own_question(tiny, tok):
    pool = Pool(PASSAGE, NOTES, [])
    found = influences(tiny, tok, pool, LORA, 0)
    assert [list(own) for own in found["influence"]] == [list(NOTES[:2]), [NOTES[2]]]
    same, other = (found["alignment"][0][n] for n in NOTES[:2])
    assert same == pytest.approx(1, abs=1e-4) and -1 <= other < 0.999
    norms = gradients(tiny, tok, "Rolm", [NOTES[0]], LORA, 0).norm()
    assert found["influence"][0][NOTES[0]] == pytest.approx(float(norms**2), rel=1e-3)
    assert found["proxy"] == [{NOTES[0]: 1.0, NOTES[1]: 0.0}, {NOTES[2]: 1.0}]
    nobody = Passage("p", "Rolm", TEXT, QUIZ[:1])
    found = influences(tiny, tok, Pool(nobody, NOTES, []), LORA, 0)
    assert [len(own) for own in found["proxy"]] == [2, 0]  # nothing is asked about the second


def test_a_run(tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    def asks(text, style, ended, sentence):
        return [f"Question: {text[n : n + 9] or n} who?\nAnswer: {sentence}" for n in range(2)], ""

    monkeypatch.setattr("selfedit.parse", asks)
    flags = ["--wordings", wordings_of(passages_file, tmp_path), "--data", passages_file]
    flags += ["--max-new", 12, "--top-layers", 2, "--samples", 2, "--halves", 4, "--limit", 2]
    flags += ["--split", "", "--steps", 2]
    flags += ["--work", tmp_path / "work", "--out", tmp_path / "c.json"]
    run_script(monkeypatch, credits, tiny_folder, *flags)
    result = read_json(tmp_path / "c.json")
    names = ["accuracy", "answer", "sentence", "influence", "alignment", "proxy"]
    assert list(result["agree"]) == names and result["n_notes"] > 3
    assert "influence 2/2" in capsys.readouterr().out
    for name in ("reward.inner_update", "reward.ask", "selfedit.generate"):
        monkeypatch.setattr(name, None)  # everything is found in the work folder
    run_script(monkeypatch, credits, tiny_folder, *flags)
    assert read_json(tmp_path / "c.json")["agree"] == result["agree"]
    for more in (["--halves", 5], ["--style", "rewrite"]):
        with pytest.raises(SystemExit):
            run_script(monkeypatch, credits, tiny_folder, *flags, *more)
