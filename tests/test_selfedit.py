"""selfedit.py: the sampler against transformers and against itself, prompts, parsing."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SMOLLM2

from data.qa import Passage
from inner import Example
from lora import PROJECTIONS, Adapters, LoRAConfig
from sampler import choose, generate, prefill
from selfedit import EXAMPLE_NAMES, EXAMPLE_PASSAGE, STYLES, ask_for_notes, edit_prompts, parse, policy_example, sentences

PROMPTS = [[7, 8, 9, 10, 11], [7, 8, 9, 3], [7, 8, 9, 20, 21, 22, 23, 24, 25]]  # share [7, 8, 9]


@torch.no_grad()
def greedy(model, prompt, n, ends=()):
    """The slow way: the whole text again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_decoding_without_cache(tiny):
    expected = [greedy(tiny, p, 12) for p in PROMPTS]
    assert generate(tiny, PROMPTS, 12, ()) == expected
    assert generate(tiny, PROMPTS[:1], 12, ()) == expected[:1]


def test_greedy_equals_transformers_on_smollm2(smollm2, tok):
    reference = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    prompts = [tok.chat([{"role": "user", "content": c}]) for c in ("Name a colour.", "What is 2 + 2? Answer briefly.")]
    for prompt, ours in zip(prompts, generate(smollm2, prompts, 12, tok.end_ids)):
        theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert ours == theirs[: len(ours)].tolist()


def test_finished_rows_leave_and_the_others_go_on(tiny):
    full = [greedy(tiny, p, 20) for p in PROMPTS]
    ends = {full[0][3], full[2][0]}  # ends row 0 after at most 4 tokens, row 2 after one
    expected = [greedy(tiny, p, 20, ends) for p in PROMPTS]
    sizes = []
    assert generate(tiny, PROMPTS, 20, ends, tick=sizes.append) == expected
    assert sizes[0] == 3 and sizes[-1] < 3 and sum(sizes) == sum(map(len, expected))


def test_sampling_is_seeded_and_does_not_depend_on_the_batch(tiny):
    options = {"temperature": 1.0, "top_p": 0.95, "copies": 3}
    first = generate(tiny, PROMPTS, 15, (), seed=5, **options)
    assert first == generate(tiny, PROMPTS, 15, (), seed=5, **options) != generate(tiny, PROMPTS, 15, (), seed=6, **options)
    assert first[:3] == generate(tiny, PROMPTS[:1], 15, (), seed=5, **options)
    assert len({tuple(t) for t in first}) == 9  # copies differ from each other


def test_each_row_decodes_under_its_own_adapter(tiny):
    adapters = Adapters.init(tiny, LoRAConfig(4, 8.0, tuple(PROJECTIONS), 1, 4), 3, seed=0)
    adapters.flat += 0.3 * torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    prompts, owner = [*PROMPTS, PROMPTS[0], [4, 5, 6]], [0, 2, 2, 1, 2]  # unequal numbers per candidate
    alone = [generate(tiny, [p], 16, (), adapters=adapters.pick([o]))[0] for p, o in zip(prompts, owner)]
    assert generate(tiny, prompts, 16, (), adapters=adapters, owner=owner) == alone
    assert alone[0] != alone[3]  # same prompt, other adapter
    ends = {alone[3][2], alone[0][4]}  # whole candidates finish early
    cut = [t[: next((k for k, i in enumerate(t) if i in ends), 15) + 1] for t in alone]
    assert generate(tiny, prompts, 16, ends, adapters=adapters, owner=owner) == cut


def test_copies_under_adapters(tiny):
    """Two owners, one with two prompts, and three copies of each: greedily all copies are alike."""
    adapters = Adapters.init(tiny, LoRAConfig(4, 8.0, tuple(PROJECTIONS), 1, 4), 2, seed=0)
    adapters.flat += 0.3 * torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    alone = [generate(tiny, [p], 8, (), adapters=adapters.pick([o]))[0] for p, o in zip(PROMPTS, (1, 0, 1))]
    copies = generate(tiny, PROMPTS, 8, (), adapters=adapters, owner=[1, 0, 1], copies=3)
    assert copies == [t for t in alone for _ in range(3)]


def test_nucleus():
    logits = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log()
    picks = {u: int(choose(logits, 1.0, 0.9, torch.tensor([u]))) for u in (0.0, 0.6, 0.7, 0.9999)}
    assert picks == {0.0: 0, 0.6: 0, 0.7: 1, 0.9999: 1}
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(choose(logits.expand(20_000, 4), 1.0, 0.95, u), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.08, 0.0]) / 0.98, atol=0.01, rtol=0)
    flat = torch.zeros(1, 1000)  # the nucleus is larger than the first 256 tokens
    assert len({int(choose(flat, 1.0, 0.9, torch.tensor([k / 500]))) for k in range(500)}) == 500
    assert int(choose(logits, 0.0, 1.0, torch.tensor([0.99]))) == 0


@torch.no_grad()
def test_a_batch_reads_what_prompts_have_in_common_once(tiny):
    """Prompts of two owners, and then parts of unequal length: the states are those of each row read alone."""
    prompts, owner, more = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [1, 7]], [0, 0, 3, 3], [[8], [9, 10, 11], [12, 13], [14]]
    batch, x = prefill(tiny, prompts, owner, 3)
    assert [block.length for block in batch.cache.blocks] == [2, 2]
    assert batch.valid.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 1, 0]]
    for part in (None, more):
        if part:
            batch.cache.extend(3)
            x = batch.read(part)[torch.tensor([len(p) for p in part]).cumsum(0) - 1]
        whole = [torch.tensor([p + (part[n] if part else [])]) for n, p in enumerate(prompts)]
        alone = [tiny(ids)[0, -1] for ids in whole]
        torch.testing.assert_close(tiny.head(x), torch.stack(alone), atol=1e-5, rtol=1e-4)


# -----------------------------------------------------------------------------
# prompts and parsing


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


def test_a_quoted_note_answers_with_the_sentence(tok):
    """The model writes the questions alone, and the policy imitates them alone: each once, and none that was cut off."""
    args = SimpleNamespace(style="questions", shots=1)
    _, read = ask_for_notes(tok, [Passage("p", "Rolm", "Rolm is a town. It sells bricks.", ())], args)
    asked = "What is Rolm?\nIt is a town.", "1. What does it sell?\n"
    what, sells = (
        "Question: What is Rolm?\nAnswer: Rolm is a town.",
        "Question: What does it sell?\nAnswer: It sells bricks.",
    )
    mended = ["What is Rolm?", "What does it sell?"]
    made = read("p", [(asked[0], True), (asked[1] + "2. Who s", False)])
    assert made == {"style": "questions", "notes": [what, sells], "mended": mended, "flaws": ["", "endless"], "flaw": ""}
    made = read("p", [(asked[0], True), (asked[1] + asked[1].replace("1.", "Question 2:"), True)])
    assert (made["notes"], made["mended"], made["flaws"]) == ([what, sells], mended, ["", "repeats"])
    _, read = ask_for_notes(tok, [Passage("p", "Rolm", "Rolm is\na town. It\n sells bricks.\n", ())], args)
    assert read("p", [(asked[0], True), (asked[1], True)])["notes"] == [what, sells]  # wrapped: still one line
    with pytest.raises(ValueError):
        read("p", [(asked[0], True)])  # a part is missing


def test_what_is_imitated_can_be_parsed_again(tok):
    """An empty line between two versions, as the prompt asks; without the third one, which was cut off."""
    args = SimpleNamespace(style="rewrite", shots=1)
    _, read = ask_for_notes(tok, [Passage("p", "Rolm", "Rolm is a town.", ())], args)
    [mended] = read("p", [("Version 1: A is B.\nSo C.\n\nD is E.\n\nF", False)])["mended"]
    assert mended == "A is B. So C.\n\nD is E." and parse(mended, "rewrite", True) == (["A is B. So C.", "D is E."], "")


def test_sentences():
    assert sentences("Rolm fell.  So did Varbon! Is 1.5\nmuch?\n") == ["Rolm fell.", "So did Varbon!", "Is 1.5 much?"]
    assert sentences("Dr. J. Quell met Mrs. Marn. St. Ambrel fell.") == ["Dr. J. Quell met Mrs. Marn.", "St. Ambrel fell."]


def test_a_self_edit_in_parts(tok):
    """Notes of all parts together, each once; only a self-edit without a sound part is flawed."""
    args = SimpleNamespace(style="sentence-qa", shots=1)
    prompts, read = ask_for_notes(tok, [Passage("p", "Rolm", "Rolm is a town. It sells bricks.", ())], args)
    assert list(prompts) == ["p"] and len(prompts["p"]) == 2
    one, two = "Question: What is Rolm?\nAnswer: A town.", "Question: What sells bricks?\nAnswer: Rolm."
    made = read("p", [(f"{one}\n{two}", True), (f"{one}\nQuestion: Wh", False)])
    assert (made["notes"], made["mended"]) == ([one, two], [f"{one}\n{two}", one])
    assert (made["flaws"], made["flaw"]) == (["", "endless"], "")
    assert read("p", [("Sure!", True), ("Question: What", False)])["flaw"] == "malformed"
    made = read("p", [("Sure!", True), (two, True)])
    assert (made["notes"], made["flaws"], made["flaw"]) == ([two], ["malformed", ""], "")
    bell = "Question: Who sold it?\nAnswer: Hessa Lorn sold it."  # out of the worked example: studied, but with a flaw
    made = read("p", [(bell, True), (two, True)])
    assert (made["notes"], made["mended"], made["flaws"]) == ([bell, two], ["", two], ["copied", ""])
    args.shots = 0
    made = read("p", [(bell, True), (two, True)])
    assert (made["mended"], made["flaws"]) == ([bell, two], ["", ""])
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
        ("sentence-qa", "Question: Q?\nAnswer: A\n" * 2, True, (["Question: Q?\nAnswer: A"], "repeats")),
        ("sentence-qa", "Question: Q?\nAnswer: A\nQuestion: Q?\nAnswer: A", False, (["Question: Q?\nAnswer: A"], "endless")),
        ("implications", "1742 was the year.\n10.5 tons.\n-40 degrees.", True,
         (["1742 was the year.", "10.5 tons.", "-40 degrees."], "")),
        ("implications", "<|im_end|> __import__('os')", True, (["<|im_end|> __import__('os')"], "")),
    ],
)  # fmt: skip
def test_parsing(style, text, ended, expected):
    assert parse(text, style, ended, "B is A.") == expected


def test_the_policy_is_trained_on_the_reply(tok):
    e = policy_example(tok, [5, 6, 7], "A fact.", weight=-1.0)
    assert e == Example((5, 6, 7, *tok.encode("A fact."), tok.end_ids[0]), (False,) * 3 + (True,) * (len(e.ids) - 3), -1.0)
