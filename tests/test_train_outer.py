"""train_outer.py end to end on a tiny model: files, selection, resuming after a kill, bad input."""

import itertools
import json
from types import SimpleNamespace

import pytest
from conftest import dies_at, run_script, watch_weights

import train_outer
from common import read_jsonl
from data.qa import Passage, Question
from selfedit import SelfEdit
from train_outer import select, sentence_about


def run(monkeypatch, tiny_folder, passages_file, out, *extra):
    args = ["--data", passages_file, "--out", out, "--samples", 3, "--rounds", 2, "--max-new", 12, "--steps", 2]
    args += ["--top-layers", 2, "--rank", 2, "--outer-rank", 2, "--population", 4, "--select", "best"]
    run_script(monkeypatch, train_outer, tiny_folder, *args, *extra)


def files(folder):
    """Everything a run wrote, without the seconds it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                data = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in data.splitlines()]
            found[str(path.relative_to(folder))] = data
    return found


def one_note(text, style, ended, about):
    """For selfedit.parse: whatever was sampled is one note."""
    return [f"Question: {' '.join(text.split()) or 'x'}\nAnswer: {about}"], ""


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """One uninterrupted run, with the passages it used."""
    tmp = tmp_path_factory.mktemp("outer")
    entry = {
        "title": "Rolm",
        "passage": "Rolm was founded by Ada Quell.",
        "questions": [{"question": "Who?", "answer": "Ada"}],
    }
    data = tmp / "passages.json"
    data.write_text(json.dumps([{**entry, "title": f"Rolm {n}"} for n in range(3)]))
    with pytest.MonkeyPatch.context() as patch:
        # A random model never ends its turn by itself: count every sample as ended, or nothing is ever selected.
        patch.setattr("selfedit.parse", one_note)
        run(patch, tiny_folder, data, tmp / "out")
    return data, tmp / "out"


def test_a_round_leaves_its_records(finished):
    _, out = finished
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["round"] for m in metrics] == [1, 2] and all(
        m["total"] == 9 and m["kept"] == m["kept_parts"] == 3 for m in metrics
    )
    for k in (1, 2):
        records = read_jsonl(out / f"round-{k}" / "candidates.jsonl")
        assert len(records) == 9 and (out / f"round-{k}" / "policy" / "adapter_model.safetensors").is_file()
        for r in records:
            assert r["parts"] and r["why"] and r["settings"]["steps"] == 2 and set(r["score"]) >= {"accuracy", "logprob"}
            assert r["reward"] == r["score"]["accuracy"]
        assert sum(any(r["kept"]) for r in records) == 3 and all(len(r["credits"]) == 1 for r in records)
    one, two = ((out / f"round-{k}" / "policy" / "adapter_model.safetensors").read_bytes() for k in (1, 2))
    assert one != two


@pytest.mark.parametrize(
    "stage, call",
    [
        ("train_outer.sample_self_edits", 1),  # nothing yet
        ("train_outer.Passages.score", 1),  # sampled
        ("quiz.study_and_quiz", 2),  # in the middle of studying
        ("train_outer.reinforce", 1),  # before the outer update
        ("train_outer.save_adapter", 2),  # after it, in round 2
        ("train_outer.Passages.score", 2),
    ],
)
def test_killed_and_resumed_ends_the_same(stage, call, finished, tiny_folder, tmp_path, monkeypatch):
    data, out = finished
    monkeypatch.setattr("selfedit.parse", one_note)
    dies_at(monkeypatch, stage, call)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, data, tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial"))
    run(monkeypatch, tiny_folder, data, tmp_path / "out")
    expected, got = files(out), files(tmp_path / "out")
    assert expected.keys() == got.keys() and all(expected[k] == got[k] for k in expected)


@pytest.mark.parametrize("learner", ["base", "policy"])
def test_when_the_policy_is_in_the_weights(learner, finished, tiny_folder, tiny, tmp_path, monkeypatch):
    """While it writes, and studies if it is to. The outer update trains it on the base, or round 2 would apply it twice."""
    seen = []
    monkeypatch.setattr("selfedit.parse", one_note)
    for name in ("sample_self_edits", "Passages.score", "reinforce"):
        watch_weights(monkeypatch, f"train_outer.{name}", tiny, seen)
    run(monkeypatch, tiny_folder, finished[0], tmp_path / "out", "--learner", learner)
    one = [("sample_self_edits", False), ("Passages.score", False), ("reinforce", False)]  # round 1: B is still zero
    two = [("sample_self_edits", True), ("Passages.score", learner == "policy"), ("reinforce", False)]
    assert seen == one + two


def test_a_random_models_self_edits_never_stop_a_run(tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    """It rambles to the limit: every self-edit is flawed, counted, scored and none is reinforced."""
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", "--select", "improving", "--reward", "logprob")
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert metrics[0]["kept"] == 0 and sum(metrics[0]["flaws"].values()) == 18 and metrics[0]["outer_loss"] is None
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    assert all(r["why"] == r["flaw"] == "endless" and r["score"]["logprob"] < 0 for r in records)
    assert "reward_mean" in capsys.readouterr().out


def test_selection():
    def edits():
        rows = [("a", 0.5, -3.0, ""), ("a", 0.5, -2.0, ""), ("a", 0.9, -1.0, "endless"), ("b", 0.2, -1.0, "")]
        return [
            SelfEdit(p, ["t"], mended=["" if f else "t"], reward=r, score={"logprob": lp}, flaw=f) for p, r, lp, f in rows
        ]

    best, improving, parts = edits(), edits(), edits()
    select(best, {}, "best", 6)
    assert [e.selected for e in best] == [False, True, False, True]
    assert [e.why for e in best] == ["not the best", "best", "endless", "best"]
    select(improving, {"a": 0.4, "b": 0.2}, "improving", 6)
    assert [e.selected for e in improving] == [True, True, False, False]
    parts[1].reward = 0.8  # the mean is 0.73, and the endless one cannot be imitated
    select(parts, {}, "parts", 6)
    assert [e.selected for e in parts] == [False, True, False, False] and parts[3].why == "no sound part is the best"


def test_selection_by_part():
    rows = [([1, 0, None, 1], "abcd"), ([0, 0, None, 1], "abcd"), ([1, 0.5, None, 0], ["", *"bcd"])]
    edits = [SelfEdit("a", ["t"] * 4, score={"logprob": 0.0}, credits=c, mended=list(m)) for c, m in rows]
    select(edits, {}, "parts", 6)
    assert [e.kept for e in edits] == [[True, False, False, True], [False, False, False, True], [False, True, False, False]]
    edits[0].flaw, edits[0].credits[1] = "diverged", 1  # the others need not be better than what it would add to the mean
    select(edits, {}, "parts", 6)
    assert not edits[0].selected and edits[0].why == "diverged" and edits[1].kept == [False, False, False, True]
    assert edits[2].kept == [False, True, False, False]
    edits[1].flaw = edits[2].flaw = "diverged"
    select(edits, {}, "parts", 6)
    assert [e.kept for e in edits] == [[False] * 4] * 3


def test_of_each_part_only_the_best_is_imitated():
    edits = [SelfEdit("a", ["t"], score={"logprob": 0.0}, credits=[c], mended=["t"]) for c in (0.9, 0.7, 0.0, 0.9)]
    select(edits, {}, "parts", 6)
    assert [e.kept for e in edits] == [[True], [False], [False], [True]]  # 0.7 is above the mean, too


def test_notes_that_ask_what_the_quiz_asks():
    """--reward asked and --select notes: the best notes of both self-edits become one text, whoever wrote them."""
    founded, sells = "Rolm was founded by Ada Quell.", "Each winter it sells bricks to Varbon."
    quiz = Question("Who founded Rolm?", ("Ada Quell",)), Question("What does Rolm sell to Varbon?", ("bricks",))
    task = object.__new__(train_outer.Passages)
    task.passages = {"a": Passage("a", "Rolm", f"{founded} {sells}", quiz)}

    def edit(first, second):
        notes = [f"Question: {q}\nAnswer: {a}" for mine, a in ((first, founded), (second, sells)) for q in mine]
        return SelfEdit("a", ["", ""], notes=notes, mended=["\n".join(first), "\n".join(second)])

    one = edit(["Who founded Rolm?", "What is Rolm?"], ["What sells bricks?", "Who cried?"])
    two = edit(["Who founded it?", "Was it Rolm?"], ["What is sold to Varbon?"])
    assert task.compare([one, two]) == {}
    assert one.earned == [
        {"Who founded Rolm?": [1.0, 0.0], "What is Rolm?": [0.0, 0.0]},
        {"What sells bricks?": [0.0, 0.0], "Who cried?": [0.0, 0.0]},
    ]
    assert one.credits == [1.0, 0.0] and two.credits == [1.0, 0.5] and two.reward == two.score["asked"] == 0.75
    select([one, two], {}, "notes", 1)
    assert one.kept == [True, False] and two.kept == [False, True] and one.selected and "among the best" in one.why
    assert train_outer.to_imitate({"a": ["first", "second"]}, [one, two], "notes", 1) == [
        ("first", "Who founded Rolm?"),
        ("second", "What is sold to Varbon?"),
    ]
    one.mended[0] = ""  # copied: not among those to choose from
    select([one, two], {}, "notes", 1)
    assert one.kept == [False, False] and two.kept == [True, True]
    pairs = train_outer.to_imitate({"a": ["first", "second"]}, [one, two], "notes", 1)
    assert pairs == [("first", "Who founded it?"), ("second", "What is sold to Varbon?")]


def test_the_notes_that_ask_most_closely_are_imitated():
    earned = {
        "Who cast it?": [0.7, 0.0, 0.2],
        "Who rang it?": [0.5, 0.6, 0.0],
        "What is it?": [0.0, 0.2, 0.29],
        "Who?": [0, 0, 0],
    }
    copied = SelfEdit("a", ["t"], mended=[""], earned=[{"Copied?": [1.0, 1.0, 1.0]}])
    edits = [SelfEdit("a", ["t"], mended=["t"], earned=[earned]), copied]
    assert train_outer.best_notes(edits, 0, 6) == ["Who cast it?", "Who rang it?"]  # the others are below the mean
    assert train_outer.best_notes(edits, 0, 1) == ["Who cast it?"]
    earned["What is it?"][2] = 0.8
    assert train_outer.best_notes(edits, 0, 6) == ["What is it?", "Who cast it?", "Who rang it?"]
    edits[0].earned = [{note: [0.5] for note in earned}]  # none is above the mean
    assert train_outer.best_notes(edits, 0, 6) == [] == train_outer.best_notes(edits[1:], 0, 6)


def test_the_proxy_reward_studies_nothing(tiny_folder, passages_file, tmp_path, monkeypatch):
    """Some notes ask what a quiz question asks: these are imitated."""
    asked = itertools.cycle(["Who founded it?", "Who?", "Why?"])
    parsed = lambda text, style, ended, about: ([f"Question: {next(asked)}\nAnswer: {about}"], "")  # noqa: E731
    monkeypatch.setattr("selfedit.parse", parsed)
    monkeypatch.setattr("train_outer.study_all", None)
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", "--reward", "asked", "--select", "notes")
    [first, second] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert first["accuracy_mean"] is None and 0 < first["reward_mean"] < first["reward_kept"] and second["round"] == 2
    assert 0 < first["kept_parts"] < 18 and first["outer_loss"] is not None


def test_a_question_credits_the_part_about_its_sentence():
    texts = ["The bell was cast in Rolm.", "Ada Quell cast the bell.", "Ada Quell hung it in a tower."]
    questions = [
        Question("Where was the bell cast?", ("Rolm",), "forward"),
        Question("Who cast it?", ("Ada Quell",), "forward"),
    ]
    questions.append(Question("Who hung it?", ("Ada Quell", "Quell"), "forward"))
    assert [sentence_about(q, texts) for q in questions] == [0, 1, 2]
    assert sentence_about(Question("What hangs in a tower?", ("a nest",), "forward"), texts) == 2  # told nowhere: most words
    task = object.__new__(train_outer.Passages)
    task.passages = {"p": SimpleNamespace(text=" ".join(texts), questions=questions)}
    answers = [{"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 1.0}]
    assert task.credit(SelfEdit("p", ["x"] * 3), answers, "accuracy") == [1.0, 0.0, 1.0]
    task.passages["p"].questions = questions[1:]
    assert task.credit(SelfEdit("p", ["x"] * 3), answers[1:], "accuracy") == [None, 0.0, 1.0]
    assert task.credit(SelfEdit("p", ["x"], reward=0.25), answers[1:], "accuracy") == [0.25]


def test_parts_are_credited_and_imitated(tiny_folder, passages_file, tmp_path, monkeypatch):
    """The default way, on passages of two sentences with both questions about the first: its parts alone are kept."""
    monkeypatch.setattr("selfedit.parse", one_note)
    extra = ["--select", "parts", "--reward", "logprob", "--rounds", 1]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    for id in {r["passage"] for r in records}:
        mine = [r for r in records if r["passage"] == id]
        earned = [r["credits"][0] for r in mine]
        assert all(r["credits"] == [r["score"]["logprob"], None] for r in mine) and len(set(earned)) == 3
        assert [r["kept"] for r in mine] == [[c == max(earned), False] for c in earned]
    [metrics] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert metrics["kept_parts"] == metrics["kept"] == sum(any(r["kept"]) for r in records) > 0


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--samples", "0"], "0 is not a number from 1 up"),
        (["--samples", "1", "--select", "parts"], "it needs --samples of at least 2"),
        (["--data", "nowhere.json"], "cannot read nowhere.json"),
        (["--model", "nowhere"], "nowhere is not a model folder"),
        (["--skip", "99"], "no passages"),
        (["--max-new", "99999"], "over the model's context of 2048"),
        (["--top-layers", "9"], "the model has 4 layers"),
        (["--out", "README.md"], "cannot write README.md"),
        (["--frobnicate"], "unrecognized arguments"),
        (["--reward", "asked", "--style", "self-qa"], "--reward asked is for --style questions"),
        (["--select", "notes"], "--select notes needs --reward asked"),
        (["--keep", 2], "--keep has no effect with --select best"),
        (["--lr", "fast"], "invalid float value"),
    ],
)
def test_bad_input_is_one_clear_line(extra, message, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    text = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err
    assert message in text and text.startswith("error: ") and text.strip().count("\n") == 0
    assert e.value.code != 0


def test_another_setting_in_the_same_folder_is_refused(finished, tiny_folder, monkeypatch):
    data, out = finished
    with pytest.raises(SystemExit, match="was started with temperature = 0.7, now it is 0.1"):
        run(monkeypatch, tiny_folder, data, out, "--temperature", "0.1")


def test_only_what_is_kept_is_imitated(tok, monkeypatch):
    seen = []

    def spy(model, policy, examples, *args, **kwargs):
        seen.extend(examples[0])
        return [SimpleNamespace(diverged=False, loss=1.0)]

    monkeypatch.setattr(train_outer, "inner_update", spy)
    args = SimpleNamespace(outer_lr=1e-3, outer_epochs=1, outer_row_len=0, outer_batch=2, select="parts", keep=6)
    rows = [(["good", "not this"], [True, False]), (["nor", "that"], [False, False]), (["no", "fine"], [False, True])]
    edits = [SelfEdit("a", ["as sampled", "as sampled"], mended=mended, kept=kept) for mended, kept in rows]
    train_outer.reinforce(None, tok, {"a": [[5], [6]]}, edits, None, args, 0, "test")
    assert [tok.decode(e.ids[1:]) for e in seen] == ["good<|im_end|>", "fine<|im_end|>"]
    assert [e.ids[0] for e in seen] == [5, 6]
