"""Passages with questions, from one of three JSON forms. The form is recognised by its keys.

    ours         {"passages": [entry, ...]} or just [entry, ...]
    SQuAD v1.1   {"data": [{"title", "paragraphs": [{"context", "qas": [{"question", "answers":
                 [{"text"}]}]}]}]}

An entry of ours is {"title": str, "passage": str, "questions": [question, ...]} with, optionally,
"id" (default: its number) and "split" ("train" or "heldout"; without one it belongs to both).
"context" is read as "passage". A question is {"question": str, "answers": [str, ...]} ("answer":
str will do) with, optionally, "direction": "forward" if it asks along the passage's sentence ("X
was founded by Y": who founded X?), "reversed" if against it (what did Y found?). An entry may also
have "self_edits": [str, ...], another model's notes on it, for eval_qa.py's row stronger-editor
("completions", as SEAL's own files have it, is read the same way).
"""

from collections import Counter
from dataclasses import dataclass

from lm.files import read_json_value
from lm.flags import at_least


@dataclass(frozen=True)
class Question:
    question: str
    answers: tuple  # accepted answers, the first one is the reference for log-probabilities
    direction: str = ""


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str
    questions: tuple
    split: str = ""
    self_edits: tuple = ()  # another model's


def add_flags(parser, split: str = "train", limit: int = 0) -> None:
    add = parser.add_argument_group("passages").add_argument
    add("--data", default="data/passages.json", help="passages with questions")
    add("--split", default=split, help='"heldout", "train" or "" for all')
    add("--skip", type=at_least(0), default=0, help="leave out the first N passages")
    add("--limit", type=at_least(0), default=limit, help="use at most N passages, 0: all")


def counts(passages: list[Passage]) -> dict:
    """How many passages and questions, as result files say."""
    questions = sum(len(p.questions) for p in passages)
    return {"n_passages": len(passages), "n_questions": questions}


def load_passages(path, split: str = "", skip: int = 0, limit: int = 0) -> list[Passage]:
    """The passages of `path` in the given split ("" for all), without the first `skip`, at most
    `limit` (0: all).

    Exits with one line that names the file and the entry if it is missing, malformed or empty.
    """
    value = read_json_value(path)
    if isinstance(value, dict) and "data" in value:
        value = list(_flatten_squad(value["data"], path))
    elif isinstance(value, dict):
        value = value.get("passages")
    if not isinstance(value, list):
        raise SystemExit(
            f"error: {path} has no list of passages (see data/qa.py for the forms that are read)"
        )
    passages = [_passage(entry, n, path) for n, entry in enumerate(value)]
    for repeated, n in Counter(p.id for p in passages).most_common(1):
        if n > 1:
            raise SystemExit(f"error: {path}: passage id {repeated!r} occurs {n} times")
    passages = [p for p in passages if not split or p.split in ("", split)][skip:]
    if not passages:
        raise SystemExit(
            f"error: {path} has no passages"
            + f" in split {split!r}" * bool(split)
            + f" after {skip}" * bool(skip)
        )
    return passages[:limit] if limit else passages


def _flatten_squad(articles, path):
    try:
        for article in articles:
            for n, paragraph in enumerate(article["paragraphs"]):
                questions = []
                for qa in paragraph["qas"]:
                    if answers := [a["text"] for a in qa["answers"]]:
                        questions.append({"question": qa["question"], "answers": answers})
                entry = {
                    "id": f"{article['title']}-{n}",
                    "title": article["title"].replace("_", " "),
                }
                if questions:
                    yield entry | {"passage": paragraph["context"], "questions": questions}
    except (KeyError, TypeError, AttributeError) as e:
        raise SystemExit(f"error: {path} is not SQuAD v1.1: {e!r}") from e


def _passage(entry, n: int, path) -> Passage:
    where = f"error: {path}: passage {n}"
    if not isinstance(entry, dict):
        raise SystemExit(f"{where} is not an object but {entry!r:.60}")
    where += f" ({entry.get('id') or entry.get('title')!r})"
    text = entry.get("passage", entry.get("context"))
    for name, field in (("title", entry.get("title")), ("passage", text)):
        if not isinstance(field, str) or not field.strip():
            raise SystemExit(f"{where}: {name!r} must be a non-empty text")
    if entry.get("split", "") not in ("", "train", "heldout"):
        raise SystemExit(f"{where}: 'split' must be 'train' or 'heldout', not {entry['split']!r}")
    if not isinstance(entry.get("questions"), list) or not entry["questions"]:
        raise SystemExit(f"{where}: 'questions' must be a list with at least one question")
    questions = tuple(
        _question(q, f"{where}, question {i}") for i, q in enumerate(entry["questions"])
    )
    edits = entry.get("self_edits", entry.get("completions", []))
    if not isinstance(edits, list) or not all(isinstance(e, str) for e in edits):
        raise SystemExit(f"{where}: 'self_edits' must be a list of texts")
    return Passage(
        str(entry.get("id", n)),
        entry["title"].strip(),
        text.strip(),
        questions,
        entry.get("split", ""),
        tuple(edits),
    )


def _question(entry, where: str) -> Question:
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
        raise SystemExit(f"{where}: must be an object with a 'question'")
    answers = entry.get("answers", [entry.get("answer")])
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        raise SystemExit(f"{where}: 'answers' must be a list of non-empty texts")
    return Question(
        entry["question"].strip(), tuple(a.strip() for a in answers), entry.get("direction", "")
    )
