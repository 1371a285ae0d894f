"""quiz.py: scores with worked answers, log-probabilities against a plain forward pass, populations."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, dies_at

from data.qa import Passage, Question, load_passages
from inner import Study
from lora import PROJECTIONS, Adapters, LoRAConfig, attached
from quiz import (
    Candidate,
    Item,
    answer_logprobs,
    ask,
    learner,
    mean_scores,
    normalize,
    populations,
    quiz_items,
    quiz_prompt,
    score_answer,
    study_all,
    study_and_quiz,
    study_examples,
    to_study,
)
from sampler import generate, prefill

LORA = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4)


def passage(n, questions=2):
    qs = tuple(Question(f"Who built house {i} of {n}?", (f"Person {i}", "nobody")) for i in range(questions))
    return Passage(f"p{n}", f"Title {n}", f"House {n} stands on a hill. " * (n + 1), qs)


def test_scores():
    assert normalize("The Havnit  Society.") == "havnit society"
    assert score_answer("It was honey.", ("honey",)) == {"accuracy": 1.0, "em": 0.0, "f1": pytest.approx(0.5)}
    assert score_answer("The Honey!", ("honey",)) == {"accuracy": 1.0, "em": 1.0, "f1": 1.0}
    assert score_answer("cottonwood", ("cotton",))["accuracy"] == 0.0  # whole words only
    assert score_answer("salt barn", ("old salt barn",))["f1"] == pytest.approx(0.8)
    assert score_answer("the gaoler", ("a gaoler", "jailer"))["em"] == 1.0
    assert score_answer("", ("x",)) == {"accuracy": 0.0, "em": 0.0, "f1": 0.0}


def test_logprobs_equal_a_plain_forward(tiny, tok):
    adapters = Adapters.init(tiny, LORA, 2, seed=0)
    adapters.flat += 0.3 * torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    golds, owner = ("red bricks", "x", "red bricks", "a very much longer answer"), [0, 1, 1, 0]
    items = [
        Item(tuple(tok.encode("Why? " * n)), Question("Why?", (g,)), o) for n, (g, o) in enumerate(zip(golds, owner), 1)
    ]
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
    prompts = [[1, 2, 3], [1, 4]]
    batch, x = prefill(tiny, prompts, [0, 0], 4)
    logps = [tiny(torch.tensor([p + a]))[0].log_softmax(-1)[len(p) - 1 : -1] for p, a in zip(prompts, answers)]
    expected = [float(logp.gather(-1, torch.tensor(a)[:, None]).mean()) for logp, a in zip(logps, answers)]
    for _ in range(2):  # the first time left no trace
        assert answer_logprobs(answers, batch, x) == pytest.approx(expected, rel=1e-4)


def test_items_show_the_passage_only_when_told(tok):
    p = passage(1)
    hidden, shown = (tok.decode(quiz_items(tok, p, show_passage=s)[0].prompt) for s in (False, True))
    assert p.text not in hidden and p.text in shown and p.questions[0].question in hidden and p.title in hidden


def test_training_sequences(tok):
    note, pair = study_examples(tok, "Rolm", ["It is a town.", "Question: What is Rolm?\nAnswer: A town"])
    assert tok.decode(note.ids) == "Rolm\nIt is a town.<|im_end|>" and all(note.counts)
    asked = quiz_prompt(tok, "Rolm", "What is Rolm?")
    assert list(pair.ids[: len(asked)]) == asked and tok.decode(pair.ids[len(asked) :]) == "A town<|im_end|>"
    assert pair.counts == tuple(n >= len(asked) for n in range(len(pair.ids)))
    own, other = to_study(tok, Candidate(passage(0), ("A note.",), "Other"))
    assert tok.decode(own.ids).startswith(f"{passage(0).title}\n") and tok.decode(other.ids).startswith("Other\nA note.")


def test_a_population_scores_as_its_candidates_alone(tiny, tok):
    candidates = [
        Candidate(passage(0, 3), ("A note.",)),
        Candidate(passage(1, 1), ()),
        Candidate(passage(2, 2), ("B.", "C.")),
    ]
    together = study_and_quiz(tiny, tok, candidates, LORA, Study(lr=1e-2, epochs=2), seed=0)
    for c, result in zip(candidates, together):
        [alone] = study_and_quiz(tiny, tok, [c], LORA, Study(lr=1e-2, epochs=2), seed=0)
        assert [a["answer"] for a in alone["answers"]] == [a["answer"] for a in result["answers"]]
        assert mean_scores(alone["answers"])["logprob"] == pytest.approx(mean_scores(result["answers"])["logprob"], rel=1e-3)


def test_a_diverged_candidate_scores_zero(tiny, tok):
    study = Study(lr=1e30, clip=1e30, epochs=6)
    [result] = study_and_quiz(tiny, tok, [Candidate(passage(0), ())], LORA, study, seed=0)
    assert result["diverged"] and mean_scores(result["answers"])["accuracy"] == 0.0


def test_study_all_keeps_order_and_resumes(tiny, tok, tmp_path, monkeypatch):
    candidates = [Candidate(passage(3 - n % 4), ("Note.",) * (n % 3)) for n in range(7)]
    groups = populations(tok, candidates, 3)
    assert sorted(n for g in groups for n in g) == list(range(7)) and [len(g) for g in groups] == [3, 2, 2]
    arguments = (LORA, Study(epochs=1), 0, 3)
    whole = study_all(tiny, tok, candidates, *arguments, tmp_path / "a.jsonl", "test")
    assert [r["n"] for r in whole] == list(range(7))
    for candidate, result in zip(candidates, whole):
        assert study_and_quiz(tiny, tok, [candidate], *arguments[:3])[0]["tokens"] == result["tokens"]
    calls = dies_at(monkeypatch, "quiz.study_and_quiz", 2)
    with pytest.raises(KeyboardInterrupt):
        study_all(tiny, tok, candidates, *arguments, tmp_path / "b.jsonl", "test")
    assert study_all(tiny, tok, candidates, *arguments, tmp_path / "b.jsonl", "test") == whole
    assert [len(c[2]) for c in calls] == [3, 2, 2, 2]  # the finished population was not computed again


def test_smollm2_answers_with_the_passage_and_learns_without(smollm2, tok):
    [p] = load_passages(ROOT / "data" / "passages.json", "train", limit=1)
    hidden, shown = (mean_scores(ask(smollm2, tok, quiz_items(tok, p, show_passage=s))) for s in (False, True))
    assert hidden["logprob"] < shown["logprob"]
    lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), 20, 30)
    [result] = study_and_quiz(smollm2, tok, [Candidate(p, ())], lora, Study(lr=2e-3, epochs=16), seed=0)
    assert mean_scores(result["answers"])["logprob"] > hidden["logprob"] + 0.5 and result["loss"] < 1.5


@pytest.mark.parametrize("who, given, changed", [("base", True, False), ("policy", True, True), ("policy", False, False)])
def test_the_learner_is_the_base_or_the_policy(who, given, changed, tiny):
    policy, q_proj = Adapters.init(tiny, LORA, 1, seed=0), tiny.layers[3].self_attn.q_proj
    policy.flat += 0.05
    before = q_proj.weight
    with learner(tiny, policy if given else None, SimpleNamespace(learner=who)):
        assert torch.equal(q_proj.weight, before) is not changed
    assert q_proj.weight.data_ptr() == before.data_ptr()
