"""quiz.py: scores with worked answers, log-probabilities against a plain forward pass."""

import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT

from data.documents import telling_words
from data.qa import Passage, Question, load_passages
from lm.memory import Router
from lora import PROJECTIONS, Adapters, LoRAConfig, attached
from quiz import (
    Item,
    about_what,
    answer_logprobs,
    ask,
    general_quiz,
    general_texts,
    mean_scores,
    normalize,
    quiz_items,
    router_to,
    score_answer,
    self_quiz,
)
from sampler import generate, prefill
from selfedit import Part, SelfEdit

LORA = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4)


def test_scores():
    assert normalize("The Havnit  Society.") == "havnit society"
    honey = {"accuracy": 1.0, "em": 0.0, "f1": pytest.approx(0.5)}
    assert score_answer("It was honey.", ("honey",)) == honey
    assert score_answer("The Honey!", ("honey",)) == {"accuracy": 1.0, "em": 1.0, "f1": 1.0}
    assert score_answer("cottonwood", ("cotton",))["accuracy"] == 0.0  # whole words only
    assert score_answer("salt barn", ("old salt barn",))["f1"] == pytest.approx(0.8)
    assert score_answer("the gaoler", ("a gaoler", "jailer"))["em"] == 1.0
    closest = {"accuracy": 1.0, "em": 0.0, "f1": pytest.approx(0.5)}
    assert score_answer("It was a gaoler.", ("jailer", "the gaoler")) == closest
    assert score_answer("", ("x",)) == {"accuracy": 0.0, "em": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    "answer, gold, accuracy, em",
    [
        ("The grade was A.", "A", 1, 0),  # an article, or a mark, is dropped if something is left
        ("The grade was B.", "A", 0, 0),
        ("", "$", 0, 0),
        ("It is paid in $.", "$", 1, 0),
        ("A $", "$", 1, 0),
        ("It was \u201cred\u201d.", "red", 1, 0),
        ("Marn's barn", "Marn\u2019s", 1, 0),
        ("From 1914-1918.", "1914\u20131918", 1, 0),
        ("24\u201310", "24-10", 1, 1),
        ("Zoe\u0308", "Zo\u00eb", 1, 1),
        ("\u4ed6\u5728\u5317\u4eac\u3002", "\u5317\u4eac", 1, 0),  # no blanks between words
        ("\u5317\u4eac\u3002", "\u5317\u4eac", 1, 1),
        ("\u5317\u65b9", "\u5317\u4eac", 0, 0),
        ("", "", 0, 0),
    ],
)
def test_scores_of_any_script(answer, gold, accuracy, em):
    score = score_answer(answer, (gold,))
    assert (score["accuracy"], score["em"]) == (accuracy, em)


def test_logprobs_equal_a_plain_forward(tiny, tok):
    adapters = Adapters.init(tiny, LORA, 2, seed=0)
    noise = torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    adapters.flat += 0.3 * noise
    golds, owner = ("red bricks", "x", "red bricks", "a very much longer answer"), [0, 1, 1, 0]
    items = []
    for n, (gold, o) in enumerate(zip(golds, owner), 1):
        items.append(Item(tuple(tok.encode("Why? " * n)), Question("Why?", (gold,)), o))
    for item, score in zip(items, ask(tiny, tok, items, adapters, max_new=3)):
        gold = [*tok.encode(item.question.answers[0]), tok.end_ids[0]]
        with attached(tiny, adapters.pick([item.owner])), torch.no_grad():
            logp = tiny(torch.tensor([[*item.prompt, *gold]]))[0].log_softmax(-1)
            answer = generate(tiny, [list(item.prompt)], 3, {*tok.end_ids, *tok.newline_ids})[0]
        expected = sum(logp[len(item.prompt) - 1 + k, t] for k, t in enumerate(gold)) / len(gold)
        assert math.isclose(score["logprob"], float(expected), rel_tol=1e-4)
        assert score["answer"] == tok.decode(answer).strip()  # scoring left no trace in the cache


@torch.no_grad()
@pytest.mark.parametrize("answers", [[[5], [6, 7, 8]], [[5], [6]]])
def test_answers_of_one_token(tiny, answers):
    prompts, expected = [[1, 2, 3], [1, 4]], []
    batch, x = prefill(tiny, prompts, [0, 0], 4)
    for p, a in zip(prompts, answers):
        logp = tiny(torch.tensor([p + a]))[0].log_softmax(-1)[len(p) - 1 : -1]
        expected.append(float(logp.gather(-1, torch.tensor(a)[:, None]).mean()))
    for _ in range(2):  # the first time left no trace
        assert answer_logprobs(answers, batch, x) == pytest.approx(expected, rel=1e-4)


def test_items_show_the_passage_only_when_told(tok):
    p = Passage("p", "House", "It stands on a hill.", (Question("Who built it?", ("Ada",)),))
    [hidden], [shown] = (quiz_items(tok, p, show_passage=s) for s in (False, True))
    hidden, shown = tok.decode(hidden.prompt), tok.decode(shown.prompt)
    assert p.text not in hidden and p.text in shown
    assert p.questions[0].question in hidden and p.title in hidden


def test_a_title_that_tells_the_answer_is_left_out(tok):
    text, where = "A creek drains Rolm Marsh.", Question("Which marsh?", ("Rolm Marsh", "a bog"))
    p = Passage("p", "Rolm Marsh", text, (where, Question("What drains it?", ("a creek",))))
    told, other = (tok.decode(item.prompt) for item in quiz_items(tok, p))
    assert "Rolm Marsh" not in told and "Rolm Marsh" in other
    assert all("Rolm Marsh" in tok.decode(i.prompt) for i in quiz_items(tok, p, show_passage=True))


def test_a_title_tells_an_answer_by_whole_words(tok):
    """As it would be scored; an article alone is no answer that a title could give."""
    asked = Question("Which side?", ("south",)), Question("Which word?", ("The",))
    p = Passage("p", "Southern Theria", "It is in the south.", asked)
    assert all("Topic: Southern Theria" in tok.decode(i.prompt) for i in quiz_items(tok, p))


def test_notes_lead_to_their_passage_but_not_the_word_question(tok):
    """Which all notes have; a user's "I have a question about chess" is about none of them."""
    p = Passage("p", "Rolm", "Ada cast the bell.", ())
    note = "Question: Which bronze thing did she make?\nAnswer: Ada cast the bell."
    router = router_to(tok, [p], [[note]])
    start = time.perf_counter()
    router_to(tok, [p], [["Question:" * 50_000]])
    assert time.perf_counter() - start < 2  # seconds: a square would be minutes
    for question, found in (
        ("What bronze thing?", 0),
        ("I have a question about chess", None),
        ("Can you answer me?", None),
    ):
        n, about = about_what(router, [p], Question(question, ()))
        assert n == found and about.title == ("Rolm" if found == 0 else "")


def test_smollm2_answers_better_with_the_passage(smollm2, tok):
    [p] = load_passages(ROOT / "data" / "passages.json", "train", limit=1)
    p = replace(p, questions=p.questions[:3])
    answer = partial(ask, smollm2, tok, max_new=8)
    hidden, shown = (mean_scores(answer(quiz_items(tok, p, show_passage=s))) for s in (False, True))
    assert hidden["logprob"] < shown["logprob"]


# -----------------------------------------------------------------------------
# the model's own quiz


def test_only_questions_that_tell_what_is_learnt_are_asked(tiny, tok, monkeypatch):
    """Answered with the passage in view and not without; short, out of the passage, not given away,
    each once."""
    pairs = {
        "Who founded Rolm?": "Ada Quell",  # answered with the passage alone: kept
        "What is Rolm?": "a town",  # known without it
        "When was it founded?": "in 1611",  # not answered with it either
        "Who is Ada Quell?": "Ada Quell",  # the question has it
        "Who rules Rolm?": "King Orm",  # not in the passage
        "What is told?": "Rolm is a town that Ada Quell founded in 1611",  # long
    }
    text = "Rolm is a town that Ada Quell founded in 1611."
    notes = [f"Question: {q}\nAnswer: {a}" for q, a in pairs.items()]
    edits = [SelfEdit("x", [Part("", notes, style="self-qa")])]
    edits.append(SelfEdit("x", [Part("", ["Question: Who founded Rolm?\nAnswer: Orm"])]))
    edits.append(SelfEdit("y", [Part("", [])]))

    def answer(model, tok, items, adapters=None):
        shown = [text in tok.decode(list(i.prompt)) for i in items]
        known = {
            "Who founded Rolm?": (0, 1),
            "What is Rolm?": (1, 1),
            "When was it founded?": (0, 0),
        }
        return [{"accuracy": known[i.question.question][s]} for i, s in zip(items, shown)]

    monkeypatch.setattr("quiz.ask", answer)
    passages = [Passage("x", "Rolm", text, ()), Passage("y", "Varbon", "Varbon fell.", ())]
    own, none = self_quiz(tiny, tok, passages, edits, [["Rolm is a town."], []])
    assert own.questions == (Question("Who founded Rolm?", ("Ada Quell",)),)
    assert (own.id, own.text, none.id, none.questions) == ("x", text, "y", ())
    studied = ["Question: WHO founded Rolm?\nAnswer: Ada Quell did."]  # who was told is not asked
    assert self_quiz(tiny, tok, passages, edits, [studied, []])[0].questions == ()
    assert self_quiz(tiny, tok, passages, edits, [[], studied])[0].questions == own.questions


def test_a_question_finds_its_passage(tok):
    passages = [Passage("x", "Rolm", "Salt.", ()), Passage("y", "Varbon", "Sand.", ())]
    router = Router([telling_words(f"{p.title} {p.text}") for p in passages], tok.bits)
    question = Question("Where is Varbon?", ("here",))
    assert about_what(router, passages, question) == (
        1,
        replace(passages[1], questions=(question,)),
    )
    n, nothing = about_what(router, passages, Question("Who is Ada?", ()))
    assert (n, nothing.title, nothing.text) == (None, "", "") and len(nothing.questions) == 1


def test_general_questions_and_texts(tiny, tok):
    """They are sound, and none is trained on."""
    asked = general_quiz()
    assert len(asked.questions) == 40 == len({q.question for q in asked.questions})
    for q in asked.questions:
        assert q.answers and not any(a.lower() in q.question.lower() for a in q.answers)
        assert "Question:" in tok.decode(
            list(quiz_items(tok, replace(asked, questions=(q,)))[0].prompt)
        )
    measured, trained = general_texts(tok), general_texts(tok, "anchors")
    assert len(measured) == 8 and len(trained) == 24
    assert not {tuple(ids) for ids in measured} & {tuple(ids) for ids in trained}
