"""Text as the project cuts it: statements, each a fact to ask about, sections under their headings,
and pieces, each short enough to be one training sequence."""

import re

# What follows belongs to these; to those below only a number, or a word that is not capitalised.
BINDING = set(
    "mr mrs ms mx dr prof st ste mt ft gen col maj capt lt sgt rev hon gov sen rep".split()
)
BINDING |= set("messrs mme mlle vs cf approx ca viz e.g i.e z.b d.h u.a bzw ggf hr fr".split())
ABBREVIATIONS = set("inc ltd co corp dept univ jr sr al etc a.m p.m no nos nr fig figs eq".split())
ABBREVIATIONS |= set("sec ch vol p pp art ed eds abb bd ave blvd rd tel est max min".split())
MONTHS = "jan feb mar mär apr may mai jun jul aug sep sept oct okt nov dec dez".split()
ABBREVIATIONS |= set(MONTHS)

# Scripts that put no blanks between words; each of their characters counts as a word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao; Tibetan; Burmese; Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"  # kana, Han
)

CLOSING = "\"'”’»)\\]}*_"
END = re.compile(  # with a blank after it; the marks of scripts without blanks need none
    f"(?<![.!?…؟۔։])[.!?…؟۔։]+[{CLOSING}]*(?=\\s)|[。．！？｡।॥።။།]+[{CLOSING}」』）》】]*\\s*"
)
QUESTION = re.compile(f"[?？؟][{CLOSING}」』）》】]*$")
MARKER = re.compile(r"^(?:#{1,6}|[-*+\u2022\u2023\u25e6>]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s+")
BOLD = re.compile(r"(\*\*|__)(?=\S)(.+?)\1")
LABEL = re.compile(r"^(?:Q|A|Question|Answer)\s?\d{0,3}\s?[:.)]\s+", re.IGNORECASE)
ANSWER = re.compile(r"\s(?=(?:A|Answer)\s?\d{0,3}:\s)")


def sentences(text: str) -> list[str]:
    """The statements of a text, in order: "Rolm fell. So did Varbon." -> ["Rolm fell.", "So did
    Varbon."].

    prose           a sentence each, however it is wrapped; not cut after "Dr.", "e.g.", "No. 4" or
                    an initial; closing quotes and brackets belong to it; by other scripts' marks
    lists           an item each, without its marker; short lines likewise
    headings        each that has four words; a shorter one goes with the short items below it
    tables          a row each: "Name: Ada; Born: 1911"
    code            a line each
    questions       are no statements: each stands before the sentence, or the line, that answers it
                    (question_and_answer() takes them apart)

    What it cannot split, as Thai, which has no full stops, stays whole.
    """
    found, asked = [], []
    for line, whole in lines_of(text):
        for sentence in [line] if whole else split(line):
            if QUESTION.search(sentence):
                asked.append(sentence)
            else:
                found.append(" ".join([*asked, sentence]))
                asked = []
    if asked and found:  # nothing answers it
        found[-1] = " ".join([found[-1], *asked])
    return found or asked or [text.strip()] * bool(text.strip())


def question_and_answer(statement: str) -> tuple[str, str]:
    """("Who fell?", "Rolm did.") of "Who fell? Rolm did."; ("", statement) of one that does not
    begin with a question."""
    parts = split(statement)
    n = next((k for k, part in enumerate(parts) if not QUESTION.search(part)), 0)
    return " ".join(parts[:n]), " ".join(parts[n:])


def split(line: str) -> list[str]:
    """The sentences of a line."""
    found, start = [], 0
    for mark in END.finditer(line):
        before = line[max(start, mark.start() - 40) : mark.start()]
        after = line[mark.end() : mark.end() + 40].lstrip()
        if ends(before, mark[0].strip(), after):
            found.append(line[start : mark.end()].strip())
            start = mark.end()
    return [s for s in [*found, line[start:].strip()] if s]


def ends(before: str, mark: str, after: str) -> bool:
    """Does a sentence end at this mark?"""
    if not after or mark[0] in "。．！？｡।॥።။།":
        return not after.startswith("と")  # 「行く。」と言った。
    if after[0].islower():
        return False
    if mark != ".":
        return True
    word = re.search(r"[^\s(\[“\"'/]*$", before[-40:])[0].lower()
    capital = after.lstrip("\"'“‘«([*_")[:1].isupper()
    if re.search(r"\b[A-Z]$", before) or word in BINDING:  # an initial; a title
        return False
    if word.isdigit() and len(word) <= 2:  # "3. Mai", "24. Dezember"
        return re.match(r"\w*", after)[0].lower()[:3] not in MONTHS
    return capital or word not in ABBREVIATIONS


def lines_of(text: str) -> list[tuple[str, bool]]:
    """[(line, is it one statement as it stands?)]: wrapped lines joined, markers and rules gone."""
    found, header, code, last = [], None, False, ""  # last: the line that this one may go on with
    title = ""  # a short heading
    width = max(map(len, text.splitlines()), default=0)
    for line in (" ".join(line.split()) for line in text.splitlines()):
        if line.startswith(("```", "~~~")):
            code, last = not code, ""
        elif code:
            found += [(line, True)] if line else []
        elif not any(map(str.isalnum, line)):  # an empty line, or a rule
            header, last = header if line else None, ""
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            names = (header or [])[: len(cells)]
            names = [name if len(name) <= 100 else name[:100] + "…" for name in names]
            pairs = [f"{name}: {cell}" for name, cell in zip(names, cells) if cell]
            found += [("; ".join(pairs), True)] if pairs else []
            header = header or cells
        elif last and not MARKER.match(line) and not LABEL.match(line) and wraps(last, line, width):
            before, whole = found.pop()
            found.append((f"{before} {line}", whole))
            last = line
        else:
            last = "" if line.startswith("#") else line
            for part in ANSWER.split(line) if LABEL.match(line) else [line]:
                part = BOLD.sub(r"\2", MARKER.sub("", LABEL.sub("", part, 1), 1))
                short = len(part) < 25 and len(part.split()) < 4
                if is_question(part):
                    found.append((part, False))
                elif short and (not last or part.endswith(":")):
                    title = part.rstrip(":")
                else:
                    answers = bool(found) and is_question(found[-1][0])
                    item = f"{title}: {part}" if short and title and MARKER.match(line) else part
                    found.append((item, answers))
            title = "" if last and not MARKER.match(line) and not line.endswith(":") else title
    return found


def is_question(line: str) -> bool:
    """One, and nothing else."""
    return bool(QUESTION.search(line)) and len(split(line)) == 1


def wraps(last: str, line: str, width: int) -> bool:
    """Is a line the rest of the one before? Then that one had no room for its first word."""
    full = len(last) >= 50 and len(last) + 1 + len(line.split()[0]) > width
    return line[0].islower() or full


HEADING = re.compile(r"(#{1,6})\s+(\S.*)")
UNDERLINE = re.compile(r" {0,3}(?:={3,}|-{3,})\s*")  # of a heading, or a rule
NO_HEADING = re.compile(r"\s|[-*+]\s|\d+[.)]\s|[>|]|```|~~~")


def with_marked_headings(text: str) -> str:
    """Markdown with its underlined headings as "# Rolm", for all that reads it: a line of at most
    twelve words after an empty one, not a sentence, above "====" or "----"."""
    lines, code, found, marked = text.splitlines(), False, [], False
    for line, before, below in zip(lines, ["", *lines], [*lines[1:], ""]):
        if marked:  # this is its underline
            marked = False
            continue
        code ^= line.lstrip().startswith(("```", "~~~"))
        short = 0 < len(line.split()) <= 12 and line.rstrip()[-1] not in ".,;:!?"
        plain = not code and not NO_HEADING.match(line) and not UNDERLINE.fullmatch(line)
        marked = short and plain and not before.strip() and bool(UNDERLINE.fullmatch(below))
        mark = "# " if "=" in below else "## "
        found.append((mark if marked else "") + line)
    return "\n".join(found)


def sections(text: str) -> list[tuple[tuple, str]]:
    """A text by its Markdown headings ("# Rolm"), which stay where they are, each part with the
    headings that it stands under; a text without is [((), text)]. A heading with nothing below it
    goes with the next.

    "# Rolm\nIt fell.\n## Trade\nIn salt." ->
    [(("Rolm",), "# Rolm\nIt fell."), (("Rolm", "Trade"), "## Trade\nIn salt.")]
    """
    above, code, found, full = {}, False, [[(), []]], False  # above: level -> heading
    for line in text.splitlines():
        code ^= line.lstrip().startswith(("```", "~~~"))
        mark = None if code else HEADING.match(line)
        if mark:
            level = len(mark[1])
            name = re.sub(r"\s#+$", "", BOLD.sub(r"\2", mark[2].rstrip())).rstrip()
            above = {n: own for n, own in above.items() if n < level} | {level: name}
            if full:
                found.append([(), []])
            found[-1][0] = tuple(above.values())
        full = not mark and (full or bool(line.strip()))
        found[-1][1].append(line)
    parts = [(headings, "\n".join(lines).strip()) for headings, lines in found]
    return [(headings, part) for headings, part in parts if part]


def pieces(text: str, fits) -> list[str]:
    """A text in pieces that are as long as `fits(piece)` allows, of whole statements. One that does
    not fit by itself is cut in the middle, at a blank if there is one. A text that fits stays as it
    is."""
    if fits(text):
        return [text]
    parts = sentences(text)
    if len(parts) == 1:
        middle = len(text) // 2
        blank = text.find(" ", middle)
        middle = blank if 0 < blank < len(text) - 1 else max(1, middle)
        parts = [text[:middle].strip(), text[middle:].strip()]
    found = []
    for part in parts:
        if found and fits(f"{found[-1]}\n{part}"):
            found[-1] += f"\n{part}"
        else:
            found += pieces(part, fits)
    return found
