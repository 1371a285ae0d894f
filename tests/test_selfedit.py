"""selfedit.py: prompts, parsing, and the record that a sampled text becomes."""

import json
from types import SimpleNamespace

import pytest
from conftest import dies_at

from data.qa import Passage
from data.text import sentences
from lm.packing import Example
from selfedit import (
    EXAMPLE_NAMES,
    EXAMPLE_PASSAGE,
    STYLES,
    Part,
    SelfEdit,
    edit_prompts,
    note_prompts,
    note_reader,
    parse,
    policy_example,
    write_self_edits,
)


def reader(style: str, text: str, shots: int = 1):
    """read(id, texts) of sample_self_edits() for notes on a passage "p"."""
    return note_reader([Passage("p", "Rolm", text, ())], SimpleNamespace(style=style, shots=shots))


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
    one, two = Part(asked[0], [what], imitated[0]), Part(cut, [sells], imitated[1], "endless")
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


def test_sentences():
    assert sentences("Rolm fell.  So did Varbon! Is 1.5\nmuch?\n") == [
        "Rolm fell.",
        "So did Varbon!",
        "Is 1.5 much?",
    ]
    assert sentences("Dr. J. Quell met Mrs. Marn. St. Ambrel fell.") == [
        "Dr. J. Quell met Mrs. Marn.",
        "St. Ambrel fell.",
    ]


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
    # Out of the worked example: learnt, but with a flaw.
    bell = "Question: Who sold it?\nAnswer: Hessa Lorn sold it."
    made = read("p", [(bell, True), (two, True)])
    assert made.notes == [bell, two]
    assert (targets(made), flaws(made)) == (["", two], ["copied", ""])
    made = reader("sentence-qa", passage.text, shots=0)("p", [(bell, True), (two, True)])
    assert (targets(made), flaws(made)) == ([bell, two], ["", ""])
    assert all(name in EXAMPLE_PASSAGE for name in EXAMPLE_NAMES)


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
    assert len({e.parts[1].text for e in whole}) > 9  # copies differ
    calls = dies_at(monkeypatch, "selfedit.generate", 2)
    with pytest.raises(KeyboardInterrupt):
        write_self_edits(tiny, tok, *how, tmp_path / "b.jsonl")
    assert write_self_edits(tiny, tok, *how, tmp_path / "b.jsonl") == whole
    first, killed, *again = [len(prompts) for _, prompts, *_ in calls]
    assert again[0] == killed and first + sum(again) == 18
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
