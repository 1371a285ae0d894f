"""Documents: what they are called, how they are cut, and which words tell what they are about."""

import pytest

from data import documents


def test_a_documents_passages():
    """Short sections together, long ones cut between statements; each under the headings that all
    of it stands under, below the document's title."""
    long = " ".join(f"Gate {n} of Rolm is kept by {n + 7} guards." for n in range(20))  # 180 words
    text = f"# Rolm\n## Trade\nIn salt.\n## War\nNone.\n## Gates\n{long}"
    found = documents.passages_of(documents.Text("doc", "My town", text))
    assert [p.id for p in found] == ["doc-1", "doc-2", "doc-3"]
    assert [p.title for p in found] == ["My town", "My town: Gates", "My town: Gates"]
    assert found[0].text == "# Rolm\n## Trade\nIn salt.\n\n## War\nNone."
    assert all(len(p.text.split()) <= 120 and p.text.endswith("guards.") for p in found[1:])
    assert " ".join(f"{found[1].text} {found[2].text}".split()) == long
    days = documents.Text("doc", "Diary", f"# Monday\n{long}\n# Tuesday\nRain.\n# Wednesday\nSun.")
    titles = [p.title for p in documents.passages_of(days)]
    assert titles == ["Diary: Monday", "Diary"]


@pytest.mark.parametrize(
    "text, title",
    [
        ("# Rolm\nIt fell.\n## Trade\nSalt.", "Rolm"),
        ("# Monday\nRain.\n# Tuesday\nSun.", ""),
        ("Before.\n## Trade\nSalt.", ""),
        ("Rolm fell.", ""),
    ],
)
def test_the_heading_that_all_stands_under_is_the_title(text, title):
    assert documents.top_heading(text) == title


@pytest.mark.parametrize(
    "path, name",
    [
        ("My notes.md", "my-notes"),
        ("a/b/C++.txt", "c"),
        ("!!!.txt", "document"),
        (".hidden", "hidden"),
        ("Zoe\u0308.md", "zoë"),
        ("हिन्दी.txt", "हिन्दी"),
        ("x" * 251 + ".txt", "x" * 50),
    ],
)
def test_what_a_document_is_called(path, name):
    assert documents.name_of(path) == name


@pytest.mark.parametrize(
    "text, telling",
    [
        ("Where's Ada's mill?", ["ada", "mill"]),
        ("What will they do with the pump?", ["pump"]),
        ("Tell me about the 5th pump, please.", ["5th", "pump"]),
        ("Who’ll come?", ["come"]),
        ("他在家。", ["他", "在", "家"]),
    ],
)
def test_words_that_tell(text, telling):
    assert documents.telling_words(text) == telling
