"""--halves: the credit of single notes by studies of random halves of a passage's pooled notes."""

import numpy as np
import pytest
from conftest import run_script

import train_outer
from data.qa import Passage, Question
from inner import SFTConfig
from lm.files import read_jsonl
from reward import credit_by_halves, note_credits, pools, random_halves, select, to_imitate
from selfedit import Part, SelfEdit

pytestmark = pytest.mark.usefixtures("brief_answers")


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
    """Scores that are sums of the notes' worth give it back, with an interval that holds it."""
    rng, worth = np.random.default_rng(0), {"a": 0.4, "b": -0.2, "c": 0.0, "d": 0.1, "e": 0.3}
    halves = random_halves(tuple(worth), 4000, 0)
    scores = np.array([sum(map(worth.get, half)) for half in halves])
    exact, noise = note_credits(halves, scores, worth), rng.normal(0, 0.5, len(scores))
    noisy = note_credits(halves, scores + noise, worth)
    few = note_credits(halves[:40], (scores + noise)[:40], worth)
    for note, own in worth.items():
        # Beside it are 1.6 of the other four on average (it is oftener in the half of three), and
        # 2.4 in the half without it.
        others = (sum(worth.values()) - own) / 4
        assert exact[note][0] == pytest.approx(own + (1.6 - 2.4) * others, abs=0.02)
        assert abs(noisy[note][0] - exact[note][0]) < 4 * noisy[note][1]
        assert few[note][1] == pytest.approx(10 * noisy[note][1], rel=0.5)  # of 1/100 of the pairs


def test_a_pair_with_a_diverged_study_says_nothing():
    halves = random_halves(tuple("abcd"), 8, 0)
    scores = np.arange(8.0) ** 2
    without = note_credits(halves[2:], scores[2:], "abcd")
    scores[1] = np.nan
    assert note_credits(halves, scores, "abcd") == without
    scores[3:] = np.nan
    assert note_credits(halves, scores, "abcd") == dict.fromkeys("abcd", (0.0, np.inf))


PASSAGE = Passage(
    "p", "Rolm", "Ada cast it. Bo rang it. So it was.",
    (Question("Who cast it?", ("Ada",)), Question("Who rang it?", ("Bo",))),
)  # fmt: skip


def note(question: str, statement: str) -> str:
    return f"Question: {question}\nAnswer: {statement}"


def edits_of(*questions) -> list[SelfEdit]:
    """One self-edit for each of these tuples of questions about the first sentence; all have one
    about the second, and one about the third."""
    edits = []
    for own in questions:
        parts = [Part("x", [note(q, "Ada cast it.") for q in own], "x")]
        parts += [Part("x", [note("Who rang?", "Bo rang it.")], "x")]
        parts += [Part("x", [note("Was it?", "So it was.")], "x")]
        edits.append(SelfEdit("p", parts, "questions"))
    return edits


def results_of(pool, score) -> list[dict]:
    results = []
    for half in pool.halves:
        cast, rang = score(half)
        answers = [{"em": 0.0, "f1": 0.0, "logprob": -1.0} | {"accuracy": x} for x in (cast, rang)]
        results.append({"diverged": False, "answers": answers})
    return results


def test_notes_that_help_are_imitated():
    """Only "Who cast?" teaches who cast it. What no question of the quiz is about has no credit."""
    edits = edits_of(["Who cast?", "Why?"], ["Why?", "Who cast?"], ["Where?"])
    [pool] = pools(edits, {"p": PASSAGE}, 24, 0)
    assert pool.passage is PASSAGE and pool.edits == edits
    assert len(pool.notes) == 5 and len(pool.halves) == 24
    good = note("Who cast?", "Ada cast it.")
    results = results_of(pool, lambda notes: (float(good in notes), 0.5))
    credit_by_halves([pool], results, "accuracy", SFTConfig())
    first, _, third = (e.parts[0].note_credits for e in edits)
    assert first["Who cast?"] == [1.0] and first["Why?"][0] < 0.5 and third["Where?"][0] < 0.5
    assert edits[0].parts[0].credit == pytest.approx((1 + first["Why?"][0]) / 2)
    for e in edits:
        assert e.parts[1].note_credits == {"Who rang?": [0.0]} and e.parts[1].credit == 0.0
        assert e.parts[2].note_credits == {} and e.parts[2].credit is None
        assert e.reward == e.score["accuracy"] == pytest.approx(0.5)
    select(edits, {}, "notes", 6)
    assert [e.kept for e in edits] == [True, True, False]
    prompts = {"p": [[1], [2], [3]]}
    assert to_imitate(prompts, edits, "notes", 6) == [([1], "Who cast?", 1.0)]


def test_noise_is_no_credit():
    """Without a note that helps, hardly any interval is clear of zero, and none if all halves earn
    the same."""
    edits, rng, kept = edits_of(["Who cast?", "Why?"], ["Where?"]), np.random.default_rng(0), 0
    for seed in range(50):
        [pool] = pools(edits, {"p": PASSAGE}, 16, seed)
        results = results_of(pool, lambda _: rng.integers(0, 2, 2).tolist())
        credit_by_halves([pool], results, "accuracy", SFTConfig())
        kept += sum(v != [0.0] for e in edits for v in e.parts[0].note_credits.values())
    assert kept <= 0.15 * 150
    same = results_of(pool, lambda _: (1.0, 1.0))
    credit_by_halves([pool], same, "accuracy", SFTConfig())
    select(edits, {}, "notes", 6)
    assert not any(e.kept for e in edits)


def flags_of(passages_file, tmp_path, *more):
    flags = ["--data", passages_file, "--out", tmp_path / "run", "--rounds", 1, "--samples", 2]
    return [*flags, "--max-new", 12, "--top-layers", 2, "--steps", 2, *more]


def test_a_round(tiny_folder, passages_file, tmp_path, monkeypatch):
    asked = iter(range(10_000))  # a random model asks nothing

    def parse(text, style, ended, sentence):
        return [note(f"What {next(asked)}?", sentence) for _ in range(4)], ""

    monkeypatch.setattr("selfedit.parse", parse)
    flags = flags_of(passages_file, tmp_path, "--halves", 4, "--select", "notes")
    run_script(monkeypatch, train_outer, tiny_folder, "qa", *flags, "--reward", "logprob")
    scored = read_jsonl(tmp_path / "run" / "round-1" / "scored.jsonl")
    records = read_jsonl(tmp_path / "run" / "round-1" / "candidates.jsonl")
    assert len(scored) == 3 * 4 and len(records) == 6  # halves, and self-edits
    for n in range(3):
        means = [np.mean([a["logprob"] for a in r["answers"]]) for r in scored[4 * n : 4 * n + 4]]
        for record in records[2 * n : 2 * n + 2]:
            assert record["reward"] == pytest.approx(np.mean(means))
            assert record["config"]["steps"] == 2
            credited = [len(part["note_credits"]) for part in record["parts"]]
            assert credited == [4, 0]  # the quiz asks about the first sentence only


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--halves", 2, "--select", "notes"], "studies come in pairs, and two at least"),
        (["--halves", 5, "--select", "notes"], "studies come in pairs"),
        (["--halves", 4], "--halves needs --select notes"),
        (["--halves", 4, "--select", "notes", "--reward", "proxy"], "a reward by study"),
        (["--halves", 4, "--select", "notes", "--style", "self-qa"], "--style questions, and"),
        (["--select", "notes"], "--reward proxy or --halves"),
    ],
)
def test_contradictions(flags, message, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        flags = flags_of(passages_file, tmp_path, *flags)
        run_script(monkeypatch, train_outer, tiny_folder, "qa", *flags)
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
