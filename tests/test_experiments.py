"""studies.py: statistics with known answers, and each study on a tiny model."""

import json

import numpy as np
import pytest
from conftest import run_script

import eval_qa
import studies
from common import read_jsonl, write_jsonl
from data.qa import Passage, Question, load_passages
from quiz import closest_question, words
from studies import correlation, judge_reward, measure


def simulated(passages=200, samples=4, questions=6, seeds=3, signal=1.0, noise=1.0):
    """scores[seed][passage][sample][question] whose log-probability is a self-edit's worth plus noise, accuracy its sign."""
    rng = np.random.default_rng(0)
    worth = rng.normal(0, signal, (passages, samples, 1))
    values = worth + rng.normal(0, noise, (seeds, passages, samples, questions))
    return [
        [[[{"accuracy": float(v > 0), "logprob": v} for v in a] for a in p] for p in s] for s in values
    ]  # fmt: skip


def test_correlation_is_within_passages():
    a = np.array([[0.0, 1.0], [10.0, 11.0]])
    assert correlation(a, a) == pytest.approx(1) and correlation(a, -a) == pytest.approx(-1)
    assert correlation(a, np.array([[1.0, 0.0], [11.0, 10.0]])) == pytest.approx(
        -1
    )  # though passages agree
    assert correlation(a, np.ones((2, 2))) == 0


def test_reliability_of_a_simulated_reward():
    """Six questions of noise as large as the signal: reliability 1 / (1 + 1/6), and 1 / (1 + 1/3) for a half."""
    row = judge_reward(simulated(), "logprob", averaged=1, seed=0, splits=20)
    assert row["reliability"]["questions"] == pytest.approx(6 / 7, abs=0.03)
    assert row["reliability"]["seeds"] == pytest.approx(6 / 7, abs=0.03)
    assert row["reliability"]["both"] == pytest.approx(3 / 4, abs=0.04)
    two = judge_reward(simulated(), "logprob", averaged=2, seed=0, splits=20)
    assert (
        two["reliability"]["seeds"] == pytest.approx((12 * 6 / 13 / 7) ** 0.5, abs=0.03)
        and two["gain"] > row["gain"] > 0.1
    )
    assert row["ci95"][0] < row["gain"] < row["ci95"][1] and row["picks_best"] > row["chance"] + 0.1


def test_a_reward_of_noise_gains_nothing():
    row = judge_reward(simulated(signal=0.0), "logprob", averaged=1, seed=0, splits=20)
    assert (
        abs(row["reliability"]["both"]) < 0.1 and row["ci95"][0] < 0.01 and abs(row["gain"]) < 0.02
    )
    assert row["picks_best"] == pytest.approx(row["chance"], abs=0.03)


def test_measures(tok):
    assert words("In 1742 she cast the bell.") == {"1742", "cast", "bell"}
    passage = "Hessa cast the bell in 1742. It weighs 900 kilograms."  # hessa, cast, bell, 1742, weighs, 900, kilograms
    notes = [
        "Hessa cast the bell in 1742.",
        "The bell was cast in 1742.",
        "Nobody ever bought seventeen copper kettles.",
    ]
    asked = (Question("When?", ("1742",)), Question("How heavy?", ("900 kilograms",)))
    passage = Passage("p", "Vantor", passage, asked)
    m = measure(tok, passage, "\n".join(notes), notes)
    assert m["told"] == 0.5 and m["copied"] == 0
    assert m["covered"] == pytest.approx(4 / 7) and m["repeats"] == m[
        "unsupported"
    ] == pytest.approx(1 / 3)
    assert m["notes"] == 3 and m["tokens"] == len(tok.encode("\n".join(notes)))
    half = [
        "Hessa cast kilograms in 1742.",
        "Hessa cast nobody seventeen kettles copper.",
    ]  # 2 of 6 words again: no repeat
    m = measure(tok, passage, "", half)
    assert m["repeats"] == 0 and m["unsupported"] == 0.5
    assert measure(tok, passage, "", [])["covered"] == measure(tok, passage, "", [])["told"] == 0
    assert measure(tok, passage, "", ["The Vantor Bell rang.", "Hessa Lorn", "A bell."])[
        "copied"
    ] == pytest.approx(2 / 3)


def test_what_the_questions_of_the_notes_ask(tok):
    """A note that quotes a sentence is judged by its question."""
    cast = Question("Who cast the bell?", ("Hessa Lorn",))
    near, far = ("Who cast it?", "Hessa Lorn did."), ("Whose?", "Hessa Lorn's.")
    told, wrong = (
        ("Which bell did Hessa Lorn cast?", "Hessa Lorn cast it."),
        ("Who cast the bell?", "A potter did."),
    )
    assert closest_question(cast, [far, near, told, wrong]) == pytest.approx(2 / 3)
    assert closest_question(cast, [told, wrong]) == closest_question(cast, []) == 0
    assert (
        closest_question(cast, [near], "The Vantor Bell") == 1
    )  # what the title says, any question may
    assert closest_question(cast, [("Who is the bell of?", "Hessa Lorn.")], "The Vantor Bell") == 0
    assert closest_question(cast, [near], "Cast Bell") == 0  # neither has other words
    passage = Passage(
        "p", "Rolm", "Rolm sells bricks to Varbon. Hessa Lorn cast the bell.", (cast,)
    )
    sells, cast = (
        "Answer: Rolm sells bricks to Varbon.",
        "Question: Who cast it?\nAnswer: Hessa Lorn cast the bell.",
    )
    quotes = [
        f"Question: Which emperor ate cake?\n{sells}",
        f"Question: Who sells bricks there?\n{sells}",
        cast,
    ]
    m = measure(tok, passage, "", quotes)
    assert (m["unsupported"], m["repeats"], m["told"], m["covered"]) == (
        pytest.approx(1 / 3),
        0,
        1,
        1,
    )
    assert m["asked"] == pytest.approx(2 / 3)


def run(monkeypatch, folder, data, tmp_path, *extra):
    args = [
        "--data",
        data,
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "out.json",
        "--max-new",
        8,
        "--epochs",
        2,
        "--steps",
        2,
    ]
    run_script(monkeypatch, studies, folder, *args, "--top-layers", 2, "--rank", 2, *extra)
    return json.loads((tmp_path / "out.json").read_text())


def test_the_reward_study(tiny_folder, passages_file, tmp_path, monkeypatch):
    result = run(monkeypatch, tiny_folder, passages_file, tmp_path, "reward", "--samples", 2)
    assert [(r["reward"], r["seeds"]) for r in result["rows"]] == [
        (n, s) for s in (1, 2) for n in studies.REWARDS
    ]
    assert result["n_passages"] == 3 and result["command"].startswith("python studies.py")
    monkeypatch.setattr("quiz.study_and_quiz", None)  # everything is found in the work folder
    assert (
        run(monkeypatch, tiny_folder, passages_file, tmp_path, "reward", "--samples", 2)["rows"]
        == result["rows"]
    )


def test_what_the_proxy_is_worth(tiny_folder, tmp_path, monkeypatch):
    """Two self-edits of each passage: one asks for the founder, one for nothing; their credits go with it or against."""
    who, sells = (
        {"question": "Who founded Rolm?", "answer": "Ada"},
        {"question": "What sells there?", "answer": "bricks"},
    )
    entry = {
        "title": "Rolm",
        "passage": "Ada Quell founded Rolm. It sells bricks.",
        "questions": [who, sells],
    }
    data, round_1 = tmp_path / "passages.json", tmp_path / "work"
    data.write_text(json.dumps([{**entry, "title": f"Rolm {n}"} for n in range(3)]))
    ids = [p.id for p in load_passages(data)]
    notes = [
        f"Question: {q}\nAnswer: Ada Quell founded Rolm." for q in ("Who founded Rolm?", "Why?")
    ]
    for sign in (1, -1):
        rows = [
            (i, note, credit)
            for i in ids
            for note, credit in zip(notes, (0.5 + sign / 4, 0.5 - sign / 4))
        ]
        write_jsonl(
            round_1 / "candidates.jsonl",
            [{"passage": i, "notes": [n], "credits": [c, 0.0]} for i, n, c in rows],
        )
        result = run(monkeypatch, tiny_folder, data, tmp_path, "proxy")
        assert result["n_parts"] == 12
        assert result["slope"] == {"value": sign * 0.5, "ci95": [sign * 0.5] * 2}
        assert result["correlation"]["value"] == pytest.approx(sign)
    (round_1 / "candidates.jsonl").unlink()
    with pytest.raises(SystemExit, match="no candidates.jsonl there"):
        run(monkeypatch, tiny_folder, data, tmp_path, "proxy")


def test_the_recipe_study_feeds_the_ladder(tiny_folder, passages_file, tmp_path, monkeypatch):
    extra = [
        "recipes",
        "--limit",
        2,
        "--step-counts",
        2,
        3,
        "--lrs",
        1e-3,
        2e-3,
        "--layers",
        1,
        "--temperatures",
        0.5,
    ]
    real, rooms = studies.write_self_edits, {}
    monkeypatch.setattr(
        studies, "write_self_edits", lambda *a: rooms.update({a[4].style: a[4].max_new}) or real(*a)
    )
    result = run(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    assert set(result["best"]) == {"passage", "passage+unrelated", "passage+self-edit"}
    for r in result["rows"]:
        assert 0 <= r["accuracy"] <= 1 and r["seconds_per_candidate"] > 0
    assert {r["top_layers"] for r in result["rows"]} == {1, 2} and {
        r["style"] for r in result["rows"]
    } == set(studies.STYLES)
    assert len(
        {json.dumps({k: r[k] for k in r if k != "seconds_per_candidate"}) for r in result["rows"]}
    ) == len(result["rows"])
    assert rooms == {name: 8 if style.by_sentence else 32 for name, style in studies.STYLES.items()}
    paper = [
        (r["method"], r["epochs"], r["steps"]) for r in result["rows"] if r["protocol"] == "epochs"
    ]
    assert [p for p in paper if p[0] == "passage"] == [
        ("passage", 2, 2),
        ("passage", 4, 4),
    ] and len(paper) == 4
    args = [
        "--data",
        passages_file,
        "--max-new",
        8,
        "--top-layers",
        2,
        "--rank",
        2,
        "--match",
        "steps",
    ]
    args += [
        "--recipes",
        tmp_path / "out.json",
        "--work",
        tmp_path / "ladder",
        "--out",
        tmp_path / "ladder.json",
    ]
    run_script(monkeypatch, eval_qa, tiny_folder, *args)
    rows = {r["method"]: r for r in json.loads((tmp_path / "ladder.json").read_text())["rows"]}
    for method, best in result["best"].items():
        assert (rows[method]["train_steps"], rows[method]["lr"]) == (best["steps"], best["lr"])
    notes = run(
        monkeypatch,
        tiny_folder,
        passages_file,
        tmp_path,
        "notes",
        "--work",
        tmp_path / "ladder" / "climb-0",
    )
    assert [r["method"] for r in notes["rows"]] == ["passage+self-edit"] and notes["rows"][0][
        "n"
    ] == 2
    assert (
        all({"title", "passage", "passage+self-edit"} == e.keys() for e in notes["examples"])
        and notes["changes"] == []
    )
    log = tmp_path / "ladder" / "climb-0" / "passage+self-edit-sampled.jsonl"
    better = [e | {"parts": ["A b."], "notes": []} for e in read_jsonl(log)]
    (log.parent / "seal-1-sampled.jsonl").write_text("\n".join(map(json.dumps, better)))
    notes = run(
        monkeypatch,
        tiny_folder,
        passages_file,
        tmp_path,
        "notes",
        "--work",
        tmp_path / "ladder" / "climb-0",
    )
    [change] = [c for c in notes["changes"] if c["measure"] == "tokens"]
    tokens = {r["method"]: r["tokens"] for r in notes["rows"]}
    assert tokens["seal-1"] == 3 and change["delta"] == pytest.approx(
        3 - tokens["passage+self-edit"]
    )


def test_no_ladder_there(tiny_folder, passages_file, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no .*-sampled.jsonl there"):
        run(monkeypatch, tiny_folder, passages_file, tmp_path, "notes")
