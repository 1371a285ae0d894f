"""data/text.py: what counts as a statement, in prose, lists, tables and other scripts."""

import time

import pytest

from data.text import pieces, question_and_answer, sections, sentences, with_marked_headings

CASES = {
    "marks": (
        "Rolm fell.  So did Varbon! It was 1.5\nmiles…",
        ["Rolm fell.", "So did Varbon!", "It was 1.5 miles…"],
    ),
    "titles": (
        "Dr. J. Quell met Mrs. Marn. St. Ambrel fell.",
        ["Dr. J. Quell met Mrs. Marn.", "St. Ambrel fell."],
    ),
    "abbreviations": (
        "Tarn Inc. makes brushes, e.g. for painters. Its seat is No. 4 Mill Lane. It opens at "
        "9 a.m. on Jan. 5 (see Fig. 3). Prof. Marn vs. Lind et al. was settled by Quell Ltd. in "
        "May. It rained.",
        [
            "Tarn Inc. makes brushes, e.g. for painters.",
            "Its seat is No. 4 Mill Lane.",
            "It opens at 9 a.m. on Jan. 5 (see Fig. 3).",
            "Prof. Marn vs. Lind et al. was settled by Quell Ltd. in May.",
            "It rained.",
        ],
    ),
    "an abbreviation that ends": (
        "She left at 9 p.m. He joined Tarn Inc. They fell.",
        ["She left at 9 p.m.", "He joined Tarn Inc.", "They fell."],
    ),
    "ordinals": (
        "Am 24. Dezember kam er. Er war 24. Dann ging er.",
        ["Am 24. Dezember kam er.", "Er war 24.", "Dann ging er."],
    ),
    "quotes": ("He said “Go.” Then he left.", ["He said “Go.”", "Then he left."]),
    "brackets": ("(It rained.) She stayed.", ["(It rained.)", "She stayed."]),
    "a quotation goes on": (
        "“Who is it?” she asked. Nobody.",
        ["“Who is it?” she asked.", "Nobody."],
    ),
    "Chinese": ("罗姆在北京。她写书！", ["罗姆在北京。", "她写书！"]),
    "Japanese": ("東京は大きい。「行く。」と言った。", ["東京は大きい。", "「行く。」と言った。"]),
    "Hindi": ("वह गया। वह आया॥", ["वह गया।", "वह आया॥"]),
    "Arabic": ("ذهب إلى البيت. لماذا؟ لأنه تعب.", ["ذهب إلى البيت.", "لماذا؟ لأنه تعب."]),
    "Urdu": ("وہ گیا۔ وہ آیا۔", ["وہ گیا۔", "وہ آیا۔"]),
    "Thai stays whole": ("เขาไปตลาด เธออยู่บ้าน", ["เขาไปตลาด เธออยู่บ้าน"]),
    "questions": ("It fell. Why? The wall was old.", ["It fell.", "Why? The wall was old."]),
    "an open question": ("It fell. Why?", ["It fell. Why?"]),
    "nothing but a question": ("Why?", ["Why?"]),
    "a FAQ": (
        "Q: Where is the hall? A: In Mill Lane. It has two doors.\nQ2: Who runs it?\nA2: Ada Quell",
        ["Where is the hall? In Mill Lane. It has two doors.", "Who runs it? Ada Quell"],
    ),
    "a FAQ of headings": (
        "# Questions\n\n## Where is it?\nIn Mill Lane. It is red.\n\n**Who runs it?**\n\nAda.",
        ["Where is it? In Mill Lane. It is red.", "Who runs it? Ada."],
    ),
    "minutes": (
        "# Minutes of the garden club, 4 May\n\n## Present\n- Ada Quell\n* Jon Marn\n\nDecisions:\n"
        "1. The shed roof is repaired by June\n2) Fees rise to 12 crowns\n"
        "(3) Next meeting: 9 July,\n   in the old mill\n",
        [
            "Minutes of the garden club, 4 May",
            "Present: Ada Quell",
            "Present: Jon Marn",
            "The shed roof is repaired by June",
            "Fees rise to 12 crowns",
            "Next meeting: 9 July, in the old mill",
        ],
    ),
    "lines": (
        "Date: 4 May\nPlace: the old mill\nChair: Ada Quell",
        ["Date: 4 May", "Place: the old mill", "Chair: Ada Quell"],
    ),
    "a table": (
        "| Name | Born |\n|:---|---|\n| Ada | 1911 |\n| Jon | |",
        ["Name: Ada; Born: 1911", "Name: Jon"],
    ),
    "code": (
        "It runs:\n\n```python\nx = 1. + 2\n\nprint(x)\n```\nDone. Good.",
        ["x = 1. + 2", "print(x)", "Done.", "Good."],
    ),
    "wrapped": (
        "This is the first line of a wrapped paragraph that goes on and on\nuntil Ada ends it. And "
        "then there is another sentence, too, which\nends here.",
        [
            "This is the first line of a wrapped paragraph that goes on and on until Ada ends it.",
            "And then there is another sentence, too, which ends here.",
        ],
    ),
    "nothing": ("  \n", []),
}


@pytest.mark.parametrize("name", CASES)
def test_statements(name):
    text, expected = CASES[name]
    assert sentences(text) == expected


@pytest.mark.parametrize("text", ["Facts:", "---", "# Rolm", "..."])
def test_what_has_no_statement_stays_whole(text):
    """Or a passage of it would have no prompt, and train on nothing."""
    assert sentences(f" {text}\n") == [text] and pieces(text, lambda piece: True) == [text]
    assert sentences(" \n") == []


def test_a_question_and_its_answer_come_apart():
    found = [question_and_answer(s) for s in sentences(CASES["a FAQ"][0])]
    answers = [
        ("Where is the hall?", "In Mill Lane. It has two doors."),
        ("Who runs it?", "Ada Quell"),
    ]
    assert found == answers
    assert question_and_answer("“Who is it?” she asked.") == ("", "“Who is it?” she asked.")
    assert question_and_answer("Why?") == ("", "Why?")


def test_pieces_hold_whole_statements_and_lose_nothing():
    def fits(text):
        return len(text) <= 30

    assert pieces("Rolm fell. Varbon fell, too.", fits) == ["Rolm fell. Varbon fell, too."]
    text = "Rolm fell. Varbon fell, too. Then Ada Quell of Rolm came to the old mill. It rained."
    found = pieces(text, fits)
    assert all(map(fits, found)) and " ".join(found).split() == text.split()
    assert found[0] == "Rolm fell.\nVarbon fell, too." and found[-1] == "It rained."
    assert "".join(pieces("x" * 100, fits)) == "x" * 100


@pytest.mark.parametrize(
    "text",
    [
        "^" * 50_000,
        " " * 500_000 + "x",
        "." * 50_000 + " a",
        "." * 50_000 + "a",
        "a. " * 20_000,
        "A. " * 20_000,
        "*" * 50_000 + "a",
        "“" * 50_000 + ".",
        "| " * 50_000,
        "1" * 50_000 + ".",
        "Q" + " " * 50_000 + ":",
    ],
)
def test_time_does_not_grow_with_the_square_of_the_length(text):
    start = time.perf_counter()
    sentences(text)
    assert time.perf_counter() - start < 2  # seconds: a square would be minutes


def test_a_table_does_not_grow_with_the_square_of_its_length():
    """Each row says its columns' names."""
    start = time.perf_counter()
    assert len(sentences("|h" * 20_000 + "|\n" + "|a|\n" * 5_000)) == 5_000
    assert time.perf_counter() - start < 2
    found = sentences(f"|{'H' * 20_000}|\n" + "|a|\n" * 5_000)
    assert len(found) == 5_000 and found[0] == f"{'H' * 100}…: a"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Rolm fell.", [((), "Rolm fell.")]),
        (
            "Before.\n# Rolm #\nIt fell.\n\n## Trade\nIn salt.\n# Varbon\n\nIt rose.",
            [
                ((), "Before."),
                (("Rolm",), "# Rolm #\nIt fell."),
                (("Rolm", "Trade"), "## Trade\nIn salt."),
                (("Varbon",), "# Varbon\n\nIt rose."),
            ],
        ),
        ("# Rolm\n\n### Trade\nSalt.", [(("Rolm", "Trade"), "# Rolm\n\n### Trade\nSalt.")]),
        ("# Rolm\n```\n# no heading\n```", [(("Rolm",), "# Rolm\n```\n# no heading\n```")]),
        ("#hashtag\nRolm fell.", [((), "#hashtag\nRolm fell.")]),
        ("# Rolm", [(("Rolm",), "# Rolm")]),
    ],
)
def test_sections(text, expected):
    assert sections(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "Rolm\n====\nIt fell.\n\nThe **trade**\n---\nIn salt.\n\n---\n\nIt rose.",
            "# Rolm\nIt fell.\n\n## The **trade**\nIn salt.\n\n---\n\nIt rose.",
        ),
        ("**Rolm**\n===\n\nTrade\n---\nSalt.", "# **Rolm**\n\n## Trade\nSalt."),
        ("It fell.\nSo\n---\nSalt.", None),  # a paragraph, and a rule
        ("It fell in 1742, and everyone left.\n---\nSalt.", None),
        ("one " * 13 + "\n---", None),
        ("- salt\n---\nIt fell.", None),
        ("1. salt\n---\nIt fell.", None),
        ("| a |\n---\n| b |", None),
        ("```\n\nRolm\n===\n```", None),
        ("```\n\n```\n---\nIt fell.", None),
        ("---\ntitle: x\n---\nIt fell.", None),
        ("Rolm\r\n====\r\nIt fell.", "# Rolm\nIt fell."),
    ],
)
def test_underlined_headings(text, expected):
    assert with_marked_headings(text) == (text if expected is None else expected)
