"""reward.py: populations and their quizzes, the proxy, credit, selection."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ROOT, dies_at

from data.qa import Passage, Question, load_passages
from inner import SFTConfig
from lm.files import read_jsonl
from lm.log import Log
from lm.packing import Example, arrange, row_tokens
from lora import PROJECTIONS, LoRAConfig
from quiz import ask, mean_scores, quiz_items, quiz_prompt
from reward import (
    NOTHING,
    Candidate,
    accuracy_of,
    best_notes,
    by_sentence,
    closest_question,
    credit,
    even_groups,
    note_uncredited,
    passage_candidate,
    passage_examples,
    pooled,
    populations,
    proxy_scores,
    quiz_candidates,
    score_by_proxy,
    select,
    sentence_about,
    to_imitate,
    told,
    unrelated,
    update_and_quiz,
    words,
)
from selfedit import Part, SelfEdit

LORA = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4)


def passage(n, questions=2):
    quiz = []
    for i in range(questions):
        quiz.append(Question(f"Who built house {i} of {n}?", (f"Person {i}", "nobody")))
    return Passage(f"p{n}", f"Title {n}", f"House {n} stands on a hill. " * (n + 1), tuple(quiz))


# -----------------------------------------------------------------------------
# candidates and their quizzes


@pytest.fixture
def brief(monkeypatch):
    """Short answers: that an answer may have 48 tokens makes no difference here."""
    monkeypatch.setattr("reward.ask", partial(ask, max_new=8))


def scored(model, tok, candidates, path, size=8, lora=LORA):
    """Their results, after an inner update and the quiz in populations of `size`."""
    log = Log(path, accuracy_of)
    how = (lora, 0, log, quiz_candidates, "test")
    update_and_quiz(model, tok, populations(candidates, size), *how)
    return [log[c] for c in candidates]


def test_training_sequences(tok):
    texts = ["It is a town.", "Question: What is Rolm?\nAnswer: A town"]
    note, pair = passage_examples(tok, "Rolm", texts)
    assert tok.decode(note.ids) == "Rolm\nIt is a town.<|im_end|>" and all(note.counts)
    asked = quiz_prompt(tok, "Rolm", "What is Rolm?")
    assert list(pair.ids[: len(asked)]) == asked
    assert tok.decode(pair.ids[len(asked) :]) == "A town<|im_end|>"
    assert pair.counts == tuple(n >= len(asked) for n in range(len(pair.ids)))
    candidate = passage_candidate(tok, 0, passage(0), ("A note.",), SFTConfig(), "Other")
    own, other = (tok.decode(e.ids) for e in candidate.examples)
    assert own.startswith(f"{passage(0).title}\n") and other.startswith("Other\nA note.")
    assert candidate.tokens == sum(len(e.ids) for e in candidate.examples)


def test_a_population_scores_as_its_candidates_alone(tiny, tok, tmp_path, brief):
    config, candidates = SFTConfig(lr=1e-2, epochs=2), []
    for n, (questions, notes) in enumerate(((3, ["A note."]), (1, []), (2, ["B.", "C."]))):
        candidates.append(passage_candidate(tok, n, passage(n, questions), notes, config))
    together = scored(tiny, tok, candidates, tmp_path / "all.jsonl")
    for c, result in zip(candidates, together):
        [alone] = scored(tiny, tok, [c], tmp_path / f"{c.name}.jsonl")
        assert len(alone["answers"]) == len(c.subject.questions)
        assert [a["answer"] for a in alone["answers"]] == [a["answer"] for a in result["answers"]]
        logprob = mean_scores(result["answers"])["logprob"]
        assert mean_scores(alone["answers"])["logprob"] == pytest.approx(logprob, rel=1e-3)


def test_a_diverged_candidate_scores_zero(tiny, tok, tmp_path, brief):
    config = SFTConfig(lr=1e30, clip=1e30, epochs=6)
    candidate = passage_candidate(tok, 0, passage(0), (), config)
    [result] = scored(tiny, tok, [candidate], tmp_path / "log.jsonl")
    assert result["diverged"] and accuracy_of(result) == 0.0
    assert mean_scores(result["answers"])["logprob"] == -100.0


def test_populations_keep_order_and_resume(tiny, tok, tmp_path, brief, monkeypatch):
    candidates, config = [], SFTConfig(epochs=1)
    for n in range(7):
        candidates.append(
            passage_candidate(tok, n, passage(3 - n % 4), ["Note."] * (n % 3), config)
        )
    groups = populations(candidates, 3)
    assert sorted(c.name for group in groups for c in group) == list(range(7))
    assert [len(group) for group in groups] == [3, 2, 2]
    lengths = [c.tokens for group in groups for c in group]
    assert lengths == sorted(lengths)  # like lengths together
    whole = scored(tiny, tok, candidates, tmp_path / "a.jsonl", 3)
    assert read_jsonl(tmp_path / "a.jsonl") == whole and [r["n"] for r in whole] == list(range(7))
    for c, result in zip(candidates, whole):
        rows = arrange(c.examples, config.row_len)
        assert result["tokens"] == sum(row_tokens(c.examples, *row) for row in rows)
    calls = dies_at(monkeypatch, "reward.inner_update", 2)
    with pytest.raises(KeyboardInterrupt):
        scored(tiny, tok, candidates, tmp_path / "b.jsonl", 3)
    assert scored(tiny, tok, candidates, tmp_path / "b.jsonl", 3) == whole
    # The finished population was not computed again.
    assert [len(examples) for _, _, examples, *_ in calls] == [3, 2, 2, 2]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_smollm2_learns_a_passage(smollm2, tok, tmp_path, brief):
    [p] = load_passages(ROOT / "data" / "passages.json", "train", limit=1)
    p = replace(p, questions=p.questions[:3])
    hidden = mean_scores(ask(smollm2, tok, quiz_items(tok, p), max_new=8))
    lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), 20, 30)
    candidate = passage_candidate(tok, 0, p, (), SFTConfig(lr=4e-3, epochs=6))
    [result] = scored(smollm2, tok, [candidate], tmp_path / "log.jsonl", lora=lora)
    assert mean_scores(result["answers"])["logprob"] > hidden["logprob"] + 0.5
    assert result["loss"] < 1.5 and result["steps"] == 6


def test_groups_are_even():
    assert even_groups(list("abcdefghij"), 8) == [list("abcde"), list("fghij")]
    assert even_groups([], 8) == [] and even_groups(["a"], 8) == [["a"]]


def test_notes_on_something_else_and_of_several_self_edits():
    passages = [SimpleNamespace(title=t) for t in "ABC"]
    assert unrelated(passages, ["a", "b", "c"]) == (["b", "c", "a"], ["B", "C", "A"])
    assert pooled([("a", "b"), ("b", "c")]) == ("a", "b", "c") and pooled([()]) == ()


# -----------------------------------------------------------------------------
# the proxy


def test_what_the_questions_of_the_notes_ask():
    assert words("In 1742 she cast the bell.") == {"1742", "cast", "bell"}
    cast = Question("Who cast the bell?", ("Hessa Lorn",))
    near, far = ("Who cast it?", "Hessa Lorn did."), ("Whose?", "Hessa Lorn's.")
    told = ("Which bell did Hessa Lorn cast?", "Hessa Lorn cast it.")
    wrong = ("Who cast the bell?", "A potter did.")
    assert closest_question(cast, [far, near, told, wrong]) == pytest.approx(2 / 3)
    assert closest_question(cast, [told, wrong]) == closest_question(cast, []) == 0
    # What the title says, any question may.
    assert closest_question(cast, [near], "The Vantor Bell") == 1
    assert closest_question(cast, [("Who is the bell of?", "Hessa Lorn.")], "The Vantor Bell") == 0
    assert closest_question(cast, [near], "Cast Bell") == 0  # neither has other words
    p = Passage("p", "Rolm", "Hessa Lorn cast the bell.", (cast,))
    notes = ["Hessa Lorn cast it.", "Question: Who cast it?\nAnswer: Hessa Lorn cast the bell."]
    assert proxy_scores(p, notes) == [pytest.approx(2 / 3)] and proxy_scores(p, notes[:1]) == [0.0]


def test_notes_that_ask_what_the_quiz_asks():
    """--reward proxy and --select notes: the best notes of both self-edits become one text, whoever
    wrote them."""
    founded, sells = "Rolm was founded by Ada Quell.", "Each winter it sells bricks to Varbon."
    who = Question("Who founded Rolm?", ("Ada Quell",))
    what = Question("What does Rolm sell to Varbon?", ("bricks",))
    passages = {"a": Passage("a", "Rolm", f"{founded} {sells}", (who, what))}

    def edit(first, second):
        parts = []
        for questions, answer in ((first, founded), (second, sells)):
            notes = [f"Question: {q}\nAnswer: {answer}" for q in questions]
            parts.append(Part("", notes, "\n".join(questions)))
        return SelfEdit("a", parts)

    def kept(e):
        return [part.kept for part in e.parts]

    one = edit(["Who founded Rolm?", "What is Rolm?"], ["What sells bricks?", "Who cried?"])
    two = edit(["Who founded it?", "Was it Rolm?"], ["What is sold to Varbon?"])
    score_by_proxy([one, two], passages)
    assert [part.note_credits for part in one.parts] == [
        {"Who founded Rolm?": [1.0, 0.0], "What is Rolm?": [0.0, 0.0]},
        {"What sells bricks?": [0.0, 0.0], "Who cried?": [0.0, 0.0]},
    ]
    assert [part.credit for part in one.parts] == [1.0, 0.0]
    assert [part.credit for part in two.parts] == [1.0, 0.5]
    assert two.reward == two.score["proxy"] == 0.75
    select([one, two], {}, "notes", 1)
    assert kept(one) == [True, False] and kept(two) == [False, True]
    assert one.kept and "among the best" in one.why
    prompts = {"a": ["first", "second"]}
    assert to_imitate(prompts, [one, two], "notes", 1) == [
        ("first", "Who founded Rolm?", 1.0),
        ("second", "What is sold to Varbon?", 1.0),
    ]
    one.parts[0].target = ""  # copied: not among those to choose from
    select([one, two], {}, "notes", 1)
    assert kept(one) == [False, False] and kept(two) == [True, True]
    assert to_imitate(prompts, [one, two], "notes", 1) == [
        ("first", "Who founded it?", 1.0),
        ("second", "What is sold to Varbon?", 1.0),
    ]


# -----------------------------------------------------------------------------
# credit


def answered(*accuracies, diverged=False) -> dict:
    """A result of the quiz with these accuracies."""
    answers = [{"accuracy": a, "em": 0.0, "f1": 0.0, "logprob": a - 1} for a in accuracies]
    return {"steps": 3, "loss": 0.5, "diverged": diverged, "answers": answers}


def test_a_question_credits_the_part_about_its_sentence(capsys):
    texts = [
        "The bell was cast in Rolm.",
        "Ada Quell cast the bell.",
        "Ada Quell hung it in a tower.",
    ]
    questions = (
        Question("Where was the bell cast?", ("Rolm",), "forward"),
        Question("Who cast it?", ("Ada Quell",), "forward"),
        Question("Who hung it?", ("Ada Quell", "Quell"), "forward"),
    )
    assert [sentence_about(q, texts) for q in questions] == [0, 1, 2]
    # The answer says more than words do.
    where = Question("Where did Ada Quell cast the bell?", ("Rolm",), "forward")
    assert sentence_about(where, texts) == 0
    nowhere = Question("What hangs in a tower?", ("a nest",), "forward")
    assert sentence_about(nowhere, texts) is None  # told nowhere

    def credits(styles, questions, accuracies, reward="accuracy"):
        e = SelfEdit("p", [Part("x", style=style) for style in styles])
        p = Passage("p", "Bell", " ".join(texts), questions)
        credit(e, p, answered(*accuracies), reward)
        return [part.credit for part in e.parts]

    each = ["questions"] * 3
    assert credits(each, questions, [1.0, 0.0, 1.0]) == [1.0, 0.0, 1.0]
    assert credits(each, questions[1:], [0.0, 1.0]) == [None, 0.0, 1.0]
    assert credits(each, questions[1:], [0.0, 1.0], "logprob") == [None, -1.0, 0.0]
    assert credits(["rewrite"], questions[1:], [0.5, 0.0]) == [0.25]  # of all: the whole reward
    whole = ["settings", *each, "implications"]
    assert credits(whole, questions[1:], [0.0, 1.0]) == [0.5, None, 0.0, 1.0, 0.5]
    about_one = Passage("p", "Bell", " ".join(texts), (questions[0], questions[0]))
    assert by_sentence(about_one, [1.0, 0.5]) == [0.75, None, None]
    # What no sentence says counts for the whole, and for no part.
    assert credits(["questions"] * 3, (nowhere, questions[0]), [1.0, 0.0]) == [0.0, None, None]
    assert credits(["settings"], (nowhere, questions[0]), [1.0, 0.0]) == [0.5]
    two = Passage("p", "Bell", " ".join(texts), (nowhere, questions[0]))
    assert told(two) == ("Question: Where was the bell cast?\nAnswer: The bell was cast in Rolm.",)
    note_uncredited([two, about_one])
    assert "1 of 4 questions have their answer in no sentence" in capsys.readouterr().err
    note_uncredited([about_one])
    assert capsys.readouterr().err == ""


def test_what_the_quiz_says_of_a_self_edit():
    e, p = SelfEdit("p", [Part("x", flaw="endless")]), passage(0)
    credit(e, p, answered(1.0, 0.0), "logprob")
    assert e.score == {"accuracy": 0.5, "em": 0.0, "f1": 0.0, "logprob": -0.5}
    assert (e.reward, e.steps, e.loss, e.flaw) == (-0.5, 3, 0.5, "")
    credit(e, p, answered(0.0, 0.0, diverged=True), "accuracy")
    assert e.flaw == "diverged" and e.reward == 0.0
    e = SelfEdit("p", [Part("x"), Part("y")], flaw="malformed")
    credit(e, p, None, "logprob")  # it was not studied
    assert (e.reward, e.steps, e.flaw, e.score) == (-100.0, 0, "malformed", NOTHING)
    assert [part.credit for part in e.parts] == [-100.0, None]


def test_like_work_trains_side_by_side():
    """Tokens times epochs, where candidates say themselves how long."""
    example = Example((1,) * 10, (True,) * 10)
    made = []
    for name, epochs in ((0, 9), (1, 1), (2, 8), (3, 2)):
        made.append(Candidate(name, None, [example], SFTConfig(epochs=epochs)))
    assert [[c.name for c in group] for group in populations(made, 2)] == [[1, 3], [2, 0]]


def test_told_notes_ask_what_the_quiz_asks():
    questions = [Question("Who rang it?", ("Bo",)), Question("Who cast it?", ("Ada", "Ada Q"))]
    p = Passage("p", "Bell", "Ada cast it. Is it big? Bo rang it.", (*questions, questions[0]))
    assert told(p) == (
        "Question: Who rang it?\nAnswer: Bo rang it.",
        "Question: Who cast it?\nAnswer: Ada cast it.",
    )


# -----------------------------------------------------------------------------
# selection


def test_selection():
    def edits():
        found = []
        for p, reward, logprob, flaw in (
            ("a", 0.5, -3.0, ""),
            ("a", 0.5, -2.0, ""),
            ("a", 0.9, -1.0, "endless"),
            ("b", 0.2, -1.0, ""),
        ):
            part = Part("t", target="" if flaw else "t", credit=reward)
            score = {"logprob": logprob}
            found.append(SelfEdit(p, [part], reward=reward, score=score, flaw=flaw))
        return found

    best, improving, parts = edits(), edits(), edits()
    select(best, {}, "best", 6)
    assert [e.kept for e in best] == [False, True, False, True]
    assert [e.why for e in best] == ["not the best", "best", "endless", "best"]
    select(improving, {"a": 0.4, "b": 0.2}, "improving", 6)
    assert [e.kept for e in improving] == [True, True, False, False]
    assert [e.why for e in improving[1:]] == [
        "better than without it",
        "endless",
        "no better than without it",
    ]
    parts[1].parts[0].credit = 0.8  # the mean is 0.73, and the endless one cannot be imitated
    select(parts, {}, "parts", 6)
    assert [e.kept for e in parts] == [False, True, False, False]
    assert parts[3].why == "no sound part is the best"


def test_selection_by_part():
    edits = []
    for credits, targets in (
        ([1, 0, None, 1], "abcd"),
        ([0, 0, None, 1], "abcd"),
        ([1, 0.5, None, 0], ["", *"bcd"]),
    ):
        parts = [Part("t", target=t, credit=c) for t, c in zip(targets, credits)]
        edits.append(SelfEdit("a", parts, score={"logprob": 0.0}))

    def kept(e):
        return [part.kept for part in e.parts]

    select(edits, {}, "parts", 6)
    assert kept(edits[0]) == [True, False, False, True]
    assert kept(edits[1]) == [False, False, False, True]
    assert kept(edits[2]) == [False, True, False, False]
    # The others need not be better than what a diverged one would add to the mean.
    edits[0].flaw, edits[0].parts[1].credit = "diverged", 1
    select(edits, {}, "parts", 6)
    assert not edits[0].kept and edits[0].why == "diverged"
    assert kept(edits[1]) == [False, False, False, True]
    assert kept(edits[2]) == [False, True, False, False]
    edits[1].flaw = edits[2].flaw = "diverged"
    select(edits, {}, "parts", 6)
    assert [kept(e) for e in edits] == [[False] * 4] * 3


def test_of_each_part_only_the_best_is_imitated():
    edits = []
    for c in (0.9, 0.7, 0.0, 0.9):
        edits.append(SelfEdit("a", [Part("t", target="t", credit=c)], score={"logprob": 0.0}))
    select(edits, {}, "parts", 6)
    assert [e.kept for e in edits] == [True, False, False, True]  # 0.7 is above the mean, too


def test_the_notes_that_ask_most_closely_are_imitated():
    earned = {
        "Who cast it?": [0.7, 0.0, 0.2],
        "Who rang it?": [0.5, 0.6, 0.0],
        "What is it?": [0.0, 0.2, 0.29],
        "Who?": [0, 0, 0],
    }
    copied = SelfEdit("a", [Part("t", note_credits={"Copied?": [1.0, 1.0, 1.0]})])
    edits = [SelfEdit("a", [Part("t", target="t", note_credits=earned)]), copied]
    assert best_notes(edits, 0, 6) == ["Who cast it?", "Who rang it?"]  # others: below the mean
    assert best_notes(edits, 0, 1) == ["Who cast it?"]
    earned["What is it?"][2] = 0.8
    assert best_notes(edits, 0, 6) == ["What is it?", "Who cast it?", "Who rang it?"]
    edits[0].parts[0].note_credits = {note: [0.5] for note in earned}  # none is above the mean
    assert best_notes(edits, 0, 6) == [] == best_notes(edits[1:], 0, 6)


def test_what_is_kept_is_imitated():
    parts = [Part("as sampled", target="good", kept=True), Part("as sampled", target="not this")]
    edits = [SelfEdit("a", parts), SelfEdit("a", [Part("x"), Part("x", target="fine", kept=True)])]
    pairs = to_imitate({"a": ["first", "second"]}, edits, "parts", 6)
    assert pairs == [("first", "good", 1.0), ("second", "fine", 1.0)]
    parts[0].credit, edits[1].parts[1].credit = 0.9, 0.3
    weighted = to_imitate({"a": ["first", "second"]}, edits, "parts", 6, "weighted")
    assert [text for _, text, _ in weighted] == ["good", "fine"]
    assert [weight for *_, weight in weighted] == pytest.approx([1.5, 0.5])
    parts[0].credit = 0.0  # the best of its passage, and worth nothing
    weighted = to_imitate({"a": ["first", "second"]}, edits, "parts", 6, "weighted")
    assert weighted == [("second", "fine", 1.0)]
    edits[1].parts[1].credit = 0.0
    assert to_imitate({"a": ["first", "second"]}, edits, "parts", 6, "weighted") == []
    with pytest.raises(ValueError):
        to_imitate({"a": ["only one"]}, edits, "parts", 6)
