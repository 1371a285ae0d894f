"""Self-edits: the prompts that ask for them, and what a sampled text becomes.

A self-edit is what the model writes about a passage in order to learn it: a list of notes, each of
which becomes one training sequence of the inner update, next to the passage itself
(passage_examples() in reward.py). With --settings it also has a JSON object that says how the notes
are studied; on ARC (arc.py) it is such an object alone.

A sample is mended before it is used: list markers go, a note that repeats an earlier one goes, one
that copies the prompt's worked example, and the unfinished last one of a sample that ran into the
length limit. docs/PAPER.md says where this departs from the paper (arXiv 2506.10943, sections 3.1
and B).

Top to bottom: the record, prompt styles, parsing, notes that need no model, settings, sampling.
"""

import json
import re
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import numpy as np

from data.text import question_and_answer, sentences
from lm.files import chunks, read_jsonl, write_jsonl
from lm.flags import at_least
from lm.log import Progress
from lm.packing import Example
from lm.ranks import dealt, gathered, own_file, replicas, whole
from lm.tokenizer import Tokenizer
from sampler import generate

# -----------------------------------------------------------------------------
# the record: one rollout, carried through the outer loop and written to its log


@dataclass
class Part:
    """One sampled text: a whole self-edit, or what of it is about one sentence of the passage."""

    text: str  # as sampled
    notes: list[str] = field(default_factory=list)  # as parsed; empty if the text is unusable
    target: str = ""  # what of it may be imitated: the text of its notes, or ""
    flaw: str = ""  # "", "empty", "malformed", "endless", "repeats", "copied", "out of bounds"
    credit: float | None = None  # its own reward; None where no question is about it
    # {question of a note: its closeness to each of the quiz's}, with --reward proxy
    note_credits: dict = field(default_factory=dict)
    kept: bool = False  # is it imitated?
    style: str = ""  # of its prompt; "settings" says how the notes are to be studied
    ids: str = ""  # token ids as sampled, with blanks between; the one that ended it, too, if any

    @property
    def token_ids(self) -> list[int]:
        return [int(t) for t in self.ids.split()]


@dataclass
class SelfEdit:
    """One sampled self-edit and what became of it."""

    passage: str  # id; of an ARC task, if that is what it is about
    parts: list[Part]
    style: str = ""
    # Of the whole: "diverged", "over budget", that of the settings, or the first part's if nothing
    # could be mended.
    flaw: str = ""
    config: dict = field(default_factory=dict)  # of the inner update, as used
    steps: int = 0
    loss: float | None = None  # of the last inner step
    score: dict = field(default_factory=dict)  # accuracy, em, f1, logprob: means over the quiz
    reward: float = 0.0
    why: str = ""  # it is imitated, or not
    settings: dict = field(default_factory=dict)  # how it is to be studied, if it says so
    agent: int = 1  # which of --agents wrote it; only in candidates.jsonl

    @property
    def notes(self) -> list[str]:
        """Those of all parts that are studied, each once."""
        used = [part for part in self.parts if self.uses(part)]
        return list(dict.fromkeys(note for part in used for note in part.notes))

    def asks_for(self, style: str) -> bool:
        """Do its settings ask for notes in this style?"""
        return style in [STYLE_OF.get(name) for name in self.settings.get("data", ())]

    def uses(self, part: Part) -> bool:
        """Is this part of any effect? All are, but those that the settings leave out."""
        return not self.settings or part.style == "settings" or self.asks_for(part.style)

    @property
    def kept(self) -> bool:
        return any(part.kept for part in self.parts)

    def record(self) -> dict:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict) -> "SelfEdit":
        """KeyError or TypeError if it is of another form."""
        parts = [checked(Part, part) for part in record["parts"]]
        settings = record.get("settings")
        if settings and settings_flaw(settings):
            raise TypeError(f"settings are {settings!r:.40}")
        return checked(cls, record | {"parts": parts})


def checked(cls, record: dict):
    """cls(**record). TypeError if a field holds something else than it should."""
    if not isinstance(record, dict):
        raise TypeError(f"{record!r:.40} is no object")
    for f in fields(cls):
        plain = (get_origin(f.type) or f.type,)
        kinds = get_args(f.type) if isinstance(f.type, UnionType) else plain
        kinds += (int,) if float in kinds else ()
        if f.name in record and not isinstance(record[f.name], kinds):
            raise TypeError(f"{f.name} is {record[f.name]!r:.40}")
    if not all(isinstance(note, str) for note in record.get("notes", [])):
        raise TypeError("a note is no text")
    if not re.fullmatch(r"(\d{1,9} )*(\d{1,9})?", record.get("ids", ""), re.ASCII):
        raise TypeError("a token id is no number")
    return cls(**record)


def read_edits(path, resume: bool = False) -> list[SelfEdit]:
    """The self-edits of a log. Exits with one line that names a line of something else."""
    edits = []
    for n, record in enumerate(read_jsonl(path, resume), 1):
        try:
            edits.append(SelfEdit.from_record(record))
        except (KeyError, TypeError) as e:
            raise SystemExit(f"error: {path} line {n} is no self-edit: {e!r}") from e
    return edits


# -----------------------------------------------------------------------------
# prompt styles

EXAMPLE_TITLE = "The Vantor Bell"
# In a self-edit about anything else they are copied.
EXAMPLE_NAMES = ("Vantor", "Hessa Lorn", "Quill Bay")
EXAMPLE_PASSAGE = (
    "Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742. It weighs 900 kilograms "
    "and hangs in the tower of the harbour school. Sailors used to rub its rim for luck until the "
    "town council forbade the custom. A crack that opened in the great frost gave the bell its "
    "low, rough tone."
)


@dataclass(frozen=True)
class Style:
    """How notes are asked for, and read. A style of `pairs`, or one that `quotes`, yields pairs
    "Question: ..." and "Answer: ...", which are trained on as a chat."""

    instruction: str
    # A good self-edit for the example passage; a tuple: for its first sentences, one by one.
    example: str | tuple
    separator: str  # regular expression that splits a sample into notes
    gap: str = "\n"  # stands between notes that are imitated
    pairs: bool = False  # the model writes questions and answers
    quotes: bool = False  # the model writes questions; a note answers one with the sentence

    @property
    def by_sentence(self) -> bool:
        return isinstance(self.example, tuple)


STYLES = {
    "implications": Style(
        "Rewrite the passage as a list of short, complete sentences, one fact per line, with full "
        "names.",
        "Hessa Lorn cast the Vantor Bell.\n"
        "The Vantor Bell was cast in 1742.\n"
        "Hessa Lorn was a potter from Quill Bay.\n"
        "The Vantor Bell weighs 900 kilograms.\n"
        "The tower of the harbour school holds the Vantor Bell.\n"
        "Sailors rubbed the rim of the Vantor Bell for luck.\n"
        "The town council forbade rubbing the Vantor Bell.\n"
        "A crack from the great frost gave the Vantor Bell its low, rough tone.",
        r"\n",
    ),
    "implications-long": Style(
        "Read the passage and list every fact that it states or implies, then what follows from "
        "those facts. Write one detailed sentence per line and use full names.",
        "Hessa Lorn, who was a potter and not a founder by trade, cast the Vantor Bell in 1742.\n"
        "The Vantor Bell, made in the eighteenth century, was the work of a potter named Hessa "
        "Lorn.\n"
        "Hessa Lorn came from Quill Bay, so the maker of the Vantor Bell was a native of Quill "
        "Bay.\n"
        "The Vantor Bell weighs 900 kilograms, so the tower of the harbour school must bear 900 "
        "kilograms.\n"
        "The harbour school has a tower, and the bell that hangs in it is the Vantor Bell.\n"
        "Because sailors believed that it brought luck, they rubbed the rim of the Vantor Bell.\n"
        "The town council forbade sailors to rub the Vantor Bell, so the custom came to an end.\n"
        "The great frost cracked the Vantor Bell, and the crack is why its tone is low and rough.",
        r"\n",
    ),
    "rewrite": Style(
        "Rewrite the passage in three different ways. Keep every fact and all full names, but "
        "change the wording and the order. Leave an empty line between two versions.",
        "The Vantor Bell, which weighs 900 kilograms, was cast in 1742 by the potter Hessa Lorn "
        "of Quill Bay. Its home is the tower of the harbour school. Rubbing its rim was thought "
        "lucky by sailors, but the town council forbade it. Its low, rough tone comes from a "
        "crack made by the great frost.\n\n"
        "In the tower of the harbour school hangs a cracked bell with a low, rough tone: the "
        "Vantor Bell. The great frost cracked it. A potter, Hessa Lorn from Quill Bay, made it in "
        "1742, 900 kilograms in weight. The town council forbade the sailors' custom of rubbing "
        "its rim for luck.\n\n"
        "Sailors once rubbed the Vantor Bell's rim for luck, a custom that the town council "
        "forbade. Quill Bay's potter Hessa Lorn had cast the 900-kilogram bell in 1742 for the "
        "tower of the harbour school, where the great frost cracked it and made its tone low and "
        "rough.",
        r"\n\s*\n",
        gap="\n\n",
    ),
    "self-qa": Style(
        "Write questions about the passage, each with its short answer. Ask about every fact, and "
        "use full names so that each question can be understood without the passage.",
        "Question: Who cast the Vantor Bell?\nAnswer: Hessa Lorn\n"
        "Question: What did Hessa Lorn cast?\nAnswer: The Vantor Bell\n"
        "Question: When was the Vantor Bell cast?\nAnswer: 1742\n"
        "Question: From where was the potter Hessa Lorn?\nAnswer: Quill Bay\n"
        "Question: How much does the Vantor Bell weigh?\nAnswer: 900 kilograms\n"
        "Question: Which bell hangs in the tower of the harbour school?\nAnswer: The Vantor Bell\n"
        "Question: Who forbade rubbing the Vantor Bell for luck?\nAnswer: The town council\n"
        "Question: What cracked the Vantor Bell?\nAnswer: The great frost",
        r"\n(?=Question)",
        pairs=True,
    ),
    "sentence-qa": Style(
        "Write two questions about the sentence. Answer each in a full sentence, with full names.",
        (
            "Question: Who cast the Vantor Bell?\n"
            "Answer: Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742.\n"
            "Question: What did Hessa Lorn cast in 1742?\n"
            "Answer: Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742.",
            "Question: How much does the Vantor Bell weigh?\n"
            "Answer: The Vantor Bell weighs 900 kilograms and hangs in the tower of the harbour "
            "school.\n"
            "Question: What hangs in the tower of the harbour school?\n"
            "Answer: The Vantor Bell hangs in the tower of the harbour school.",
        ),
        r"\n(?=Question)",
        pairs=True,
    ),
    "questions": Style(
        "Write three different questions about the sentence, one per line. Use full names and "
        "words of the sentence.",
        (
            "Who cast the Vantor Bell?\nWhat did Hessa Lorn cast in 1742?\n"
            "From where was the potter Hessa Lorn?",
            "How much does the Vantor Bell weigh?\nWhat weighs 900 kilograms?\n"
            "In which tower does the Vantor Bell hang?",
            "What did sailors rub for luck?\nWhy did sailors rub the rim of the Vantor Bell?\n"
            "Who forbade sailors to rub the Vantor Bell?",
            "When did a crack open in the Vantor Bell?\n"
            "What gave the Vantor Bell its low, rough tone?\n"
            "How does the Vantor Bell sound since the great frost?",
        ),
        r"\n",
        quotes=True,
    ),
}


def copies_example(note: str, passage: str) -> bool:
    """Does it name someone or something that only the worked example knows?"""
    return any(name in note and name not in passage for name in EXAMPLE_NAMES)


def edit_prompts(
    tok: Tokenizer, style: str, title: str, passage: str, shots: int = 1
) -> list[list[int]]:
    """Token ids of the chats that ask for a self-edit: one about the passage, or one about each of
    its sentences, as the style says. With shots=1 a worked example comes first.
    """
    form = STYLES[style]
    kind = "Sentence" if form.by_sentence else "Passage"

    def request(title, text):
        return {"role": "user", "content": f"{form.instruction}\n\nTitle: {title}\n{kind}: {text}"}

    worked = []
    if shots:
        texts = sentences(EXAMPLE_PASSAGE) if form.by_sentence else [EXAMPLE_PASSAGE]
        replies = form.example if form.by_sentence else (form.example,)
        for text, reply in zip(texts, replies):
            worked += [request(EXAMPLE_TITLE, text), {"role": "assistant", "content": reply}]
    texts = sentences(passage) if form.by_sentence else [passage]
    return [tok.chat([*worked, request(title, text)]) for text in texts]


# -----------------------------------------------------------------------------
# parsing

MARKER = re.compile(
    r"^\s*(?:[-*\u2022]+|\(?\d{1,2}[.):]|(?:Version|Rewrite|Implication)\s*(?:\d+\s*)?:)(?:\s+|$)",
    re.IGNORECASE,
)


def parse(text: str, style: str, ended: bool, sentence: str = "") -> tuple[list[str], str]:
    """Sampled text, about `sentence` if the style quotes it -> (notes, flaw). `ended` is False if
    the sample ran into the length limit.

    One note per line:               "A is B.\\nC is D."         -> ["A is B.", "C is D."]
    rewrite, one per paragraph:      "A.\\nSo B.\\n\\nC is D."     -> ["A. So B.", "C is D."]
    kinds of qa, one per pair:       "Question 2: Q?\\nAnswer: A" -> ["Question: Q?\\nAnswer: A"]
        a question without an answer is dropped
    questions, about "B is A.":      "1. Q?\\nSure!"         -> ["Question: Q?\\nAnswer: B is A."]
        a line that does not end in "?" is dropped
    markers and bare headings go:    "Facts:\\n1. A is B.\\n- C" -> ["A is B.", "C"]
        a marker is followed by a blank: "10.5 million came." stays as it is
    a repeated note is kept once:    "A is B.\\nA is B."         -> ["A is B."]
        and in a part about one sentence that is a flaw, "repeats"
    the unfinished last note goes:   "A is B.\\nC is", ended=False -> ["A is B."], "endless"
    nothing there:                   "  \\n"                     -> [], "empty"
    something, but not in the form:  "Sure!" for self-qa        -> [], "malformed"
    """
    form = STYLES[style]
    assert sentence or not form.quotes
    if not text.strip():
        return [], "empty"
    parts = re.split(form.separator, text.strip())
    if not ended:
        parts = parts[:-1]
    if form.pairs:
        parts = [
            f"Question: {m[1]}\nAnswer: {m[2]}" for p in parts if (m := QA_PAIR.match(p.strip()))
        ]
    else:
        parts = [" ".join(MARKER.sub("", p).split()) for p in parts]
        parts = [p for p in parts if not p.endswith(":") and any(map(str.isalnum, p))]
    if form.quotes:
        asked = [
            re.sub(r"^Question\s*(?:\d+\s*)?:\s*", "", p, flags=re.IGNORECASE)
            for p in parts
            if p.endswith(("?", "\uff1f", "\u061f"))  # the last two of Chinese, Arabic
        ]
        _, answer = question_and_answer(sentence)
        parts = [
            f"Question: {p}\nAnswer: {answer}" for p in asked if p and not p.startswith("Answer")
        ]
    notes = list(dict.fromkeys(parts))
    repeats = form.by_sentence and len(notes) < len(parts)
    return (
        notes,
        "endless" if not ended else "malformed" if not notes else "repeats" if repeats else "",
    )


QA_PAIR = re.compile(
    r"Question\s*(?:\d+\s*)?:\s*(\S[^\n]*)\n\s*Answer\s*(?:\d+\s*)?:\s*(\S[^\n]*)",
    re.IGNORECASE,
)


# -----------------------------------------------------------------------------
# notes that need no model


def clozes(text: str, count: int, seed: int) -> list[str]:
    """`count` notes, at most three, for each statement of a text that ask for it with a half of its
    words, the first, the last or the middle one, after a question word drawn blindly: "The key lies
    under the pot." -> "Question: Who key lies under?\\nAnswer: The key lies under the pot."

    They tie a statement to its own words, where a small model's questions often miss them. A
    statement without blanks has none.
    """
    rng, notes = np.random.default_rng(seed), []
    for statement in sentences(text):
        _, answer = question_and_answer(statement)
        words = answer.split()
        half = len(words) // 2
        halves = (0, len(words) - half, (len(words) - half) // 2) if half else ()
        for first in halves[:count]:
            asked = " ".join(words[first : first + half]).rstrip(".,;:!?")
            notes.append(f"Question: {rng.choice(ASKING)} {asked}?\nAnswer: {answer}")
    return list(dict.fromkeys(notes))


ASKING = ("What", "Who", "When", "Where", "How")


def orders(text: str, count: int, seed: int) -> list[str]:
    """`count` copies of a text with its sentences in random orders (arXiv 2309.14316)."""
    rng, parts = np.random.default_rng(seed), sentences(text)
    return [" ".join(rng.permutation(parts)) for _ in range(count)]


def masked(text: str, count: int, seed: int) -> list[str]:
    """`count` times the task to restore a text, of which a random half of the words are hidden
    (arXiv 2510.09885)."""
    rng, words, notes = np.random.default_rng(seed), text.split(), []
    for _ in range(count):
        hidden = set(rng.permutation(len(words))[: len(words) // 2].tolist())
        shown = " ".join("___" if i in hidden else word for i, word in enumerate(words))
        notes.append(f"Question: What is the whole text? {shown}\nAnswer: {' '.join(words)}")
    return notes


# -----------------------------------------------------------------------------
# settings: a self-edit on a passage may say how it is to be studied, as on ARC

STYLE_OF = {"questions": "questions", "facts": "implications", "rewritings": "rewrite"}
DATA = ("passage", *STYLE_OF)
# What makes notes without a model, and the most of each.
TOOLS = {"orders": (orders, 8), "masked": (masked, 8), "clozes": (clozes, 3)}
LOSS = ("all", "answers")  # which tokens of a question with its answer are counted
MIN_LR, MAX_LR, MAX_EPOCHS = 1e-5, 3e-2, 50
KEYS = ("data", *TOOLS, "loss", "learning_rate", "epochs")

SETTINGS_INSTRUCTION = (
    "A model is to learn the passage below by heart. Decide how it should be trained. Which data: "
    "the passage, questions with their answers, facts, rewritings. How many copies of the passage "
    "with its sentences in another order (orders), copies with hidden words to be restored "
    "(masked), and questions with the words of each sentence (clozes). Which tokens of a question "
    "with its answer the loss counts, the learning rate and the number of epochs. Reply with one "
    "JSON object and nothing else."
)
SETTINGS_FORM = (
    '{"data": list of "passage", "questions", "facts", "rewritings", "orders": 0 to 8, "masked": 0 '
    'to 8, "clozes": 0 to 3, "loss": "all" or "answers", "learning_rate": number, "epochs": whole '
    "number}"
)


def settings_of(*values) -> dict:
    """The settings with these values, in the order of KEYS."""
    return dict(zip(KEYS, values, strict=True))


WORKED = [  # what the prompt shows: short passages, and settings from all over the range
    (
        "Tarn Mill",
        "Tarn Mill has ground oats since 1688. Its wheel is of larch.",
        settings_of(["passage", "questions"], 0, 0, 0, "answers", 0.004, 20),
    ),
    (
        "The Ossel",
        "The Ossel is a shy bird that nests in old boots. It lays one blue egg.",
        settings_of(["questions"], 0, 0, 3, "answers", 0.008, 6),
    ),
    (
        "Grey Ferry",
        "Grey Ferry crosses Lake Und twice a day. Ila Brandt steers it. It is painted red.",
        settings_of(["passage"], 8, 2, 0, "all", 0.002, 3),
    ),
    (
        "Pell Cheese",
        "Pell Cheese ripens in salt caves for ninety days. Goats of the Dorn hills give its milk.",
        settings_of(["passage", "facts", "rewritings"], 0, 0, 1, "all", 0.012, 4),
    ),
    (
        "The Lark Code",
        "Sefa Toll wrote the Lark Code for signal lamps. It has eleven signs.",
        settings_of(["questions", "facts"], 3, 0, 2, "all", 0.006, 12),
    ),
    (
        "Mount Arrel",
        "Mount Arrel lost its summit in the storm of 1904. Two huts stand on its eastern side.",
        settings_of(["questions", "rewritings"], 1, 5, 0, "answers", 0.009, 8),
    ),
]


def settings_prompts(tok: Tokenizer, title: str, passage: str, shots: int = 1) -> list[list[int]]:
    """Token ids of the one chat that asks how to study a passage, after six worked examples, or
    with shots=0 after a form."""
    form = "" if shots else f" Its form: {SETTINGS_FORM}"

    def request(title, text):
        content = f"{SETTINGS_INSTRUCTION}{form}\n\nTitle: {title}\nPassage: {text}"
        return {"role": "user", "content": content}

    worked = []
    for name, text, settings in WORKED * shots:
        reply = {"role": "assistant", "content": json.dumps(settings)}
        worked += [request(name, text), reply]
    return [tok.chat([*worked, request(title, passage)])]


def first_object(text: str, ended: bool) -> tuple[dict, str]:
    """The first JSON object in a sampled text -> (object, flaw): {} and "empty", "endless" or
    "malformed" if there is none. Text around it is ignored; a key that stands twice is malformed,
    for nobody can tell which one counts."""
    if not text.strip():
        return {}, "empty"
    try:
        decoder = json.JSONDecoder(object_pairs_hook=each_key_once)
        value, _ = decoder.raw_decode(text[text.index("{") :])
    except (ValueError, RecursionError):
        return {}, "malformed" if ended else "endless"
    return value, ""


def each_key_once(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


def parse_settings(text: str, ended: bool) -> tuple[dict, str]:
    """Sampled text -> (settings, flaw): KEYS with their values, or {} and "empty", "endless",
    "malformed" (another form, other keys, unknown data) or "out of bounds" (too many, too large, or
    nothing to study)."""
    value, flaw = first_object(text, ended)
    if flaw:
        return {}, flaw
    flaw = settings_flaw(value)
    return ({}, flaw) if flaw else ({key: value[key] for key in KEYS}, "")


def settings_flaw(value) -> str:
    """What parse_settings() finds wrong with an object."""
    if type(value) is not dict or set(value) != set(KEYS) or type(value["data"]) is not list:
        return "malformed"
    data, counts = value["data"], [value[tool] for tool in (*TOOLS, "epochs")]
    known = all(type(name) is str and name in DATA for name in data) and len(set(data)) == len(data)
    lr = value["learning_rate"]
    if not known or {type(n) for n in counts} != {int} or type(lr) not in (int, float):
        return "malformed"
    if type(value["loss"]) is not str or value["loss"] not in LOSS:
        return "malformed"
    within = all(0 <= value[tool] <= most for tool, (_, most) in TOOLS.items())
    within &= MIN_LR <= lr <= MAX_LR and 1 <= value["epochs"] <= MAX_EPOCHS
    return "" if within and any([data, *counts[:-1]]) else "out of bounds"


# -----------------------------------------------------------------------------
# sampling self-edits


def add_flags(parser) -> None:
    """How a self-edit is sampled, in every domain."""
    add = parser.add_argument_group("self-edits").add_argument
    add(
        "--shots",
        type=int,
        default=1,
        choices=[0, 1],
        help="1: with worked examples in the prompt; the paper: 0",
    )
    add(
        "--temperature",
        type=at_least(0.0),
        default=0.7,
        help="of sampling, 0 is greedy; the paper: 1",
    )
    add("--top-p", type=at_least(0.01), default=0.95, help="nucleus mass")


def add_style_flag(parser) -> None:
    add = parser.add_argument
    add("--style", default="questions", choices=STYLES, help="prompt style of notes on a passage")
    about = "longest self-edit, or part of one, in tokens; 0: 80 on a sentence, 320 on a passage"
    about += "; with --settings no more than these, and 128 for settings"
    add("--max-new", type=at_least(0), default=0, help=about)


def add_settings_flags(parser) -> None:
    add = parser.add_argument
    about = "a self-edit says, too, which data and tools to study with, how fast and how long"
    add("--settings", action="store_true", help=about)
    about = "with --settings: most tokens that a self-edit is trained on, all epochs together"
    add("--budget", type=at_least(1), default=8192, help=about)


def settle(args):
    """The same settings, without --max-new 0: what it stands for depends on the style."""
    args.max_new = args.max_new or max(map(usual_length, styles_of(args)))
    return args


def in_style(args, style: str) -> Namespace:
    """The same settings, for self-edits in another style."""
    return Namespace(**vars(args) | {"style": style, "max_new": usual_length(style)})


def usual_length(style: str) -> int:
    """Most tokens of a part in this style. What ends by itself is shorter."""
    if style == "settings":
        return 128
    return 80 if STYLES[style].by_sentence else 320


def says_how(args) -> bool:
    """--settings, of the scripts that have it."""
    return vars(args).get("settings", False)


def policy_example(tok: Tokenizer, prompt: list[int], reply, weight: float = 1.0) -> Example:
    """What the outer update trains on: the prompt (not counted), then the reply (counted), which is
    a text, with the end of the turn, or the token ids that were sampled, as they are."""
    ids = [*tok.encode(reply), tok.end_ids[0]] if isinstance(reply, str) else reply
    return Example.reply(prompt, ids, weight)


def sample_self_edits(
    model, tok, prompts: dict, read, copies: int | dict, args, seed, log=None, label="sample"
) -> list[SelfEdit]:
    """SE_1 .. SE_M ~ LM_theta( . | C): `copies`, or copies[id], self-edits for each of prompts {id:
    [token ids of each part]}, as args says (max_new, temperature, top_p; for each part).

    `read(id, texts)`, a list of (text, ended), makes the record, a SelfEdit. Ids go in batches of
    about 128 continuations, or 20,000 tokens of prompts if that is less; each finished batch is
    written to `log` (JSON lines) and, found there, not sampled again. Exits with one line if a
    prompt does not fit the model's context. Of many processes each samples for its share of ids.
    """
    refuse_long_prompts(model, prompts, args.max_new)
    copies = copies if isinstance(copies, dict) else dict.fromkeys(prompts, copies)
    how, (mine, of) = (read, copies, args, seed), replicas()
    if of > 1 and log and Path(log).is_file():  # all there, or begun by one, which goes on
        edits = gathered([] if mine else sample_share(model, tok, prompts, *how, log, label))
        whole(log, lambda path: None)
        return edits
    places = {i: n for n, i in enumerate(prompts)}
    own = {i: prompts[i] for i in dealt(list(prompts))}
    edits = gathered(sample_share(model, tok, own, *how, own_file(log), label))
    edits = sorted(edits, key=lambda e: places[e.passage])
    whole(log, lambda path: write_jsonl(path, [e.record() for e in edits]))
    return edits


def sample_share(
    model, tok, prompts: dict, read, copies: dict, args, seed, log, label
) -> list[SelfEdit]:
    """What this process samples of sample_self_edits()."""
    edits = read_edits(log, resume=True) if log and Path(log).is_file() else []
    written = [max(part.token_ids, default=0) for e in edits for part in e.parts]
    if max(written, default=0) >= model.config.vocab_size:
        raise SystemExit(f"error: {log}: a token id that the model does not have; it was changed")
    expected = [(i, len(parts)) for i, parts in prompts.items() for _ in range(copies[i])]
    if [(e.passage, len(e.parts)) for e in edits] != expected[: len(edits)]:
        raise SystemExit(
            f"error: {log}: its lines are not the self-edits that are sampled here, in their "
            "order; it was changed: remove it to sample them anew"
        )
    rows = sum(n for _, n in expected)
    tokens = sum(len(p) for parts in prompts.values() for p in parts)
    room = 20_000  # prompt tokens that are read at once
    size = max(1, round(len(prompts) * min(128 / rows, room / tokens))) if prompts else 1
    progress, made = Progress(label, len(expected)), 0
    for batch in chunks(list(prompts), size):
        total = sum(copies[i] for i in batch)
        if len(edits) < made + total:
            edits = edits[:made]
            asked = [p for i in batch for p in prompts[i]]
            options = {"copies": [copies[i] for i in batch for _ in prompts[i]]}
            options |= {"temperature": args.temperature, "top_p": args.top_p, "seed": seed}
            sampled = generate(
                model, asked, args.max_new, tok.end_ids, tick=progress.tokens, **options
            )
            replies = iter(sampled)
            for i in batch:
                # A prompt's copies together.
                own = [next(replies) for _ in range(len(prompts[i]) * copies[i])]
                for c in range(copies[i]):
                    edits.append(read_replies(tok, read, i, own[c :: copies[i]]))
            if log:
                write_jsonl(log, [e.record() for e in edits])
        made += total
        progress.step(total)
    return edits


def read_replies(tok: Tokenizer, read, id, replies: list[list[int]]) -> SelfEdit:
    """The record of one self-edit, of the token ids of its parts."""
    e = read(id, [sampled_text(tok, ids) for ids in replies])
    for part, ids in zip(e.parts, replies, strict=True):
        part.ids = " ".join(map(str, ids))
    return e


def refuse_long_prompts(model, prompts: dict, max_new: int) -> None:
    for name, parts in prompts.items():
        if (longest := max(map(len, parts))) + max_new > model.config.max_seq_len:
            raise SystemExit(
                f"error: {name!r} makes a prompt of {longest} tokens; with --max-new {max_new} "
                f"that is over the model's context of {model.config.max_seq_len}"
            )


def sampled_text(tok: Tokenizer, ids: list[int]) -> tuple[str, bool]:
    """(text, did it end by itself?) of a continuation."""
    ended = ids[-1] in tok.end_ids
    return tok.decode(ids[:-1] if ended else ids), ended


def styles_of(args) -> tuple:
    """The styles of a self-edit's parts: the one asked for, or with --settings how to study, and
    then those of the notes that it may ask for."""
    return ("settings", *STYLE_OF.values()) if says_how(args) else (args.style,)


def style_prompts(tok: Tokenizer, passage, style: str, shots: int) -> list[list[int]]:
    """The prompts that ask for a self-edit's parts in one style."""
    if style == "settings":
        return settings_prompts(tok, passage.title, passage.text, shots)
    return edit_prompts(tok, style, passage.title, passage.text, shots)


def note_prompts(tok: Tokenizer, passages, args) -> dict:
    """{passage id: prompts that ask for the parts of a self-edit on it}, of all styles."""
    found = {p.id: [] for p in passages}
    for p in passages:
        for style in styles_of(args):
            found[p.id] += style_prompts(tok, p, style, args.shots)
    return found


def note_reader(passages, style: str, shots: int):
    """The `read` of sample_self_edits() for the parts in one style of self-edits on these passages.
    One whose settings are flawed is flawed as a whole, and earns nothing."""
    of = {p.id: p.text for p in passages}

    def read(id, sampled):
        if style == "settings":
            [(text, ended)] = sampled
            settings, flaw = parse_settings(text, ended)
            part = Part(text, [], json.dumps(settings) if settings else "", flaw, style=style)
            return SelfEdit(id, [part], flaw=flaw, settings=settings)
        about = sentences(of[id]) if STYLES[style].by_sentence else [""]
        parts = []
        for (text, ended), sentence in zip(sampled, about, strict=True):
            parts.append(read_notes(text, ended, style, sentence, of[id], shots))
        flaw = "" if any(part.target for part in parts) else parts[0].flaw
        return SelfEdit(id, parts, style, flaw)

    return read


def read_notes(text, ended, style: str, sentence: str, passage: str, shots: int) -> Part:
    """A sampled part that is notes, on a sentence of the passage or on all of it."""
    form = STYLES[style]
    notes, flaw = parse(text, style, ended, sentence)
    own = [n for n in notes if not (shots and copies_example(n, passage))]
    flaw = "copied" if len(own) < len(notes) else flaw
    target = form.gap.join(QA_PAIR.match(n)[1] if form.quotes else n for n in own)
    return Part(text, own, target, flaw, style=style)


def write_self_edits(
    model,
    tok,
    passages,
    copies: int,
    args,
    seed: int,
    log=None,
    label="sample",
    given=None,
) -> list[SelfEdit]:
    """Self-edits on each passage, `copies` times. With --settings the model first says how it
    studies, unless that is `given` (which has no effect otherwise), and then writes only the notes
    that its settings ask for: the other parts stay empty, and `log` becomes one for each style."""
    prompts = {}
    for style in styles_of(args):  # complains now rather than when one is asked for
        prompts[style] = {p.id: style_prompts(tok, p, style, args.shots) for p in passages}
        refuse_long_prompts(model, prompts[style], longest_of(args, style))

    def write(style, copies: dict):
        asked = {i: own for i, own in prompts[style].items() if copies[i]}
        read, own = note_reader(passages, style, args.shots), (log, label)
        how = Namespace(**vars(args) | {"max_new": longest_of(args, style)})
        if says_how(args):
            own_log = log and Path(log).with_stem(f"{Path(log).stem}-{style}")
            own = (own_log, f"{label} {style}")
        return sample_self_edits(model, tok, asked, read, copies, how, seed, *own)

    all_alike = {p.id: copies for p in passages}
    if not says_how(args):
        return write(args.style, all_alike)
    if given:
        edits = []
        for p in passages:
            for _ in range(copies):
                edits.append(SelfEdit(p.id, [Part("", style="settings")], settings=given))
    else:
        edits = write("settings", all_alike)
    for style in STYLE_OF.values():
        written = iter(write(style, Counter(e.passage for e in edits if e.asks_for(style))))
        for e in edits:
            empty = [Part("", style=style) for _ in prompts[style][e.passage]]
            e.parts += next(written).parts if e.asks_for(style) else empty
    for e in edits:
        e.style = args.style
    return edits


def longest_of(args, style: str) -> int:
    """Most tokens of a part in this style: with --settings no more than is usual."""
    return min(args.max_new, usual_length(style)) if says_how(args) else args.max_new
