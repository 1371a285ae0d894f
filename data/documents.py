"""Documents as people have them, plain text or Markdown: read, named and cut into passages; and the
words by which a question finds one."""

import re
import unicodedata
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from data.qa import LONGEST_TEXT, Passage
from data.text import UNSPACED, pieces, sections, with_marked_headings
from lm.files import fingerprint, read_bytes

LONGEST_PASSAGE = 120  # words; of scripts without blanks three times as many characters


@dataclass(frozen=True)
class Text:
    """A document that is to be learnt."""

    name: str  # in the memory
    title: str
    text: str

    @property
    def digest(self) -> str:
        return fingerprint(self.text.encode())


def read_texts(paths: list[str], title: str | None = None) -> list[Text]:
    """The files, under `title`, or each under its heading or its file's name. Exits with one line
    if one cannot be read, or two would be called the same."""
    texts = {}
    for path in paths:
        name, text = name_of(path), read_text(path)
        if name in texts:
            raise SystemExit(f"error: two documents would be called {name!r}; rename one file")
        texts[name] = Text(name, title or top_heading(text) or Path(path).stem, text)
    return list(texts.values())


def read_text(path: str) -> str:
    """A text file. Exits with one line if it cannot be read, is empty, or longer than
    LONGEST_TEXT."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise SystemExit(f"error: cannot read {path}: it is not UTF-8 text; save it as UTF-8")
    text = text.strip()
    if not text:
        raise SystemExit(f"error: {path} is empty")
    if len(text) > LONGEST_TEXT:
        long = f"{path} has {len(text):,} characters, of at most {LONGEST_TEXT:,}"
        raise SystemExit(f"error: {long}; study it chapter by chapter, each in its own file")
    return with_marked_headings(text).strip()


def name_of(path: str) -> str:
    """What a document is called: letters and digits of its file's name, "My notes.md" ->
    "my-notes", fifty characters at most."""
    stem = unicodedata.normalize("NFC", Path(path).stem.casefold())
    kept = [c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in stem]
    return "-".join("".join(kept).split())[:50] or "document"


def top_heading(text: str) -> str:
    """A Markdown text's title: the heading that all of it stands under; "" if there is none."""
    above = commonprefix([headings for headings, _ in sections(text)])
    return above[0] if above else ""


def fits(piece: str) -> bool:
    return max(len(piece.split()), len(UNSPACED.findall(piece)) / 3) <= LONGEST_PASSAGE


def passages_of(document: Text) -> list[Passage]:
    """A document's passages: whole statements, at most LONGEST_PASSAGE words, short sections
    together. Each is about the document's title and the headings that all of it stands under."""
    found, top = [], top_heading(document.text)
    for headings, body in sections(document.text):
        below = headings[1:] if top else headings
        for piece in pieces(body, fits):
            if found and fits(joined := f"{found[-1][1]}\n\n{piece}"):
                found[-1] = (commonprefix([found[-1][0], below]), joined)
            else:
                found.append((below, piece))
    passages = []
    for n, (below, piece) in enumerate(found, 1):
        title = ": ".join([document.title, *below])
        passages.append(Passage(f"{document.name}-{n}", title, piece, ()))
    return passages


# -----------------------------------------------------------------------------
# words

COMMON = """a an the of in on at to for from by with about into over under after before between
and or but so if then than as not no yes is are was were be been being do does did done has have
had having can could will would shall should may might must i me my mine you your yours he him
his she her hers it its we us our they them their this that these those there here what which who
whom whose when where why how many much any some all please tell say know""".split()


def telling_words(text: str) -> list[str]:
    """The words of a text or a question that tell what it is about: "Where's Ada's mill?" ->
    ["ada", "mill"]. The scripts that put no blanks between words: each character."""
    text = unicodedata.normalize("NFC", text.casefold())
    text = UNSPACED.sub(r" \g<0> ", re.sub(r"['’](s|re|ll|d|ve|m|t)\b", " ", text))
    plain = [" " if unicodedata.category(c)[0] in "PSZC" else c for c in text]
    return [word for word in "".join(plain).split() if word not in COMMON]
