"""eval_qa.py: the result file's numbers, and the whole ladder on a tiny model."""

import json
import re
from functools import partial

import numpy as np
import pytest
from conftest import run_script, watch_weights

import eval_qa
import reward
from data.qa import load_passages
from eval_qa import METRICS, per_passage, summarize
from inner import SFTConfig
from lm.adapters import save_adapter
from lm.files import read_jsonl
from lora import PROJECTIONS, Adapters, LoRAConfig
from quiz import ask
from reward import passage_candidate
from selfedit import Part, SelfEdit, settings_of

pytestmark = pytest.mark.usefixtures("brief_answers")

# -----------------------------------------------------------------------------
# numbers


def test_differences_are_paired():
    base = np.linspace(0, 0.8, 20)  # passages differ a lot, the step up is the same in each
    table = {"base": dict.fromkeys(METRICS, base), "passage": dict.fromkeys(METRICS, base + 0.1)}
    result = summarize(table, seed=0)
    rows, [step] = result["rows"], result["steps"]
    assert "gap_closed" not in result and step["delta"] == pytest.approx(0.1)
    assert step["ci95"] == pytest.approx([0.1, 0.1])
    assert rows[0]["ci95"][0] < rows[0]["accuracy"] < rows[0]["ci95"][1]


def test_the_last_policy_is_compared_with_every_row_below():
    noise, table = np.random.default_rng(0).normal(0, 0.02, 50), {}
    for method, mean in (
        ("base", 0.0),
        ("passage", 0.2),
        ("seal-1", 0.3),
        ("seal-2", 0.4),
        ("in-context", 0.7),
    ):
        table[method] = dict.fromkeys(METRICS, np.full(50, mean) + noise * (method != "base"))
    result = summarize(table, seed=0)
    pairs = {(s["from"], s["to"]): s["delta"] for s in result["steps"]}
    assert len(pairs) == len(result["steps"]) == 6  # four from row to row, and two more to seal-2
    assert pairs["passage", "seal-2"] == pytest.approx(0.2) and ("base", "seal-2") in pairs
    gap = result["gap_closed"]
    assert gap["by"] == "seal-2" and gap["share"] == pytest.approx(0.4)
    assert gap["ci95"] == pytest.approx([0.4, 0.4])
    table["in-context"] = table["base"]
    assert summarize(table, seed=0)["gap_closed"]["share"] is None  # nothing to close


def test_directions_are_averaged_apart():
    class P:
        questions = tuple(
            type("Q", (), {"direction": d}) for d in ("forward", "forward", "reversed")
        )

    answers = [{"accuracy": a, "em": 0.0, "f1": 0.0, "logprob": -1.0} for a in (1.0, 0.0, 1.0)]
    table = per_passage([P], [[answers]])
    assert table["accuracy"][0] == pytest.approx(2 / 3)
    assert table["forward"][0] == 0.5 and table["reversed"][0] == 1.0

    class Q:  # without reversed questions: it counts for forward only
        questions = P.questions[:2]

    table = per_passage([P, Q], [[answers], [answers[:2]]])
    assert table["forward"].tolist() == [0.5, 0.5] and table["reversed"].tolist() == [1.0]


# -----------------------------------------------------------------------------
# the ladder


@pytest.fixture(autouse=True, scope="module")
def brief():
    """Short answers: that an answer may have 48 tokens makes no difference here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reward.ask", "eval_qa.ask"):
            patch.setattr(name, partial(ask, max_new=4))
        yield


SMALL = "--max-new 4 --epochs 2 --steps 3 --top-layers 2 --rank 2".split()
ALL = "base passage passage+unrelated passage+self-edit passage+pooled seal-1 in-context".split()


def ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra):
    args = ["--data", passages_file, "--out", tmp_path / "ladder.json", "--work", tmp_path / "work"]
    run_script(monkeypatch, eval_qa, tiny_folder, *args, *SMALL, *extra)


def result_of(path) -> dict:
    return json.loads(path.read_text())


def a_run(tiny, tiny_folder, passages_file, run, **changes):
    """A run of one round, whose policy is not the base."""
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, tuple(PROJECTIONS), 0, 4), 1, seed=0)
    policy.flat += 0.05
    save_adapter(policy, run / "round-1" / "policy", tiny_folder)
    settings = {"domain": "qa", "data": str(passages_file), "split": "train", "skip": 0, "limit": 0}
    (run / "settings.json").write_text(json.dumps(settings | changes))
    return settings


def test_the_ladder(tiny, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    a_run(tiny, tiny_folder, passages_file, tmp_path / "run")
    extra = ["--run", tmp_path / "run", "--match", "both", "--samples", 2, "--seeds", 2]
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    out = capsys.readouterr().out
    for protocol in ("epochs", "steps"):
        result = result_of(tmp_path / f"ladder_{protocol}.json")
        assert [r["method"] for r in result["rows"]] == ALL
        assert result["n_passages"] == 2 and result["n_questions"] == 4
        pairs = [(s["from"], s["to"]) for s in result["steps"]]
        notes = ("passage", "passage+self-edit")
        assert pairs == [*zip(ALL, ALL[1:]), notes, *((m, "seal-1") for m in ALL[:4])]
        columns = {"accuracy", "ci95", "em", "f1", "logprob", "forward", "reversed"}
        assert all(columns <= r.keys() and r["logprob"] < 0 for r in result["rows"])
        trained = [r["train_steps"] for r in result["rows"][1:-1]]
        assert trained == [3.0] * 5 if protocol == "steps" else trained[0] == 2.0
        assert (result["settings"]["steps"], result["settings"]["seeds"]) == (3, 2)
        assert result["protocol"] == protocol and result["gap_closed"]["by"] == "seal-1"
        assert result["command"].startswith("python eval_qa.py")
    assert all(m in out for m in ALL)
    before = (tmp_path / "ladder_steps.json").read_text()
    for name in ("reward.inner_update", "reward.ask", "selfedit.generate"):
        monkeypatch.setattr(name, None)  # everything is found in the work folder
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    assert (tmp_path / "ladder_steps.json").read_text() == before


def test_a_ladder_beside_its_run(tiny, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    """Without --out and --work; and what every row has learnt from and answered."""
    run = tmp_path / "run"
    a_run(tiny, tiny_folder, passages_file, run)
    monkeypatch.setattr(
        "selfedit.parse",
        lambda text, style, ended, about: ([f"Question: {text[:3]}?\nAnswer: {about}"], ""),
    )
    args = ["--data", passages_file, "--run", run, *SMALL]
    run_script(monkeypatch, eval_qa, tiny_folder, *args)
    methods = [m for m in ALL if m != "passage+pooled"]
    rows = {r["method"]: r for r in result_of(run / "ladder.json")["rows"]}
    assert list(rows) == methods
    assert "--- seal-1" in capsys.readouterr().out
    records = read_jsonl(run / "ladder" / "answers.jsonl")
    assert [(r["method"], r["passage"]) for r in records] == [
        (m, id) for m in ("base", "in-context", *methods[1:-1]) for id in ("3", "4")
    ]
    passages = {p.id: p for p in load_passages(passages_file, "heldout")}
    notes = {(r["method"], r["passage"]): r["notes"] for r in records}
    for r in records:
        p = passages[r["passage"]]
        assert (r["title"], r["text"]) == (p.title, p.text)
        assert [a["question"] for a in r["answers"]] == [q.question for q in p.questions]
        assert [a["accepted"] for a in r["answers"]] == [list(q.answers) for q in p.questions]
        assert all({"answer", "accuracy", "em", "f1", "logprob"} <= a.keys() for a in r["answers"])
        (first, mean), (second, nothing) = r["sentences"]  # both questions are about the first
        assert f"{first} {second}" == p.text and nothing is None
        assert mean == np.mean([a["accuracy"] for a in r["answers"]])
        wrote = r["method"] in ("passage+unrelated", "passage+self-edit", "seal-1")
        assert len(r["notes"]) == (2 if wrote else 0)
    for id, other in (("3", "4"), ("4", "3")):
        assert notes["passage+unrelated", id] == notes["passage+self-edit", other]
        assert notes["seal-1", id] != notes["passage+self-edit", id]
    for method in methods:
        own = [r for r in records if r["method"] == method]
        logprobs = [a["logprob"] for r in own for a in r["answers"]]  # two of each passage
        assert rows[method]["logprob"] == pytest.approx(float(np.mean(logprobs)))


def test_runs_that_do_not_fit_are_refused(tiny, tiny_folder, passages_file, tmp_path, monkeypatch):
    settings = a_run(tiny, tiny_folder, passages_file, tmp_path / "run")
    monkeypatch.setattr(eval_qa, "ladder", lambda *a: ({}, []))

    def climb(*extra, **changes):
        (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | changes))
        extra = ["--run", tmp_path / "run", *extra]
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)

    climb()
    with pytest.raises(SystemExit, match="was trained on 3 of these passages"):
        climb("--split", "")
    with pytest.raises(SystemExit, match="was trained on 2 of these passages"):
        climb(split="")
    climb("--split", "train", "--work", tmp_path / "train")  # asked for
    policy = tmp_path / "run" / "round-1" / "policy"
    for flag in ("--policy", "--proxy"):
        with pytest.raises(SystemExit, match=f"{policy} was trained on 3 of these passages"):
            ladder(monkeypatch, tiny_folder, passages_file, tmp_path, flag, policy, "--split", "")
    with pytest.raises(SystemExit, match="has changed since .*run was trained on it"):
        climb(data_sha256="another")
    for key, other in (("style", "rewrite"), ("learner", "policy"), ("shots", 0)):
        with pytest.raises(SystemExit, match=f"was trained with --{key} {other}"):
            climb(**{key: other})
    with pytest.raises(SystemExit, match=r"was trained with train_outer\.py arc"):
        climb(domain="arc")
    climb()
    weights = tmp_path / "run" / "round-1" / "policy" / "adapter_model.safetensors"
    weights.write_bytes(b"another policy")
    with pytest.raises(SystemExit, match="was started with policies"):
        climb()
    del settings["domain"]
    with pytest.raises(SystemExit, match="was written by an older version"):
        climb(task="qa")


def test_recipes_and_a_stronger_editor(tiny_folder, passages_file, tmp_path, monkeypatch):
    """The data file has two self-edits of one passage, and one of the other."""
    data = json.loads(passages_file.read_text())
    for p in data["passages"]:
        p["completions"] = ["1. One note.\n2. Another.", "A third."]
    del data["passages"][-1]["completions"][1]
    passages_file.write_text(json.dumps(data))
    best = {"passage": {"lr": 1e-3, "steps": 2}, "passage+unrelated": {"lr": 2e-3, "steps": 3}}
    recipes = tmp_path / "recipes.json"
    recipes.write_text(json.dumps({"best": best}))
    extra = ["--match", "steps", "--recipes", recipes, "--samples", 2]
    unlike = [{"lr": 1e-3}, {"lr": "x", "steps": 2}, {"lr": 1e-3, "steps": 0}, [], 7]
    unlike += [{"lr": float("inf"), "steps": 2}, {"lr": 1e-3, "steps": 2.5}]
    for wrong in [best, [], None, *(best | {"passage+self-edit": recipe} for recipe in unlike)]:
        recipes.write_text(json.dumps({"best": wrong}).replace("Infinity", "1e999"))
        with pytest.raises(SystemExit, match="no 'lr' and 'steps' for 'passage"):
            ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    best |= {"passage+self-edit": {"lr": 4e-3, "steps": 4, "accuracy": 0.5}}
    recipes.write_text(json.dumps({"best": best}))
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    rows = {r["method"]: r for r in result_of(tmp_path / "ladder.json")["rows"]}
    used = {m: (r["train_steps"], r["lr"]) for m, r in rows.items() if "lr" in r}
    own = (4, pytest.approx(4e-3))
    notes = dict.fromkeys(["passage+self-edit", "passage+pooled", "stronger-editor"], own)
    assert used == {"passage": (2, 1e-3), "passage+unrelated": (3, 2e-3)} | notes
    records = read_jsonl(tmp_path / "work" / "answers.jsonl")
    given = [(r["passage"], r["notes"]) for r in records if r["method"] == "stronger-editor"]
    assert given == [
        ("3", ["One note.", "Another."]),
        ("3", ["A third."]),
        ("4", ["One note.", "Another."]),
    ]


def written_of(*notes):
    return SelfEdit("p", [Part("x", list(notes), style="questions")])


def test_what_the_notes_of_a_row_are(tok, tiny_folder, passages_file, tmp_path, monkeypatch):
    seen, written = {}, [[written_of("a")], [written_of("b")]]
    real = eval_qa.update_and_quiz

    def spy(model, tok, groups, lora, seed, log, quiz, label):
        found = {}
        for group in groups:
            found |= {c.name: c for c in group}
        seen[label] = [found[n] for n in sorted(found)]
        real(model, tok, groups, lora, seed, log, quiz, label)

    def examples(*contents):
        """Of (passage, notes, title)."""
        made = []
        for passage, notes, title in contents:
            made.append(passage_candidate(tok, 0, passage, notes, SFTConfig(), title).examples)
        return made

    monkeypatch.setattr(eval_qa, "update_and_quiz", spy)
    monkeypatch.setattr(eval_qa.Climb, "write", lambda self, *_: written)
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path)
    assert "passage+pooled (steps)" not in seen  # of one self-edit there is nothing to pool
    one, two = load_passages(passages_file, "heldout")
    assert (one.title, two.title) == ("Town 3", "Town 4")
    own, other = seen["passage+self-edit (steps)"], seen["passage+unrelated (steps)"]
    assert [c.subject for c in own] == [c.subject for c in other] == [one, two]
    assert [c.examples for c in own] == examples((one, ["a"], "Town 3"), (two, ["b"], "Town 4"))
    assert [c.examples for c in other] == examples((one, ["b"], "Town 4"), (two, ["a"], "Town 3"))
    alone = [c.examples for c in seen["passage (steps)"]]
    assert alone == examples((one, [], ""), (two, [], ""))
    written[:] = [[written_of("a", "b"), written_of("b", "c")], [written_of(), written_of("d")]]
    extra = ["--work", tmp_path / "two", "--samples", 2]
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    pooled = [c.examples for c in seen["passage+pooled (steps)"]]
    assert pooled == examples((one, ["a", "b", "c"], ""), (two, ["d"], ""))
    assert len(seen["passage+self-edit (steps)"]) == 4


def test_the_ladder_with_settings(tiny, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    """Untrained notes as the flags, their own settings and the best settings say; a flawed one
    answers nothing, and the policy's are its own."""
    before = {"settings": True, "budget": 8192}
    a_run(tiny, tiny_folder, passages_file, tmp_path / "run", **before)
    monkeypatch.setattr("selfedit.parse", lambda text, style, *_: ([f"In {style}."], ""))
    monkeypatch.setattr("selfedit.QA_PAIR", re.compile("(.*)"))  # every note can be imitated
    own, best = (settings_of(["passage"], n, 0, 0, "all", 0.001, 2) for n in (0, 1))
    best = best | {"data": ["passage", "facts"]}
    (tmp_path / "grid.json").write_text(json.dumps({"best": best}))
    said = iter([(own, ""), ({}, "malformed"), (own, ""), (own, "")])  # of 2 passages, twice
    monkeypatch.setattr("selfedit.parse_settings", lambda text, ended: next(said))
    seen, real = {}, eval_qa.update_and_quiz

    def spy(model, tok, groups, lora, seed, log, quiz, label):
        seen[label] = [c for group in groups for c in group]
        real(model, tok, groups, lora, seed, log, quiz, label)

    monkeypatch.setattr(eval_qa, "update_and_quiz", spy)
    extra = ["--run", tmp_path / "run", "--settings", "--fixed", tmp_path / "grid.json"]
    extra += ["--proxy", tmp_path / "run" / "round-1" / "policy"]
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    first = result_of(tmp_path / "ladder.json")
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra, "--policy-notes")
    result = result_of(tmp_path / "ladder.json")
    rows = {r["method"]: r for r in result["rows"]}
    notes = rows.pop("passage+seal-1")  # the other rows are as they were
    assert [*rows.values()] == first["rows"] and notes["lr"] == 0.004
    steps = [(step["from"], step["to"]) for step in result["steps"]]
    for row in ("seal-1", "passage", "passage+self-edit"):
        assert (row, "passage+seal-1") in steps
    added = ["untrained-settings", "best-fixed", "seal-1"]
    assert list(rows) == [*ALL[:4], *added[:2], "proxy", "seal-1", "in-context"]
    assert ("proxy", "seal-1") in [(step["from"], step["to"]) for step in result["steps"]]
    counted = {m: len(seen[f"{m} (steps)"]) for m in added}
    assert counted == {"untrained-settings": 1, "best-fixed": 2, "seal-1": 2}
    assert len(seen["best-fixed (steps)"][0].examples) == 3  # the passage, a fact, another order
    half = rows["untrained-settings"]["train_steps"], rows["seal-1"]["train_steps"]
    assert half == (1.0, 2.0)  # one of two passages in two epochs of one row
    assert rows["untrained-settings"]["train_tokens"] == pytest.approx(
        rows["seal-1"]["train_tokens"] / 2, rel=0.5
    )
    assert result["settings"]["fixed"] == best and "lr" not in rows["seal-1"]
    learnt = [r for r in read_jsonl(tmp_path / "work" / "answers.jsonl") if "settings" in r]
    assert [r["method"] for r in learnt] == [m for m in added for _ in range(2)]
    assert [r["settings"] for r in learnt] == [own, {}, best, best, own, own]
    assert [r["flaw"] for r in learnt] == ["", "malformed", "", "", "", ""]
    facts = ["In implications."]
    assert [r["notes"] for r in learnt] == [[], [], facts, facts, [], []]
    plain = [r for r in read_jsonl(tmp_path / "work" / "answers.jsonl") if "settings" not in r]
    rows["passage+seal-1"] = notes
    for row in ("passage+self-edit", "proxy", "passage+seal-1"):  # whatever the other rows say
        notes = [r["notes"] for r in plain if r["method"] == row]
        assert notes == [["In questions."]] * 2 and rows[row]["lr"] == 0.004
    assert rows["untrained-settings"]["logprob"] < -40  # -100 of the one that was not studied


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--fixed", "x.json"], "has no effect"),
        (["--budget", 9], "has no effect"),
        (["--settings", "--match", "both"], "leave out"),
        (["--settings", "--style", "rewrite"], "leave out"),
        (["--settings", "--fixed", "BAD"], "no settings under 'best'"),
    ],
)
def test_settings_that_contradict(
    extra, message, tiny_folder, passages_file, tmp_path, monkeypatch, capsys
):
    (tmp_path / "bad.json").write_text('{"best": {"lr": 1}}')
    extra = [tmp_path / "bad.json" if e == "BAD" else e for e in extra]
    with pytest.raises(SystemExit) as stopped:
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    assert message in str(stopped.value) + capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_ladder_with_what_is_told(tok, tiny_folder, passages_file, tmp_path, monkeypatch):
    seen, real = {}, eval_qa.update_and_quiz

    def spy(model, tok, groups, lora, seed, log, quiz, label):
        seen[label] = [c for group in groups for c in group]
        real(model, tok, groups, lora, seed, log, quiz, label)

    monkeypatch.setattr(eval_qa, "update_and_quiz", spy)
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--told")
    rows = [r["method"] for r in result_of(tmp_path / "ladder.json")["rows"]]
    assert rows[-2:] == ["told", "in-context"]
    for c in seen["told (steps)"]:
        asked = [tok.decode(list(e.ids)) for e in c.examples[1:]]
        assert len(asked) == len(c.subject.questions)
        for q, shown in zip(c.subject.questions, asked):
            assert q.question in shown and q.answers[0] in shown


@pytest.mark.parametrize(
    "before, extra, message",
    [
        ({"settings": True, "budget": 8192}, [], "trained with --settings; give"),
        ({"settings": False, "budget": 8192}, ["--settings"], "trained without --settings; give"),
        ({"settings": True, "budget": 99}, ["--settings"], "trained with --budget 99; give"),
    ],
)
def test_a_run_with_other_settings(
    before, extra, message, tiny, tiny_folder, passages_file, tmp_path, monkeypatch
):
    a_run(tiny, tiny_folder, passages_file, tmp_path / "run", **before)
    with pytest.raises(SystemExit, match=message):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--run", tmp_path / "run", *extra)


def test_no_rounds_there(tiny_folder, passages_file, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no finished round"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--run", tmp_path)


def test_a_passage_longer_than_the_context(tiny_folder, passages_file, tmp_path, monkeypatch):
    data = json.loads(passages_file.read_text())
    data["passages"][-1]["passage"] = "long " * 3000
    passages_file.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="context of 2048"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path)
    assert not (tmp_path / "ladder.json").exists()


def test_without_an_update(tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--no-study", "--split", "")
    result = result_of(tmp_path / "ladder.json")
    assert [r["method"] for r in result["rows"]] == ["base", "in-context"]
    assert result["n_passages"] == 5 and "nothing learnt" in capsys.readouterr().out
    records = read_jsonl(tmp_path / "work" / "answers.jsonl")
    assert [r["method"] for r in records] == ["base"] * 5 + ["in-context"] * 5


@pytest.mark.parametrize("who", ["base", "policy"])
def test_a_policy_writes_and_its_learner_learns(
    who, tiny, tiny_folder, passages_file, tmp_path, monkeypatch
):
    a_run(tiny, tiny_folder, passages_file, tmp_path / "run")
    policy, seen = tmp_path / "run" / "round-1" / "policy", []
    for name in ("write_self_edits", "update_and_quiz"):
        watch_weights(monkeypatch, f"eval_qa.{name}", tiny, seen)
    extra = ["--policy", policy, "--learner", who]
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    *before, writes, learns = seen
    assert not any(changed for _, changed in before) and len(before) == 4
    assert (writes, learns) == (("write_self_edits", True), ("update_and_quiz", who == "policy"))


def test_a_student_is_asked_and_learns_what_another_writes(
    tiny_folder, student_folder, passages_file, tmp_path, monkeypatch
):
    """All rows are the student's: its base, what it reads off the prompt, what it has learnt."""
    asked, wrote = [], []
    real, write = eval_qa.ask, eval_qa.write_self_edits
    quiz = reward.ask

    def writes(model, *rest, **options):
        wrote.append(model)
        return write(model, *rest, **options)

    def asks(of, model, *rest, **options):
        asked.append(model)
        return of(model, *rest, **options)

    monkeypatch.setattr(eval_qa, "write_self_edits", writes)
    monkeypatch.setattr(eval_qa, "ask", partial(asks, real))
    monkeypatch.setattr(reward, "ask", partial(asks, quiz))
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--student", student_folder)
    assert asked and all(model.config.qkv_bias for model in asked)
    assert wrote and not any(model.config.qkv_bias for model in wrote)
    assert result_of(tmp_path / "ladder.json")["settings"]["student"] == str(student_folder)
    with pytest.raises(SystemExit, match="started with student"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path)
