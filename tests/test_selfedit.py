"""selfedit.py: prompts, parsing, and the record that a sampled text becomes."""

import json
import time
from types import SimpleNamespace

import pytest
from conftest import dies_at

from data.qa import Passage
from lm.files import read_jsonl, write_jsonl
from lm.packing import Example
from selfedit import (
    EXAMPLE_NAMES,
    EXAMPLE_PASSAGE,
    QA_PAIR,
    STYLES,
    Part,
    SelfEdit,
    clozes,
    edit_prompts,
    note_prompts,
    note_reader,
    parse,
    policy_example,
    sample_self_edits,
    settle,
    write_self_edits,
)


def reader(style: str, text: str, shots: int = 1):
    """read(id, texts) of sample_self_edits() for notes on a passage "p"."""
    return note_reader([Passage("p", "Rolm", text, ())], style, shots)


def targets(edit: SelfEdit) -> list[str]:
    return [part.target for part in edit.parts]


def flaws(edit: SelfEdit) -> list[str]:
    return [part.flaw for part in edit.parts]


@pytest.mark.parametrize("style", STYLES)
def test_prompts(tok, style):
    text, how = "Rolm is a town. It sells bricks.", STYLES[style]
    ones, zeros = (edit_prompts(tok, style, "Rolm", text, shots) for shots in (1, 0))
    examples = how.example if how.by_sentence else [how.example]
    asked = ["Rolm is a town.", "It sells bricks."] if how.by_sentence else [text]
    assert len(ones) == len(zeros) == len(asked)
    for one, zero, about in zip(map(tok.decode, ones), map(tok.decode, zeros), asked):
        assert one.endswith(f"{about}<|im_end|>\n<|im_start|>assistant\n")
        assert all(e in one and e not in zero for e in examples)
    parsed = [parse(e, style, True, "It sells bricks.") for e in examples]
    assert all(flaw == "" for _, flaw in parsed)
    assert [len(notes) for notes, _ in parsed] == LENGTHS.get(style, [8])


LENGTHS = {"rewrite": [3], "sentence-qa": [2, 2], "questions": [3, 3, 3, 3]}


def test_a_quoted_note_answers_with_the_sentence():
    """The model writes the questions alone, and the policy imitates them alone: each once, and none
    that was cut off."""
    read = reader("questions", "Rolm is a town. It sells bricks.")
    asked = "What is Rolm?\nIt is a town.", "1. What does it sell?\n"
    what = "Question: What is Rolm?\nAnswer: Rolm is a town."
    sells = "Question: What does it sell?\nAnswer: It sells bricks."
    imitated = ["What is Rolm?", "What does it sell?"]
    cut = asked[1] + "2. Who s"
    made = read("p", [(asked[0], True), (cut, False)])
    one = Part(asked[0], [what], imitated[0], style="questions")
    two = Part(cut, [sells], imitated[1], "endless", style="questions")
    assert made == SelfEdit("p", [one, two], "questions") and made.notes == [what, sells]
    assert made.flaw == ""
    made = read("p", [(asked[0], True), (asked[1] + asked[1].replace("1.", "Question 2:"), True)])
    assert made.notes == [what, sells]
    assert (targets(made), flaws(made)) == (imitated, ["", "repeats"])
    read = reader("questions", "Rolm is\na town. It\n sells bricks.\n")  # wrapped: still one line
    assert read("p", [(asked[0], True), (asked[1], True)]).notes == [what, sells]
    with pytest.raises(ValueError):
        read("p", [(asked[0], True)])  # a part is missing


def test_what_is_imitated_can_be_parsed_again():
    """An empty line between two versions, as the prompt asks; without the third, cut-off one."""
    text = "Version 1: A is B.\nSo C.\n\nD is E.\n\nF"
    [target] = targets(reader("rewrite", "Rolm is a town.")("p", [(text, False)]))
    assert target == "A is B. So C.\n\nD is E."
    assert parse(target, "rewrite", True) == (["A is B. So C.", "D is E."], "")


def test_a_self_edit_in_parts(tok):
    """Notes of all parts together, each once; only a self-edit without a sound part is flawed."""
    passage = Passage("p", "Rolm", "Rolm is a town. It sells bricks.", ())
    prompts = note_prompts(tok, [passage], SimpleNamespace(style="sentence-qa", shots=1))
    assert list(prompts) == ["p"] and len(prompts["p"]) == 2
    read = reader("sentence-qa", passage.text)
    one = "Question: What is Rolm?\nAnswer: A town."
    two = "Question: What sells bricks?\nAnswer: Rolm."
    made = read("p", [(f"{one}\n{two}", True), (f"{one}\nQuestion: Wh", False)])
    assert (made.notes, targets(made)) == ([one, two], [f"{one}\n{two}", one])
    assert (flaws(made), made.flaw) == (["", "endless"], "")
    assert read("p", [("Sure!", True), ("Question: What", False)]).flaw == "malformed"
    made = read("p", [("Sure!", True), (two, True)])
    assert (made.notes, flaws(made), made.flaw) == ([two], ["malformed", ""], "")
    # Out of the worked example: neither learnt nor imitated, and a flaw.
    bell = "Question: Who sold it?\nAnswer: Hessa Lorn sold it."
    made = read("p", [(f"{bell}\n{one}", True), (two, True)])
    assert made.notes == [one, two]
    assert (targets(made), flaws(made)) == ([one, two], ["copied", ""])
    about_her = reader("sentence-qa", "Hessa Lorn came. It sells bricks.")
    assert about_her("p", [(bell, True), (two, True)]).notes == [bell, two]
    made = reader("sentence-qa", passage.text, shots=0)("p", [(bell, True), (two, True)])
    assert (targets(made), flaws(made)) == ([bell, two], ["", ""])
    assert all(name in EXAMPLE_PASSAGE for name in EXAMPLE_NAMES)


def test_questions_of_other_scripts_and_of_the_text_itself():
    """Their question marks count; what a question of the text is answered by is what is quoted."""
    text = "\u7f57\u59c6\u5728\u54ea\u91cc\uff1f\n\u0644\u0645\u0627\u0630\u0627\u061f\nWhere?\nNo."
    notes, flaw = parse(text, "questions", True, "Where is the hall? In Mill Lane. It is red.")
    assert [n.split("\nAnswer: ")[1] for n in notes] == ["In Mill Lane. It is red."] * 3
    assert flaw == ""


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "text",
    ["Question" + " " * 100_000 + "x", "Question: x\n" + " " * 100_000 + "x", "\n" * 100_000 + "x"],
)
def test_parsing_takes_no_time_whatever_a_model_writes(style, text):
    start = time.perf_counter()
    parse(text, style, True, "Rolm fell.")
    QA_PAIR.fullmatch(text)
    assert time.perf_counter() - start < 1  # seconds: a square would be a quarter of a minute


def test_room_for_a_self_edit_depends_on_the_style():
    rooms = {}
    for style in STYLES:
        rooms[style] = settle(SimpleNamespace(style=style, max_new=0)).max_new
    assert rooms["questions"] == rooms["sentence-qa"] == 80
    assert rooms["rewrite"] == rooms["implications"] == rooms["self-qa"] == 320
    assert settle(SimpleNamespace(style="rewrite", max_new=7)).max_new == 7


@pytest.mark.parametrize(
    "style, text, ended, expected",
    [
        ("implications", "A is B.\nC is D.", True, (["A is B.", "C is D."], "")),
        ("rewrite", "A is B.\nSo C.\n\nD is E.", True, (["A is B. So C.", "D is E."], "")),
        ("self-qa", "Question: Q?\nAnswer: A", True, (["Question: Q?\nAnswer: A"], "")),
        ("self-qa", "Question 1: Q?\nAnswer 1: A\nQuestion 2: R?\nQuestion 3: S?\nAnswer: B", True,
         (["Question: Q?\nAnswer: A", "Question: S?\nAnswer: B"], "")),
        ("implications", "Implications:\n1. A is B.\n- C", True, (["A is B.", "C"], "")),
        ("implications", "A is B.\nA is B.", True, (["A is B."], "")),
        ("implications", "A is B.\nC is", False, (["A is B."], "endless")),
        ("implications", "A is B without end", False, ([], "endless")),
        ("implications", "  \n", True, ([], "empty")),
        ("implications", "...\n---", True, ([], "malformed")),
        ("self-qa", "Sure!", True, ([], "malformed")),
        ("questions", "1. Q?\nSure!", True, (["Question: Q?\nAnswer: B is A."], "")),
        ("questions", "Question 2: Q?\nAnswer: Q?\nR?\nQ?", True,
         (["Question: Q?\nAnswer: B is A.", "Question: R?\nAnswer: B is A."], "repeats")),
        ("questions", "Sure!", True, ([], "malformed")),
        ("sentence-qa", "Question: Q?\nAnswer: A\n" * 2, True,
         (["Question: Q?\nAnswer: A"], "repeats")),
        ("sentence-qa", "Question: Q?\nAnswer: A\nQuestion: Q?\nAnswer: A", False,
         (["Question: Q?\nAnswer: A"], "endless")),
        ("implications", "1742 was the year.\n10.5 tons.\n-40 degrees.", True,
         (["1742 was the year.", "10.5 tons.", "-40 degrees."], "")),
        ("implications", "<|im_end|> __import__('os')", True,
         (["<|im_end|> __import__('os')"], "")),
    ],
)  # fmt: skip
def test_parsing(style, text, ended, expected):
    assert parse(text, style, ended, "B is A.") == expected


def test_the_policy_is_trained_on_the_reply(tok):
    e = policy_example(tok, [5, 6, 7], "A fact.", weight=-1.0)
    assert e == Example(
        (5, 6, 7, *tok.encode("A fact."), tok.end_ids[0]),
        (False,) * 3 + (True,) * (len(e.ids) - 3),
        -1.0,
    )


# -----------------------------------------------------------------------------
# the record, and sampling it


def test_a_record_is_read_back_as_it_was_written():
    part = Part("1. A", ["A."], "A.", "repeats", 0.5, {"A?": [0.0, 1.0]}, True)
    edit = SelfEdit("p", [part, Part("B")], "questions", "", {"lr": 0.1}, 3, 1.5, {"em": 0.0}, 0.5)
    assert SelfEdit.from_record(json.loads(json.dumps(edit.record()))) == edit
    assert edit.kept and not SelfEdit("p", [Part("B")]).kept


def test_what_was_sampled_is_not_sampled_again(tiny, tok, tmp_path, monkeypatch):
    """Killed in the second batch of passages, and resumed: the same self-edits."""
    passages = []
    for n in range(9):
        text = f"Rolm has {n} gates. It sells bricks."
        passages.append(Passage(f"p{n}", "Rolm", text, ()))
    args = SimpleNamespace(style="questions", shots=0, max_new=1, temperature=0.03, top_p=1.0)
    how = (passages, 8, args, 0)  # of two sentences each: 144 continuations, two batches
    whole = write_self_edits(tiny, tok, *how, tmp_path / "a.jsonl")
    assert [e.passage for e in whole] == [p.id for p in passages for _ in range(8)]
    assert len({e.parts[0].text for e in whole}) > 9  # copies differ
    calls = dies_at(monkeypatch, "selfedit.generate", 2)
    with pytest.raises(KeyboardInterrupt):
        write_self_edits(tiny, tok, *how, tmp_path / "b.jsonl")
    assert write_self_edits(tiny, tok, *how, tmp_path / "b.jsonl") == whole
    first, killed, *again = [len(prompts) for _, prompts, *_ in calls]
    assert again[0] == killed and first + sum(again) == 18
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    # Of a batch that is there in part, nothing counts.
    write_jsonl(tmp_path / "b.jsonl", read_jsonl(tmp_path / "a.jsonl")[: 8 * 8 + 3])
    assert write_self_edits(tiny, tok, *how, tmp_path / "b.jsonl") == whole


def test_each_passage_has_its_own_number_of_self_edits(tiny, tok, tmp_path, monkeypatch):
    """In several batches, and resumed after each: those that one batch gives."""
    prompts, counts = {}, {}
    for n in range(9):
        prompts[f"p{n}"], counts[f"p{n}"] = [[5, 6 + n], [7, 6 + n]], 1 + 5 * (n % 4)
    args = SimpleNamespace(max_new=2, temperature=1.0, top_p=1.0)

    def read(id, sampled):
        return SelfEdit(id, [Part(text) for text, _ in sampled])

    def sample(log, some=prompts):
        own = {name: counts[name] for name in some}
        return sample_self_edits(tiny, tok, some, read, own, args, 3, log)

    whole = sample(None)
    assert [e.passage for e in whole] == [name for name in prompts for _ in range(counts[name])]
    alone = [e for name in prompts for e in sample(None, {name: prompts[name]})]
    # Words of a random model are so nearly alike that rounding decides some: a batch of other rows.
    assert sum(a != b for a, b in zip(alone, whole, strict=True)) <= len(whole) / 10
    assert len({e.parts[0].text for e in whole}) > 20
    calls = dies_at(monkeypatch, "selfedit.generate", 2)
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "a.jsonl")
    assert 0 < len(read_jsonl(tmp_path / "a.jsonl")) < len(whole) and len(calls) == 2
    assert sample(tmp_path / "a.jsonl") == whole


def test_clozes_ask_with_half_of_a_statements_words():
    text = "Who keeps it? Ada Quell does, mostly. The spare key lies under the pot. Halt!"
    asked = {}
    for seed in range(60):
        pairs = [QA_PAIR.fullmatch(note).groups() for note in clozes(text, 3, seed)]
        for question, answer in pairs:
            first, rest = question.split(" ", 1)
            asked.setdefault(answer, {}).setdefault(rest, set()).add(first)
    expected = {"Ada Quell does, mostly.": {"Ada Quell?", "does, mostly?", "Quell does?"}}
    expected["The spare key lies under the pot."] = {"The spare key?", "key lies under?"}
    expected["The spare key lies under the pot."] |= {"under the pot?"}
    assert {answer: set(rests) for answer, rests in asked.items()} == expected
    firsts = {frozenset(words) for rests in asked.values() for words in rests.values()}
    assert firsts == {frozenset(["What", "Who", "When", "Where", "How"])}
    assert clozes(text, 3, 0) == clozes(text, 3, 0) != clozes(text, 3, 1)
    assert len(clozes(text, 3, 0)) == 6
    assert clozes("\u94a5\u5319\u5728\u82b1\u76c6\u4e0b\u3002", 3, 0) == []
