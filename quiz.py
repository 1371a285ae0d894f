"""The quiz: ask the model about passages that it does not see, under many adapters at once, and
score the answers.

Scores per question (all from 0 to 1, except logprob):
    accuracy   1 if an accepted answer stands in the model's answer as whole words, after SQuAD's
               normalisation, extended to other scripts than Latin: forms()
    em         1 if the model's answer equals an accepted answer, normalised
    f1         overlap of normalised words with the closest accepted answer
    logprob    mean log-likelihood per token of the first accepted answer as the whole reply (0 is
               certain)

Models answer in sentences, as asked, so em stays near 0 and logprob, which wants the bare answer,
is only comparable between candidates. The paper has GPT-4.1 judge the answers; these scores need no
judge.
"""

import functools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.documents import telling_words
from data.qa import Passage, Question
from data.text import UNSPACED
from lm.files import chunks, read_json
from lm.memory import Router
from lm.tokenizer import Tokenizer
from lora import Adapters
from model import Transformer
from sampler import Batch, generate
from selfedit import QA_PAIR

# -----------------------------------------------------------------------------
# scoring


@functools.lru_cache(10_000)
def forms(text: str) -> tuple:
    """A text as it is compared, three times, less and less of it left out: "The $5 coin." ->
    ("5 coin", "the 5 coin", "the $5 coin.").

    First as SQuAD has it, case folded, without punctuation and articles, but for any script:
    composed characters (NFC), Unicode's punctuation and symbols, "他在家。" -> "他 在 家".
    """
    whole = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    plain = "".join(c for c in whole if unicodedata.category(c)[0] not in "PS")
    plain = UNSPACED.sub(r" \g<0> ", plain)
    bare = re.sub(r"\b(a|an|the)\b", " ", plain)
    return tuple(" ".join(form.split()) for form in (bare, plain, whole))


def normalize(text: str) -> str:
    """The first of its forms() of which something is left: "The Havnit Society." -> "havnit
    society", "A" -> "a", "$" -> "$"."""
    return next(filter(None, forms(text)), "")


def f1(answer: str, gold: str) -> float:
    """Word overlap of two normalised texts: "salt barn" against "old salt barn" is
    2 * 1 * (2/3) / (1 + 2/3) = 0.8."""
    a, g = answer.split(), gold.split()
    common = sum((Counter(a) & Counter(g)).values())
    return 2 * common / (len(a) + len(g)) if common else float(a == g)


def score_answer(answer: str, golds: tuple) -> dict:
    """{"accuracy", "em", "f1"} of one answer: the best over the accepted ones, each compared in the
    first of its forms() of which something is left. "It was honey." scores accuracy 1, em 0 against
    "honey"."""
    best = {"accuracy": 0.0, "em": 0.0, "f1": 0.0}
    for gold in golds:
        for a, g in zip(forms(answer), forms(gold)):
            if g:
                inside = f" {g} " in f" {a} " or (g in a and not any(map(str.isalnum, g)))
                found = {"accuracy": float(inside), "em": float(a == g), "f1": f1(a, g)}
                best = {name: max(best[name], found[name]) for name in best}
                break
    return best


def mean_scores(scores: list[dict]) -> dict:
    """The mean of each score over questions."""
    means = {}
    for name in ("accuracy", "em", "f1", "logprob"):
        means[name] = float(np.mean([s[name] for s in scores]))
    return means


# -----------------------------------------------------------------------------
# asking


ANSWER_LEN = 48  # most tokens of an answer; nearly every sentence of a passage fits


@dataclass(frozen=True)
class Item:
    """One question to ask, under candidate `owner`'s adapter."""

    prompt: tuple
    question: Question
    owner: int = 0


def quiz_prompt(tok: Tokenizer, title: str, question: str, passage: str = "") -> list[int]:
    """Token ids of the chat that asks one question; with `passage` it stands in front, without it
    the model must know.

    The paper (section B.1) prompts a base model to answer directly. A 135M chat model recalls more
    when it may answer in the form that it was trained on, a sentence, and `accuracy` looks for the
    answer inside it.
    """
    about = f"{title}\n{passage}\n\nQuestion about the text above" if passage else ""
    about = about or (f"Topic: {title}\nQuestion" if title else "Question")
    content = f"{about}: {question}\nAnswer in one short sentence."
    return tok.chat([{"role": "user", "content": content}])


def quiz_items(
    tok: Tokenizer, passage: Passage, owner: int = 0, show_passage: bool = False
) -> list[Item]:
    """All questions about one passage, for candidate `owner`. A title that gives the answer away is
    left out.

    "Which marsh is drained by the Luhamwe creek?" is not asked under the topic "Rewanjolo Marsh".
    """
    items = []
    for q in passage.questions:
        told = score_answer(passage.title, q.answers)["accuracy"] > 0
        title = "" if told and not show_passage else passage.title
        prompt = quiz_prompt(tok, title, q.question, passage.text if show_passage else "")
        items.append(Item(tuple(prompt), q, owner))
    return items


def ask(
    model: Transformer,
    tok: Tokenizer,
    items: list[Item],
    adapters: Adapters | None = None,
    max_new: int = ANSWER_LEN,
) -> list[dict]:
    """Greedy answers to all items in one batch, scored: {"answer", "accuracy", "em", "f1",
    "logprob"} per item."""
    golds = [[*tok.encode(i.question.answers[0]), tok.end_ids[0]] for i in items]
    logprobs = {}

    def score_golds(order, batch, x):
        logprobs.update(zip(order, answer_logprobs([golds[i] for i in order], batch, x)))

    # The accepted answer is read behind the prompt, too, so it has to fit the context.
    ends, room = {*tok.end_ids, *tok.newline_ids}, max(max_new, *map(len, golds))
    outputs = generate(
        model,
        [list(i.prompt) for i in items],
        room,
        ends,
        adapters=adapters,
        owner=[i.owner for i in items],
        on_prefill=score_golds,
    )
    scores = []
    for n, (item, ids) in enumerate(zip(items, outputs)):
        answer = tok.decode([t for t in ids[:max_new] if t not in tok.end_ids])
        answer = answer.strip().split("\n")[0]
        score = score_answer(answer, item.question.answers)
        scores.append({"answer": answer, **score, "logprob": logprobs[n]})
    return scores


def answer_logprobs(answers: list[list[int]], batch: Batch, x) -> list[float]:
    """Mean log-likelihood per token of answers[n] as continuation of row n of the batch (teacher
    forcing).

    x (R, C) are the states of the rows' last tokens, as prefill() returns them. The answers are
    read and taken back: decoding can go on from the same prompts.
    """
    # The prompt's last token predicts the first of the answer, whose last one predicts nothing.
    inputs, states = [a[:-1] for a in answers], x
    if longest := max(map(len, inputs)):
        batch.extend(longest)
        states = torch.cat([x, batch.read(inputs)])
        batch.take_back(longest)
    first = np.cumsum([len(x), *map(len, inputs)]).tolist()  # where the states of each answer start
    at = []
    for n, ids in enumerate(inputs):
        at += [n, *range(first[n], first[n] + len(ids))]
    target = torch.tensor([t for a in answers for t in a], device=x.device)
    logp = batch.model.head(states[at]).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    return [float(part.mean()) for part in logp.split(list(map(len, answers)))]


def accuracies(model, tok, items: list[Item], adapters=None, batch: int = 64) -> list[float]:
    """The accuracy of each answer, asked `batch` at a time, so that memory does not grow."""
    found = []
    for some in chunks(items, batch):
        found += [a["accuracy"] for a in ask(model, tok, some, adapters)]
    return found


def of_passages(model, tok, passages: list[Passage], adapters=None, items=None) -> list[float]:
    """Accuracy on each passage's quiz; `items`: all their questions in order, if they are asked in
    another way than quiz_items() has it."""
    items = items or [item for p in passages for item in quiz_items(tok, p)]
    return means_of(passages, accuracies(model, tok, items, adapters))


def means_of(passages: list[Passage], right: list[float]) -> list[float]:
    """Of each passage the mean over its questions; right: a value for each, passage by passage."""
    ends = np.cumsum([len(p.questions) for p in passages])[:-1]
    return [float(own.mean()) for own in np.split(np.array(right), ends)]


def router_to(tok: Tokenizer, passages: list[Passage], notes: list[list[str]]) -> Router:
    """Finds the one of these passages that a question is about, by its title, its text, and what
    its notes ask and answer."""
    texts = []
    for p, own in zip(passages, notes, strict=True):
        pairs = [QA_PAIR.fullmatch(note) for note in own]
        # Else all notes say "question".
        said = [" ".join(pair.groups()) if pair else note for note, pair in zip(own, pairs)]
        texts.append(telling_words("\n".join([p.title, p.text, *said])))
    return Router(texts, tok.bits)


def about_what(router: Router, passages: list[Passage], question: Question):
    """The number of the passage that the router finds for a question, and that passage with it as
    its quiz; None and a passage without title and text if it finds none."""
    n = router.best(telling_words(question.question))
    return n, replace(Passage("", "", "", ()) if n is None else passages[n], questions=(question,))


# -----------------------------------------------------------------------------
# a quiz that the model writes itself


def self_quiz(
    model: Transformer, tok: Tokenizer, passages: list[Passage], edits, notes: list[list[str]]
) -> list[Passage]:
    """The passages, each with the questions of the self-edits on it (style self-qa) that can tell
    what is learnt: those that none of its notes[passage] asks, and that the model, as it is,
    answers with the passage in view and not without. Their answers are short, stand in the passage,
    and do not stand in the question."""
    written = {p.id: {} for p in passages}
    for e in edits:
        for note in e.notes:
            written[e.passage].setdefault(*QA_PAIR.fullmatch(note).groups())
    asked = []
    for p, studied in zip(passages, notes, strict=True):
        trained, own = {m[1].casefold() for m in map(QA_PAIR.fullmatch, studied) if m}, []
        for q, a in written[p.id].items():
            if q.casefold() not in trained and is_short_answer(q, a, p.text):
                own.append(Question(q, (a,)))
        asked.append(replace(p, questions=tuple(own)))
    right = {}
    for shown in (True, False):
        items = [item for p in asked for item in quiz_items(tok, p, show_passage=shown)]
        right[shown] = iter(accuracies(model, tok, items))
    found = []
    for p in asked:
        told = [next(right[True]) > next(right[False]) for _ in p.questions]
        kept = [q for q, tells in zip(p.questions, told) if tells]
        found.append(replace(p, questions=tuple(kept)))
    return found


def is_short_answer(question: str, answer: str, passage: str) -> bool:
    """Is it an answer of eight words or fewer (of scripts without blanks 24 characters), out of the
    passage, that the question does not give away?"""
    inside = [score_answer(text, (answer,))["accuracy"] for text in (passage, question)]
    length = max(len(answer.split()), len(UNSPACED.findall(answer)) / 3)
    return length <= 8 and inside == [1.0, 0.0]


# -----------------------------------------------------------------------------
# what has nothing to do with any passage

GENERAL = Path(__file__).with_name("data") / "general.json"


def general_quiz() -> Passage:
    """Questions that anyone may ask, as a passage without text."""
    questions = []
    for q in read_json(GENERAL)["questions"]:
        questions.append(Question(q["question"], tuple(q["answers"])))
    return Passage("general", "", "", tuple(questions))


def general_texts(tok: Tokenizer, name: str = "texts") -> list[list[int]]:
    """Token ids of texts that anyone may write: "texts" are to be measured on, "anchors" to be
    trained on."""
    return [[*tok.begin, *tok.encode(text)] for text in read_json(GENERAL)[name]]
