"""Passages with questions, from a JSON or JSON-lines file, which may be gzipped. The file is
{"passages": [entry, ...]}, {"data": [entry, ...]} or [entry, ...], or has an entry a line; what an
entry is shows in its keys:

    ours           {"title", "passage", "questions": [{"question", "answers": [str, ...]}]}
    SQuAD v1.1     {"title", "paragraphs": [{"context", "qas": [{"question", "answers":
                   [{"text"}]}]}]}
    SQuAD in rows  {"title", "context", "question", "answers": {"text": [str, ...]}}, as Hugging
                   Face has it; the rows with one context make one passage

An entry of ours is {"title": str, "passage": str, "questions": [question, ...]} with, optionally,
"id" (default: its number) and "split" ("train" or "heldout"; without one it belongs to both).
"context" is read as "passage". A question is {"question": str, "answers": [str, ...]} ("answer":
str will do) with, optionally, "direction": "forward" if it asks along the passage's sentence ("X
was founded by Y": who founded X?), "reversed" if against it (what did Y found?). An entry may also
have "self_edits": [str, ...], another model's notes on it, for eval_qa.py's row stronger-editor
("completions", as SEAL's own files have it, is read the same way).
"""

import codecs
import gzip
import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass

from lm.files import LARGEST, digest, parse_json, read_bytes, refuse_many
from lm.flags import at_least
from lm.runs import trained_as

LONGEST_TEXT = 50_000  # characters of a text; what is longer would take hours


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
    passages = read_passages(unzipped(read_bytes(path), path), path)
    passages = [p for p in passages if not split or p.split in ("", split)][skip:]
    if not passages:
        raise SystemExit(
            f"error: {path} has no passages"
            + f" in split {split!r}" * bool(split)
            + f" after {skip}" * bool(skip)
        )
    return passages[:limit] if limit else passages


def refuse_training_passages(passages, args) -> None:
    """Exit if the run, or a policy, was trained on some of these passages, or on nobody knows
    which, unless --split train asks for them."""
    names = ("data", "split", "skip", "limit")
    for where, before in [] if args.split == "train" else trained_as(args, *names, proxy=True):
        trained, now = load_passages(*map(before.get, names)), digest(before["data"])
        if before.get("data_sha256", now) != now:
            raise SystemExit(
                f"error: {before['data']} has changed since {where} was trained on it: on which "
                "passages is not known"
            )
        both = {p.text for p in passages} & {p.text for p in trained}
        if both:
            raise SystemExit(
                f"error: {where} was trained on {len(both)} of these passages; "
                "leave them out with --skip or --split"
            )


def read_passages(data: bytes, path) -> list[Passage]:
    """All passages in `data`, which stands in the file `path`. Exits as load_passages() does."""
    value = _json_or_lines(data, path)
    if isinstance(value, dict):
        value = value.get("passages", value.get("data"))
    if not isinstance(value, list):
        raise SystemExit(
            f"error: {path} has no list of passages (see data/qa.py for the forms that are read)"
        )
    passages = [_passage(entry, n, path) for n, entry in enumerate(_as_ours(value, path))]
    if not passages:
        raise SystemExit(f"error: {path} has no passages")
    for repeated, n in Counter(p.id for p in passages).most_common(1):
        if n > 1:
            raise SystemExit(f"error: {path}: passage id {repeated!r} occurs {n} times")
    return passages


def unzipped(data: bytes, path) -> bytes:
    """What the file `path` holds, if it is gzipped, or as it is. Exits with one line if it is
    damaged."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        data = gzip.open(io.BytesIO(data)).read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise SystemExit(f"error: cannot unzip {path}: {e}") from e
    if len(data) > LARGEST:
        raise SystemExit(f"error: cannot read {path}: unzipped it is larger than a file may be")
    return data


def _json_or_lines(data: bytes, path):
    """The JSON value in a file, or the list of those in its lines: then the first is whole."""
    data = data.removeprefix(codecs.BOM_UTF8).strip()
    if data[:1] not in (b"{", b"["):
        for form in ("Parquet", "Arrow", "CSV", "TSV", "zip"):
            if f".{form.lower()}" in str(path).lower():
                raise SystemExit(f"error: {path}: {form} is not read; write it as JSON lines")
    first = data.partition(b"\n")[0].rstrip()
    if not (first[:1] == b"{" and first[-1:] == b"}"):
        return parse_json(data, path)
    refuse_many(data, path)
    lines = map(bytes.rstrip, io.BytesIO(data))
    values = [parse_json(line, f"{path} line {n}") for n, line in enumerate(lines, 1) if line]
    return values[0] if len(values) == 1 and "title" not in values[0] else values


def _as_ours(entries: list, path) -> list:
    """The entries in our form: one for each paragraph of SQuAD with a question that has an
    answer."""
    ours, paragraphs, rows, count = [], [], {}, Counter()
    for n, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict) or not entry.keys() & {"paragraphs", "question"}:
                ours.append(entry)
            elif "paragraphs" in entry:
                for p in entry["paragraphs"]:
                    paragraphs.append((entry["title"], p["context"], p["qas"]))
            else:
                key = entry["title"], entry["context"]
                if key not in rows:
                    rows[key] = []
                    paragraphs.append((*key, rows[key]))
                rows[key].append(entry)
        except (KeyError, TypeError) as e:
            raise SystemExit(f"error: {path}: entry {n} is not SQuAD v1.1: {e!r}") from e
    for title, context, qas in paragraphs:
        try:
            entry = {"id": f"{title}-{count[title]}", "title": title.replace("_", " ")}
            questions = [qa for qa in qas if _answers(qa)]
        except (AttributeError, TypeError) as e:
            raise SystemExit(f"error: {path}: {title!r:.60} is not SQuAD v1.1: {e!r}") from e
        count[title] += 1
        if questions:
            ours.append(entry | {"passage": context, "questions": questions})
    return ours


def _answers(question: dict):
    """The accepted answers as texts, whether they are so, {"text": ...} each, or so together."""
    found = question.get("answers", [question.get("answer")])
    if isinstance(found, dict):
        found = found.get("text")
    if isinstance(found, list):
        found = [a.get("text") if isinstance(a, dict) else a for a in found]
    return found


def _passage(entry, n: int, path) -> Passage:
    where = f"error: {path}: passage {n}"
    if not isinstance(entry, dict):
        raise SystemExit(f"{where} is not an object but {entry!r:.60}")
    where += f" ({entry.get('id') or entry.get('title')!r})"
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = e.object[e.start : e.end]
        raise SystemExit(f"{where} has half of a character, {half!r}") from e
    text = entry.get("passage", entry.get("context"))
    for name, field in (("title", entry.get("title")), ("passage", text)):
        if not isinstance(field, str) or not field.strip():
            raise SystemExit(f"{where}: {name!r} must be a non-empty text")
    if len(text) > LONGEST_TEXT:
        told = f"{len(text):,} characters, of at most {LONGEST_TEXT:,}"
        raise SystemExit(f"{where}: 'passage' has {told}")
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
    answers = _answers(entry)
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        raise SystemExit(f"{where}: 'answers' must be a list of non-empty texts")
    if entry.get("direction", "") not in ("", "forward", "reversed"):
        raise SystemExit(f"{where}: 'direction' must be 'forward' or 'reversed'")
    return Question(
        entry["question"].strip(), tuple(a.strip() for a in answers), entry.get("direction", "")
    )
