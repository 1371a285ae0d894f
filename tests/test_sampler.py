"""sampler.py: against transformers, and against itself without its cache."""

import shutil

import pytest
import torch
import transformers
from conftest import SMOLLM2, write_checkpoint

import lm.flags
from lm.flags import Parser, add_model_flags
from lora import PROJECTIONS, Adapters, LoRAConfig
from sampler import Batch, choose, generate, prefill

PROMPTS = [[7, 8, 9, 10, 11], [7, 8, 9, 3], [7, 8, 9, 20, 21, 22, 23, 24, 25]]  # share [7, 8, 9]


@torch.no_grad()
def greedy(model, prompt, n, ends=()):
    """The slow way: the whole text again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + n and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def unlike(model, n: int) -> Adapters:
    """n adapters, each far from the others and from none."""
    adapters = Adapters.init(model, LoRAConfig(4, 8.0, tuple(PROJECTIONS), 1, 4), n, seed=0)
    noise = torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    adapters.flat += 0.3 * noise
    return adapters


def test_greedy_equals_decoding_without_cache(tiny):
    expected = [greedy(tiny, p, 12) for p in PROMPTS]
    assert generate(tiny, PROMPTS, 12, ()) == expected
    assert generate(tiny, PROMPTS[:1], 12, ()) == expected[:1]


def test_greedy_equals_transformers_on_smollm2(smollm2, tok):
    reference = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    questions = ("Name a colour.", "What is 2 + 2? Answer briefly.")
    prompts = [tok.chat([{"role": "user", "content": c}]) for c in questions]
    for prompt, ours in zip(prompts, generate(smollm2, prompts, 12, tok.end_ids)):
        ids = torch.tensor([prompt])
        theirs = reference.generate(ids, max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert ours == theirs[: len(ours)].tolist()


def test_finished_rows_leave_and_the_others_go_on(tiny):
    full = [greedy(tiny, p, 20) for p in PROMPTS]
    ends = {full[0][3], full[2][0]}  # ends row 0 after at most 4 tokens, row 2 after one
    expected = [greedy(tiny, p, 20, ends) for p in PROMPTS]
    sizes = []
    heard = [[] for _ in PROMPTS]
    tell = {"tick": sizes.append, "on_token": lambda n, t: heard[n].append(t)}
    assert generate(tiny, PROMPTS, 20, ends, **tell) == expected == heard
    assert sizes[0] == 3 and sizes[-1] < 3 and sum(sizes) == sum(map(len, expected))


def test_copies_that_have_finished_leave(tiny):
    """Of three prompts that begin alike, three copies each: those that go on say what they would
    have said among all."""
    options = {"temperature": 1.0, "seed": 5, "copies": 3}
    full, sizes = generate(tiny, PROMPTS, 15, (), **options), []
    ends = {full[0][2], full[4][1], full[5][0], full[8][4]}  # all copies of none, and some of each
    expected = []
    for ids in full:
        stops = [k for k, t in enumerate(ids) if t in ends]
        expected.append(ids[: stops[0] + 1] if stops else ids)
    assert generate(tiny, PROMPTS, 15, ends, tick=sizes.append, **options) == expected
    assert sizes[0] == 9 and sizes[-1] < 9 and sum(sizes) == sum(map(len, expected))


def test_sampling_is_seeded_and_does_not_depend_on_the_batch(tiny):
    options = {"temperature": 1.0, "top_p": 0.95, "copies": 3}
    first = generate(tiny, PROMPTS, 15, (), seed=5, **options)
    assert first == generate(tiny, PROMPTS, 15, (), seed=5, **options)
    assert first != generate(tiny, PROMPTS, 15, (), seed=6, **options)
    for order in ([0], [2, 0, 1], [1, 1, 2]):  # fewer, other order, one twice
        expected = [text for i in order for text in first[3 * i : 3 * i + 3]]
        assert expected == generate(tiny, [PROMPTS[i] for i in order], 15, (), seed=5, **options)
    assert len({tuple(t) for t in first}) == 9  # copies differ from each other


def test_each_row_decodes_under_its_own_adapter(tiny):
    adapters = unlike(tiny, 3)
    prompts, owner = [*PROMPTS, PROMPTS[0], [4, 5, 6]], [0, 2, 2, 1, 2]  # unequal numbers
    alone = []
    for p, o in zip(prompts, owner):
        alone += generate(tiny, [p], 16, (), adapters=adapters.pick([o]))
    assert generate(tiny, prompts, 16, (), adapters=adapters, owner=owner) == alone
    assert alone[0] != alone[3]  # same prompt, other adapter
    ends, cut = {alone[3][2], alone[0][4]}, []  # whole candidates finish early
    for ids in alone:
        cut.append(ids[: next((k for k, t in enumerate(ids) if t in ends), 15) + 1])
    assert generate(tiny, prompts, 16, ends, adapters=adapters, owner=owner) == cut


def test_copies_under_adapters(tiny):
    """Two owners, one with two prompts, and three copies of each: greedily all copies are alike."""
    adapters, alone = unlike(tiny, 2), []
    for p, o in zip(PROMPTS, (1, 0, 1)):
        alone += generate(tiny, [p], 8, (), adapters=adapters.pick([o])) * 3
    assert generate(tiny, PROMPTS, 8, (), adapters=adapters, owner=[1, 0, 1], copies=3) == alone


def test_nucleus():
    logits = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log()
    picks = {u: int(choose(logits, 1.0, 0.9, torch.tensor([u]))) for u in (0.0, 0.6, 0.7, 0.9999)}
    assert picks == {0.0: 0, 0.6: 0, 0.7: 1, 0.9999: 1}
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits.expand(20_000, 4), 1.0, 0.95, u)
    shares, expected = (
        torch.bincount(chosen, minlength=4) / 20_000,
        torch.tensor([0.6, 0.3, 0.08, 0.0]),
    )
    torch.testing.assert_close(shares, expected / 0.98, atol=0.01, rtol=0)
    flat = torch.zeros(1, 1000)  # the nucleus is larger than the first 256 tokens
    assert len({int(choose(flat, 1.0, 0.9, torch.tensor([k / 500]))) for k in range(500)}) == 500
    assert int(choose(logits, 0.0, 1.0, torch.tensor([0.99]))) == 0
    peaked = torch.full((1000,), -30.0).index_fill(0, torch.tensor([7]), 0.0)
    both = torch.stack([peaked, flat[0], peaked])  # each row has its own nucleus
    assert choose(both, 1.0, 0.9, torch.tensor([0.99, 0.5, 0.01])).tolist() == [7, 450, 7]


def test_the_cache_grows_as_it_is_needed(tiny, monkeypatch):
    """A few tokens at a time, for the rows that are not finished: with the same texts, and never
    with room for all that could follow."""
    options = {"temperature": 1.0, "seed": 3, "copies": 8}
    ends = list(range(0, tiny.config.vocab_size, 10))
    monkeypatch.setattr("sampler.ROOM", 1000)
    at_once = generate(tiny, PROMPTS, 20, ends, **options)
    assert len(set(map(len, at_once))) > 2  # rows end at several steps
    grown, extend = [], Batch.extend

    def watched(batch, tokens):
        extend(batch, tokens)
        grown.append(batch.own[0].shape[1::2])  # rows, places

    monkeypatch.setattr("sampler.ROOM", 2)
    monkeypatch.setattr(Batch, "extend", watched)
    assert generate(tiny, PROMPTS, 20, ends, **options) == at_once
    rows, places = [list(own) for own in zip(*grown)]
    alive = [sum(len(own) > n for own in at_once) for n in range(3, 20, 2)]  # where it is full
    assert rows == [n for n in alive if n] and places == sorted(set(places))


@torch.no_grad()
def test_a_batch_reads_what_prompts_have_in_common_once(tiny):
    """Prompts of two owners, and then parts of unequal length: the states are those of each row
    read alone."""
    prompts, owner = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [1, 7]], [0, 0, 3, 3]
    more = [[8], [9, 10, 11], [12, 13], [14]]
    batch, x = prefill(tiny, prompts, owner, 3)
    assert (batch.prefix[0].size(1), batch.prefix[0].size(3)) == (2, 2)  # rows, places
    assert batch.counts == [2, 2] and batch.length == 2
    assert batch.valid.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 1, 0]]
    for part in (None, more):
        if part:
            batch.extend(3)
            x = batch.read(part)[torch.tensor([len(p) for p in part]).cumsum(0) - 1]
        whole = [torch.tensor([p + (part[n] if part else [])]) for n, p in enumerate(prompts)]
        alone = [tiny(ids)[0, -1] for ids in whole]
        torch.testing.assert_close(tiny.head(x), torch.stack(alone), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_forks_repeats_takes_back_and_drops_rows(tiny):
    """Two beginnings, three rows that go on from them, two of each, and then fewer and fewer: at
    every step each row's states are those of all that it has read, read alone."""
    batch, texts = Batch(tiny, [0, 1], room=5), [[], []]

    def read(*parts):
        states = batch.read(list(parts)).split([len(part) for part in parts])
        for n, (part, x) in enumerate(zip(parts, states)):
            texts[n] = texts[n] + part
            expected = tiny(torch.tensor([texts[n]]))[0, -len(part) :]
            torch.testing.assert_close(tiny.head(x), expected, atol=1e-5, rtol=1e-4)

    read([5, 6, 7, 8, 9], [10, 11, 12])
    batch.fork([2, 1], room=3)
    texts = [texts[0], texts[0], texts[1]]
    read([13, 14, 15], [16], [17, 18])
    batch.keep([0, 0, 1, 1, 2, 2])
    texts = [texts[n // 2] for n in range(6)]
    assert batch.owner == [0, 0, 0, 0, 1, 1] and batch.counts == [4, 2]
    batch.extend(8)
    before = list(texts)
    read([19], [20, 21], [22, 23], [24], [25], [26])
    batch.take_back(2)
    texts = before
    read([27], [28], [29], [30], [31], [32])
    sizes = []
    for kept in ([0, 3, 5], [1, 2], [1]):  # a beginning is dropped with the last row that has it
        batch.keep(kept)
        texts = [texts[n] for n in kept]
        read(*[[33 + n] * (1 + n) for n in range(len(kept))])
        sizes.append((batch.prefix[0].size(1), batch.own[0].size(1), batch.counts, batch.owner))
    assert sizes == [(2, 3, [2, 1], [0, 0, 1]), (2, 2, [1, 1], [0, 1]), (1, 1, [1], [1])]


def test_an_id_that_no_text_has_is_never_sampled(tiny):
    first = greedy(tiny, PROMPTS[0], 1)[0]
    for temperature in (0.0, 50.0):  # nearly flat
        tiny.unused = torch.tensor([first, *range(100, 49_152)])
        new = generate(tiny, PROMPTS[:1], 30, (), temperature=temperature, seed=1)[0]
        assert new != [first] * 30 and first not in new and max(new) < 100


def test_the_tokenizer_says_which_ids_no_text_has(tiny_folder, tmp_path):
    def load(rows):
        folder = write_checkpoint(tmp_path / str(rows), "smollm2", vocab_size=rows)
        shutil.copy(tiny_folder / "tokenizer.json", folder)
        parser = Parser()
        add_model_flags(parser)
        options = ["--device", "cpu", "--dtype", "float32"]
        return lm.flags.load(parser.parse_args(["--model", str(folder), *options]))

    model = load(49_155)[0]
    assert model.unused.tolist() == [49_152, 49_153, 49_154]
    assert load(49_152)[0].unused.tolist() == []
    with pytest.raises(SystemExit, match=r"'.*' with id 49151, config.json a vocab_size of 49151"):
        load(49_151)


def test_a_prompt_without_room_is_one_clear_line(tiny):
    with pytest.raises(SystemExit, match="a prompt of 2000 tokens with room for 49 more is longer"):
        generate(tiny, [[5] * 2000], 49, ())


def test_each_prompt_has_its_own_number_of_copies(tiny):
    """The first copies of a prompt are the same, however many there are of it and of others."""
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 3}
    three = generate(tiny, PROMPTS, 6, (), copies=3, **options)
    some = generate(tiny, PROMPTS, 6, (), copies=[1, 3, 2], **options)
    assert some == [three[0], *three[3:6], *three[6:8]]
    assert len({tuple(ids) for ids in three}) == 9
