"""Self-edits: the prompts that ask for them, and what a sampled text becomes.

A self-edit is what the model writes about a passage in order to learn it. Here it is a list of notes; each note becomes
one training sequence of the inner update, next to the passage itself (study_examples() in quiz.py).

How this departs from the paper (arXiv 2506.10943, sections 3.1 and B):
 1. The prompts are worded anew, for a chat model, and by default show one worked example: without it a 135M model
    answers with chatter, with it it lists facts.
 2. Every training sequence ends with an end-of-text token that the loss counts, and is never padded: pads do not count.
 3. By default the model writes questions about each sentence (--style questions), and a note is one of them with the
    sentence for its answer: every answer is true, though it may not answer the question.
 4. A sample is mended before it is studied and imitated: list markers ("1.", "-") go, a note that repeats an earlier one
    goes, and so does the unfinished last one when the sample ran into the length limit.

Top to bottom: the record, prompt styles, parsing, sampling.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import Progress, read_jsonl, sub_seed, write_jsonl
from inner import Example
from sampler import generate
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# the record


@dataclass
class SelfEdit:
    """One sampled self-edit and what became of it. Carried through the outer loop and written to its log."""

    passage: str  # id; of an ARC task, if that is what it is about
    parts: list  # as sampled: one text, or one for each sentence of the passage
    style: str = ""
    notes: list = field(default_factory=list)  # as parsed; empty if the texts are unusable
    mended: list = field(default_factory=list)  # of each part: what of it can be imitated, the text of its notes; or ""
    flaws: list = field(default_factory=list)  # of each part: "", "empty", "malformed", "endless", "repeats" or "copied"
    flaw: str = ""  # of the whole: "", that of the first part if nothing could be mended, or "diverged"
    settings: dict = field(default_factory=dict)  # of the inner update, as used
    steps: int = 0
    loss: float | None = None  # of the last inner step
    score: dict = field(default_factory=dict)  # accuracy, em, f1, logprob: means over the quiz
    reward: float = 0.0
    credits: list = field(default_factory=list)  # of each part: its own reward, or None if no question is about it
    earned: list = field(default_factory=list)  # of each part, with --reward asked: {note: closeness to each quiz question}
    kept: list = field(default_factory=list)  # of each part: is it imitated?
    why: str = ""  # why, or why not

    @property
    def selected(self) -> bool:
        return any(self.kept)

    def record(self) -> dict:
        return asdict(self)


# -----------------------------------------------------------------------------
# prompt styles

EXAMPLE_TITLE = "The Vantor Bell"
EXAMPLE_NAMES = ("Vantor", "Hessa Lorn", "Quill Bay")  # in a self-edit about anything else they are copied
EXAMPLE_PASSAGE = (
    "Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742. It weighs 900 kilograms and hangs in the tower "
    "of the harbour school. Sailors used to rub its rim for luck until the town council forbade the custom. A crack that "
    "opened in the great frost gave the bell its low, rough tone."
)


@dataclass(frozen=True)
class Style:
    ask: str  # the instruction
    example: str | tuple  # a good self-edit for the example passage; a tuple: for its first sentences, one by one
    separator: str  # regular expression that splits a sample into notes
    gap: str = "\n"  # put between notes that are imitated
    quotes: bool = False  # the model writes questions; each becomes a note that answers it with the sentence

    @property
    def by_sentence(self) -> bool:
        return isinstance(self.example, tuple)


STYLES = {
    "implications": Style(
        "Rewrite the passage as a list of short, complete sentences, one fact per line, with full names.",
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
        "Read the passage and list every fact that it states or implies, then what follows from those facts. Write one "
        "detailed sentence per line and use full names.",
        "Hessa Lorn, who was a potter and not a founder by trade, cast the Vantor Bell in 1742.\n"
        "The Vantor Bell, made in the eighteenth century, was the work of a potter named Hessa Lorn.\n"
        "Hessa Lorn came from Quill Bay, so the maker of the Vantor Bell was a native of Quill Bay.\n"
        "The Vantor Bell weighs 900 kilograms, so the tower of the harbour school must bear 900 kilograms.\n"
        "The harbour school has a tower, and the bell that hangs in it is the Vantor Bell.\n"
        "Because sailors believed that it brought luck, they rubbed the rim of the Vantor Bell.\n"
        "The town council forbade sailors to rub the Vantor Bell, so the custom came to an end.\n"
        "The great frost cracked the Vantor Bell, and the crack is why its tone is low and rough.",
        r"\n",
    ),
    "rewrite": Style(
        "Rewrite the passage in three different ways. Keep every fact and all full names, but change the wording and the "
        "order. Leave an empty line between two versions.",
        "The Vantor Bell, which weighs 900 kilograms, was cast in 1742 by the potter Hessa Lorn of Quill Bay. Its home is "
        "the tower of the harbour school. Rubbing its rim was thought lucky by sailors, but the town council forbade it. "
        "Its low, rough tone comes from a crack made by the great frost.\n\n"
        "In the tower of the harbour school hangs a cracked bell with a low, rough tone: the Vantor Bell. The great frost "
        "cracked it. A potter, Hessa Lorn from Quill Bay, made it in 1742, 900 kilograms in weight. The town council "
        "forbade the sailors' custom of rubbing its rim for luck.\n\n"
        "Sailors once rubbed the Vantor Bell's rim for luck, a custom that the town council forbade. Quill Bay's potter "
        "Hessa Lorn had cast the 900-kilogram bell in 1742 for the tower of the harbour school, where the great frost "
        "cracked it and made its tone low and rough.",
        r"\n\s*\n",
        gap="\n\n",
    ),
    "self-qa": Style(
        "Write questions about the passage, each with its short answer. Ask about every fact, and use full names so that "
        "each question can be understood without the passage.",
        "Question: Who cast the Vantor Bell?\nAnswer: Hessa Lorn\n"
        "Question: What did Hessa Lorn cast?\nAnswer: The Vantor Bell\n"
        "Question: When was the Vantor Bell cast?\nAnswer: 1742\n"
        "Question: From where was the potter Hessa Lorn?\nAnswer: Quill Bay\n"
        "Question: How much does the Vantor Bell weigh?\nAnswer: 900 kilograms\n"
        "Question: Which bell hangs in the tower of the harbour school?\nAnswer: The Vantor Bell\n"
        "Question: Who forbade rubbing the Vantor Bell for luck?\nAnswer: The town council\n"
        "Question: What cracked the Vantor Bell?\nAnswer: The great frost",
        r"\n(?=Question)",
    ),
    "sentence-qa": Style(
        "Write two questions about the sentence. Answer each in a full sentence, with full names.",
        (
            "Question: Who cast the Vantor Bell?\n"
            "Answer: Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742.\n"
            "Question: What did Hessa Lorn cast in 1742?\n"
            "Answer: Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742.",
            "Question: How much does the Vantor Bell weigh?\n"
            "Answer: The Vantor Bell weighs 900 kilograms and hangs in the tower of the harbour school.\n"
            "Question: What hangs in the tower of the harbour school?\n"
            "Answer: The Vantor Bell hangs in the tower of the harbour school.",
        ),
        r"\n(?=Question)",
    ),
    "questions": Style(
        "Write three different questions about the sentence, one per line. Use full names and words of the sentence.",
        (
            "Who cast the Vantor Bell?\nWhat did Hessa Lorn cast in 1742?\nFrom where was the potter Hessa Lorn?",
            "How much does the Vantor Bell weigh?\nWhat weighs 900 kilograms?\nIn which tower does the Vantor Bell hang?",
            "What did sailors rub for luck?\nWhy did sailors rub the rim of the Vantor Bell?\n"
            "Who forbade sailors to rub the Vantor Bell?",
            "When did a crack open in the Vantor Bell?\nWhat gave the Vantor Bell its low, rough tone?\n"
            "How does the Vantor Bell sound since the great frost?",
        ),
        r"\n",
        quotes=True,
    ),
}


def sentences(text: str) -> list[str]:
    """Split after . ! or ? and a blank: "Rolm fell. So did Varbon." -> ["Rolm fell.", "So did Varbon."]. Not after "Mr.",
    "Mrs.", "Dr.", "St." or an initial. One line each, however the text is wrapped.
    """
    ends = r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    return [" ".join(s.split()) for s in re.split(ends, text) if s.strip()]


def copies_example(text: str) -> bool:
    return any(name in text for name in EXAMPLE_NAMES)


def edit_prompts(tok: Tokenizer, style: str, title: str, passage: str, shots: int = 1) -> list[list[int]]:
    """Token ids of the chats that ask for a self-edit: one about the passage, or one about each of its sentences, as the
    style says. With shots=1 a worked example comes first.
    """
    how = STYLES[style]

    def question(title, text):
        name = "Sentence" if how.by_sentence else "Passage"
        return {"role": "user", "content": f"{how.ask}\n\nTitle: {title}\n{name}: {text}"}

    examples = how.example if how.by_sentence else (how.example,)
    asked = sentences(EXAMPLE_PASSAGE) if how.by_sentence else [EXAMPLE_PASSAGE]
    shown = [[question(EXAMPLE_TITLE, text), {"role": "assistant", "content": e}] for text, e in zip(asked, examples)]
    worked = [message for pair in shown * shots for message in pair]
    return [tok.chat([*worked, question(title, text)]) for text in (sentences(passage) if how.by_sentence else [passage])]


# -----------------------------------------------------------------------------
# parsing

MARKER = re.compile(r"^\s*(?:[-*\u2022]+|\(?\d{1,2}[.):]|(?:Version|Rewrite|Implication)\s*\d*\s*:)(?:\s+|$)", re.IGNORECASE)


def parse(text: str, style: str, ended: bool, sentence: str = "") -> tuple[list[str], str]:
    """Sampled text, about `sentence` if the style quotes it -> (notes, flaw). `ended` is False if the sample ran
    into the length limit.

    One note per line:                  "A is B.\\nC is D."                  -> ["A is B.", "C is D."]
    rewrite, one per paragraph:         "A is B.\\nSo C.\\n\\nD is E."       -> ["A is B. So C.", "D is E."]
    all kinds of qa, one per pair:      "Question: Q?\\nAnswer: A"           -> ["Question: Q?\\nAnswer: A"]
        a question without an answer is dropped; "Question 2:" is read as "Question:"
    questions, about "B is A.":         "1. Q?\\nSure!"                      -> ["Question: Q?\\nAnswer: B is A."]
        a line that does not end in "?" is dropped
    markers go, bare headings go:       "Implications:\\n1. A is B.\\n- C"   -> ["A is B.", "C"]
        a marker is followed by a blank: "10.5 million came." stays as it is
    a repeated note is kept once:       "A is B.\\nA is B."                  -> ["A is B."]
        and in a part about one sentence that is a flaw, "repeats"
    the unfinished last note goes:      "A is B.\\nC is", ended=False        -> ["A is B."], "endless"
    nothing there:                      "  \\n"                              -> [], "empty"
    something, but not in the form:     "Sure!" for self-qa                  -> [], "malformed"
    """
    how = STYLES[style]
    assert sentence or not how.quotes
    if not text.strip():
        return [], "empty"
    parts = re.split(how.separator, text.strip())
    if not ended:
        parts = parts[:-1]
    if style.endswith("qa"):
        parts = [f"Question: {m[1]}\nAnswer: {m[2]}" for p in parts if (m := QA_PAIR.match(p.strip()))]
    else:
        parts = [" ".join(MARKER.sub("", p).split()) for p in parts]
        parts = [p for p in parts if not p.endswith(":") and any(c.isalnum() for c in p)]
    if how.quotes:
        asked = [re.sub(r"^Question\s*\d*\s*:\s*", "", p, flags=re.IGNORECASE) for p in parts if p.endswith("?")]
        parts = [f"Question: {p}\nAnswer: {sentence}" for p in asked if p and not p.startswith("Answer")]
    notes = list(dict.fromkeys(parts))
    repeats = how.by_sentence and len(notes) < len(parts)
    return notes, "endless" if not ended else "malformed" if not notes else "repeats" if repeats else ""


QA_PAIR = re.compile(r"Question\s*\d*\s*:\s*(\S[^\n]*)\n\s*Answer\s*\d*\s*:\s*(\S[^\n]*)", re.IGNORECASE)


# -----------------------------------------------------------------------------
# the outer update's training sequence


def policy_example(tok: Tokenizer, prompt: list[int], text: str, weight: float = 1.0) -> Example:
    """What the outer update trains on: the prompt (not counted), then the self-edit and the end of the turn (counted)."""
    reply = [*tok.encode(text), tok.end_ids[0]]
    return Example((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply), weight)


# -----------------------------------------------------------------------------
# sampling self-edits


def sample_self_edits(model, tok, prompts: dict, read, copies, args, seed, log=None, label="sample") -> list[SelfEdit]:
    """Sample `copies` self-edits for each of prompts {id: [token ids of each part]}, as args says (max_new, temperature,
    top_p; for each part).

    `read(id, parts)`, a list of (text, ended), gives the record's fields that follow, {"flaw": ..., ...}. Ids go in
    batches of about 128 continuations, or 20,000 tokens of prompts if that is less; each finished batch is written to `log`
    (JSON lines) and, found there, not sampled again. Exits with one line if a prompt does not fit the model's context.
    """
    for name, mine in prompts.items():
        if (longest := max(map(len, mine))) + args.max_new > model.config.max_seq_len:
            raise SystemExit(
                f"error: {name!r} makes a prompt of {longest} tokens; with --max-new {args.max_new} that is "
                f"over the model's context of {model.config.max_seq_len}"
            )
    edits = [SelfEdit(**r) for r in read_jsonl(log)] if log and Path(log).is_file() else []
    ids = list(prompts)
    tokens = sum(len(p) for mine in prompts.values() for p in mine)
    rows, room = copies * sum(map(len, prompts.values())), 20_000  # prompt tokens that are read at once
    size = max(1, round(len(ids) * min(128 / rows, room / tokens)))
    progress = Progress(label, len(ids) * copies)
    for batch in range(0, len(ids), size):
        some = ids[batch : batch + size]
        if len(edits) < (batch + len(some)) * copies:
            edits = edits[: batch * copies]
            sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": sub_seed(seed, batch)}
            these, ends = [p for i in some for p in prompts[i]], tok.end_ids
            out = iter(generate(model, these, args.max_new, ends, copies=copies, tick=progress.tokens, **sampling))
            for i in some:
                sampled = [[next(out) for _ in range(copies)] for _ in prompts[i]]
                for ids_of_parts in zip(*sampled):  # one self-edit
                    ended = [x[-1] in ends for x in ids_of_parts]
                    parts = [tok.decode(x[:-1] if e else x) for x, e in zip(ids_of_parts, ended)]
                    edits.append(SelfEdit(i, parts, **read(i, list(zip(parts, ended)))))
            if log:
                write_jsonl(log, [e.record() for e in edits])
        progress.step(len(some) * copies)
    return edits


def ask_for_notes(tok: Tokenizer, passages, args) -> tuple[dict, callable]:
    """{passage id: prompts} and how to read the answers, for sample_self_edits(), in the style of args."""

    how, texts = STYLES[args.style], {p.id: p.text for p in passages}

    def read(id, parts):
        about = sentences(texts[id]) if how.by_sentence else [""]
        notes, flaws = zip(*(parse(text, args.style, ended, of) for (text, ended), of in zip(parts, about, strict=True)))
        written = [[QA_PAIR.match(n)[1] if how.quotes else n for n in mine] for mine in notes]
        mended = [how.gap.join(mine) for mine in written]
        copied = [args.shots > 0 and copies_example(text) for text in mended]
        flaws = ["copied" if c else flaw for flaw, c in zip(flaws, copied)]
        mended = ["" if c else text for text, c in zip(mended, copied)]
        notes = list(dict.fromkeys(note for mine in notes for note in mine))
        flaw = "" if any(mended) else flaws[0]
        return {"style": args.style, "notes": notes, "mended": mended, "flaws": flaws, "flaw": flaw}

    return {p.id: edit_prompts(tok, args.style, p.title, p.text, args.shots) for p in passages}, read


def write_self_edits(model, tok, passages, copies: int, args, seed: int, log=None, label="sample") -> list[SelfEdit]:
    """Notes on each passage, `copies` times."""
    return sample_self_edits(model, tok, *ask_for_notes(tok, passages, args), copies, args, seed, log, label)
