"""inner.py: a population learns exactly what its candidates would learn alone, and what PEFT would
teach them."""

import math
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import load_swapped

import inner
import lm.kernels
from inner import (
    SFTConfig,
    backward_through_head,
    inner_update,
    plan_steps,
    train_step,
    update_one,
)
from lm.checkpoint import load_model
from lm.packing import Example, Packed, SharedPrefix, pack
from lora import PROJECTIONS, Adapters, LoRAConfig

ALL = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 0, 4)
TOP = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 2, 4)


def same_change(a, b, start):
    """Two trained adapters agree: AdamW divides by the gradient's size, so single numbers near zero
    may differ more."""
    return (a - b).norm() <= 1e-3 * (b - start).norm()


def example(length, seed, weight=1.0, skip=0):
    ids = torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids), tuple(t >= skip for t in range(length)), weight)


def behind(prompt, length, seed, skip=None):
    """An example that begins with `prompt`. Its first `skip` tokens do not count; without `skip`,
    those of the prompt."""
    skip = len(prompt) if skip is None else skip
    counts = (False,) * skip + (True,) * (len(prompt) + length - skip)
    return Example(prompt + example(length, seed).ids, counts)


# Unlike in everything: lengths, number of sequences, masks, learning rate, epochs, clip, schedule.
# The last one's sequences begin alike.
PROMPT = example(10, 7).ids
CANDIDATES = [
    (
        [example(30, 1), example(9, 2), example(17, 3)],
        SFTConfig(lr=1e-2, epochs=3, row_len=40),
    ),
    ([example(12, 4)], SFTConfig(lr=3e-2, epochs=5, clip=0.05, row_len=40)),
    (
        [example(21, 1), example(40, 5, skip=8), example(33, 6)],
        SFTConfig(lr=5e-3, steps=4, schedule="cosine", row_len=40),
    ),
    (
        [behind(PROMPT, 9, 8), example(11, 9), behind(PROMPT, 14, 10), behind(PROMPT, 6, 11)],
        SFTConfig(lr=1e-2, steps=3, row_len=44, batch=2),
    ),
]
EXAMPLES, CONFIGS = zip(*CANDIDATES)


@pytest.mark.parametrize("load", [load_model, load_swapped], ids=["plain", "swapped in"])
@pytest.mark.parametrize("config", [ALL, TOP, LoRAConfig(2, 4.0, ("q_proj", "v_proj"), 1, 3)])
def test_population_update_equals_separate_updates(folder, config, load):
    model = load(folder, "cpu", "float32") if load is load_model else load(folder)
    fresh = Adapters.init(model, config, 1, seed=0).flat[0]
    together = Adapters.init(model, config, 4, seed=0)
    outcomes = inner_update(model, together, EXAMPLES, CONFIGS, seed=0)
    for p, (examples, sft) in enumerate(CANDIDATES):
        alone = Adapters.init(model, config, 1, seed=0)
        [outcome] = inner_update(model, alone, [examples], [sft], seed=0)
        assert same_change(together.flat[p], alone.flat[0], fresh)
        assert outcome.steps == outcomes[p].steps and outcome.tokens == outcomes[p].tokens
        assert math.isclose(outcome.loss, outcomes[p].loss, rel_tol=1e-4)
    assert [o.steps for o in outcomes] == [6, 5, 4, 3]


@pytest.mark.parametrize("start", [0, 2])
def test_same_training_as_peft(model, folder, start):
    """The paper's way, one unpadded sequence a step, against peft + torch's AdamW + transformers'
    linear schedule."""
    config = LoRAConfig(4, 8.0, ("q_proj", "v_proj"), start, 4)
    examples = [example(20, 1), example(13, 2), example(28, 3)]
    sft = SFTConfig(lr=1e-2, epochs=3, clip=0.02, row_len=0)
    adapters = Adapters.init(model, config, 1, seed=0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    where = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(range(start, 4))}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **where))
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for path in adapters.places:
            name = f"base_model.model.model.{path}.lora_A.default.weight"
            params[name].copy_(adapters.views(adapters.flat, path)[0][0])
    optimizer = torch.optim.AdamW(params.values(), lr=sft.lr, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 9)
    clipped = []
    rows = pack([len(e.ids) for e in examples], row_len=0)  # the longest first
    for [step] in plan_steps(3, sft, seed=0):
        ids = torch.tensor([examples[rows[step][0]].ids])
        theirs(input_ids=ids, labels=ids).loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(params.values(), sft.clip))
        clipped.append(norm > sft.clip)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    assert any(clipped)
    inner_update(model, adapters, [examples], [sft], seed=0)
    for path in adapters.places:
        for part, ours in zip("AB", adapters.views(adapters.flat, path)):
            expected = params[f"base_model.model.model.{path}.lora_{part}.default.weight"]
            torch.testing.assert_close(ours[0], expected.detach(), atol=2e-4, rtol=1e-3)


def test_base_weights_stay_and_only_a_and_b_get_gradients(model):
    before, touched, steps = {n: p.clone() for n, p in model.named_parameters()}, set(), []

    def spy(model, lora, active, taken):
        result = train_step(model, lora, active, taken)
        steps.append(active)
        named = list(model.named_parameters())
        touched.update(n for n, p in named if p.grad is not None or p.requires_grad)
        wrapped = [m for m in model.modules() if hasattr(m, "scale")]
        sizes = [(m.a.grad.abs().sum(), m.b.grad.abs().sum()) for m in wrapped]
        assert wrapped and all(a > 0 or b > 0 for a, b in sizes)
        return result

    adapters = Adapters.init(model, TOP, 4, 0)
    inner_update(model, adapters, EXAMPLES, CONFIGS, seed=0, one_step=spy)
    assert steps and not touched
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_diverged_candidate_stops_alone(model):
    good, bad = SFTConfig(lr=1e-2, epochs=4), SFTConfig(lr=1e30, epochs=4, clip=1e30)
    adapters = Adapters.init(model, TOP, 3, 0)
    outcomes = inner_update(model, adapters, [[example(20, 1)]] * 3, [good, bad, good], seed=0)
    alone = Adapters.init(model, TOP, 1, 0)
    inner_update(model, alone, [[example(20, 1)]], [good], seed=0)
    assert [o.diverged for o in outcomes] == [False, True, False]
    # The loss is that of the last step that counted.
    assert outcomes[1].steps < 4 and math.isfinite(outcomes[1].loss)
    for p in (0, 2):
        assert same_change(adapters.flat[p], alone.flat[0], Adapters.init(model, TOP, 1, 0).flat[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", [{"steps": 3}, {"epochs": 3}])
def test_nothing_to_learn_from(dtype, plan, folder):
    """No sequence, no token that counts, none that is predicted: nothing is learnt, no loss is
    made up, and a neighbour learns what it does alone."""
    model, good = load_swapped(folder, dtype=dtype), [example(12, 1, skip=6)]
    uncounted, single = Example((1, 2, 3), (False,) * 3), Example((5,), (True,))
    texts, config = [good, [], [uncounted], [single], good], SFTConfig(lr=1e-2, **plan)
    adapters = Adapters.init(model, TOP, 5, seed=0)
    before = adapters.flat.clone()
    outcomes = inner_update(model, adapters, texts, [config] * 5, seed=0)
    first, nothing, *unlearnt, last = outcomes
    assert first.loss > 0 and (first.loss, first.tokens) == (last.loss, last.tokens)
    assert (nothing.loss, nothing.steps, nothing.tokens) == (None, 0, 0)
    assert [(o.loss, o.steps) for o in unlearnt] == [(0.0, 3)] * 2
    assert not any(o.diverged for o in outcomes)
    assert torch.equal(adapters.flat[1:4], before[1:4])
    assert not torch.equal(adapters.flat[0], before[0])


def test_a_candidate_that_forgot_everything_diverged(model):
    """A huge learning rate leaves finite weights with which all tokens are equally likely."""
    taught = Adapters.init(model, ALL, 1, 0)
    texts = [[Example((5, 6, 7) * 8, (True,) * 24)]] * 3
    [first] = inner_update(model, taught, texts[:1], [SFTConfig(lr=1e-2, steps=40)], seed=0)
    adapters = taught.pick([0, 0, 0])
    adapters.flat = adapters.flat.clone()
    configs = [SFTConfig(lr=lr, steps=6) for lr in (1e-2, 1e3, 0.0)]
    outcomes = inner_update(model, adapters, texts, configs, seed=0)
    assert not first.diverged and [o.diverged for o in outcomes] == [False, True, False]
    assert abs(outcomes[1].loss - math.log(211)) < 0.01 and adapters.flat.isfinite().all()


def test_packed_rows_give_the_gradients_of_separate_rows(model):
    """One step on a packed row equals one step on the same sequences in rows of their own, all in
    one batch."""
    examples, flats = [example(n, n) for n in (30, 9, 17)], []
    for row_len, batch in ((100, 1), (0, 3)):
        adapters = Adapters.init(model, ALL, 1, 0)
        sft = SFTConfig(lr=1e-2, steps=1, row_len=row_len, batch=batch)
        inner_update(model, adapters, [examples], [sft], seed=0)
        flats.append(adapters.flat)
    assert same_change(*flats, Adapters.init(model, ALL, 1, 0).flat)


def test_lower_layers_run_once_per_distinct_row(model, monkeypatch):
    seen, batch = [], inner.lower_batch

    def spy(model, rows, stop):
        seen.extend(rows)
        return batch(model, rows, stop)

    monkeypatch.setattr(inner, "lower_batch", spy)
    shared, other, sft = example(20, 1), example(9, 2), SFTConfig(epochs=4, row_len=0)
    adapters = Adapters.init(model, TOP, 2, 0)
    inner_update(model, adapters, [[shared, other], [shared]], [sft] * 2, seed=0)
    assert sorted(ids for ids, _ in seen) == sorted({shared.ids, other.ids})


@torch.no_grad()
@pytest.mark.parametrize("tokens", [20, 2048])
def test_lower_layers_make_of_a_row_what_they_make_of_it_alone(model, tokens):
    """In whatever batches: each row comes back in its place, with its states."""
    rows = []
    for own, sft in CANDIDATES:
        for e in own:
            rows += inner.laid_out([e], sft.row_len)
    rows += rows[:2]  # equal ones
    for row, got in zip(rows, inner.with_lower_states(model, rows, 2, tokens)):
        pos = row.pos[None]
        expected = model.run_layers(
            model.embed(row.ids[None]), pos, Packed([row.lengths], model), stop=2
        )
        assert got.ids is row.ids or torch.equal(got.ids, row.ids)
        torch.testing.assert_close(got.x, expected[0], atol=1e-5, rtol=1e-4)
        assert inner.with_lower_states(model, [got], 2)[0] is got  # not again


def test_a_sequence_longer_than_the_context_is_one_clear_line(model):
    with pytest.raises(SystemExit, match="a training sequence of 2049 tokens is longer"):
        inner_update(
            model, Adapters.init(model, TOP, 1, 0), [[example(2049, 1)]], [SFTConfig()], seed=0
        )


@pytest.mark.parametrize("config", [ALL, TOP])
def test_a_prompt_read_once_teaches_the_same(model, config, monkeypatch):
    """Three questions under one prefix of 12 tokens, and a text: packed, they learn what they learn
    in rows of their own."""
    prefix, tails = example(12, 1).ids, ((9, 12), (14, 20), (6, 12))  # length, first that counts
    texts = [example(14, 5), *(behind(prefix, n, n, skip) for n, skip in tails)]
    flats, kinds, attend_to = [], set(), inner.attend_to

    def spy(rows, model):
        attend = attend_to(rows, model)
        kinds.add(type(attend))
        return attend

    monkeypatch.setattr(inner, "attend_to", spy)
    for short, row_len, batch in ((0, 64, 2), (512, 64, 2), (512, 0, 4)):
        monkeypatch.setattr("lm.packing.SHORT", short)
        adapters = Adapters.init(model, config, 1, 0)
        sft = SFTConfig(lr=1e-2, steps=2, row_len=row_len, batch=batch)
        inner_update(model, adapters, [texts], [sft], seed=0)
        flats.append(adapters.flat)
    start = Adapters.init(model, config, 1, 0).flat
    assert same_change(*flats[:2], start) and same_change(*flats[1:], start)
    assert kinds == {SharedPrefix, Packed}  # taken apart, masked, and all in rows of their own


def test_loss_in_chunks_equals_the_whole(model):
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, weight = torch.arange(37), torch.linspace(0.1, 2, 37)
    whole = F.cross_entropy(model.head(x), target, reduction="none")
    [expected] = torch.autograd.grad((whole * weight).sum(), x)
    share = torch.ones(37, 1)
    weigh = lambda nll: weight  # noqa: E731
    terms = backward_through_head(model, x, target[:, None], share, weigh, chunk=8)
    torch.testing.assert_close(terms, (weight * whole).detach())
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-4)


def test_loss_against_a_teacher(model):
    """The cross-entropy to what a teacher expects, of which some targets have a part only, and some
    positions no teacher."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(37, 64, generator=draw, requires_grad=True)
    target, weight = torch.stack([torch.arange(37), torch.arange(37) + 40], 1), torch.rand(37)
    share = torch.rand(37, 2, generator=draw)
    share /= share.sum(1, keepdim=True)
    share[5] = torch.tensor([1.0, 0.0])
    q = torch.zeros(37, model.config.vocab_size).scatter_(1, target, share)
    whole = F.cross_entropy(model.head(x), q, reduction="none")
    [expected] = torch.autograd.grad((whole * weight).sum(), x)
    weigh = lambda nll: weight  # noqa: E731
    terms = backward_through_head(model, x, target, share, weigh, chunk=8)
    torch.testing.assert_close(terms, (weight * whole).detach())
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [ALL, TOP])
def test_only_counted_tokens_are_learned(model, config):
    """Tokens that do not count are context: the loss is the mean over the others, each predicted by
    the token before."""
    e, adapters = example(20, 1, skip=15), Adapters.init(model, config, 1, 0)
    [outcome] = inner_update(model, adapters, [[e]], [SFTConfig(steps=1)], seed=0)
    with torch.no_grad():
        logits = model(torch.tensor([e.ids]))[0]
    expected = F.cross_entropy(logits[14:19], torch.tensor(e.ids[15:])).item()
    assert math.isclose(outcome.loss, expected, rel_tol=1e-4)


def test_a_negative_weight_unlearns(model):
    def loss_after(weight):
        adapters = Adapters.init(model, ALL, 1, 0)
        sft = SFTConfig(lr=1e-2, steps=5, schedule="constant")
        [outcome] = inner_update(model, adapters, [[example(20, 1, weight)]], [sft], seed=0)
        return outcome.loss / weight

    assert loss_after(1.0) < loss_after(-1.0) - 0.1


def test_bfloat16_base_learns_like_float32(folder):
    losses = {"float32": [], "bfloat16": []}
    for dtype, seen in losses.items():
        model = load_model(folder, "cpu", dtype)
        lm.kernels.swap_in(model)
        adapters, sft = Adapters.init(model, TOP, 2, 0), SFTConfig(lr=1e-2, steps=12)
        tick = lambda n, loss, seen=seen: seen.append(loss)  # noqa: E731
        inner_update(model, adapters, [[example(20, 1)], [example(31, 2)]], [sft] * 2, 0, tick)
        assert adapters.flat.dtype == torch.float32
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert seen[-1] < seen[0] - 0.2


def test_one_adapter_with_a_progress_line(model, capsys):
    """update_one() trains as inner_update() does, in place, and counts the steps."""
    examples, sft = [example(20, 1), example(13, 2)], SFTConfig(lr=1e-2, epochs=3, row_len=24)
    alone, expected = (Adapters.init(model, TOP, 1, 0) for _ in range(2))
    outcome = update_one(model, alone, examples, sft, 0, "update")
    [theirs] = inner_update(model, expected, [examples], [sft], seed=0)
    assert torch.equal(alone.flat, expected.flat) and outcome == theirs and outcome.tokens == 99
    assert capsys.readouterr().out.splitlines()[-1].startswith("update 6/6  loss ")
    update_one(model, alone, examples, replace(sft, steps=4), 0, "update")
    assert capsys.readouterr().out.splitlines()[-1].startswith("update 4/4  loss ")


def test_plans():
    for sft, total, epoch in (
        (SFTConfig(epochs=2), 6, 3),
        (SFTConfig(epochs=2, batch=2), 4, 2),
        (SFTConfig(steps=7), 7, 3),
    ):
        plan = plan_steps(3, sft, seed=1)
        assert len(plan) == total and plan == plan_steps(3, sft, seed=1)
        for first in range(0, total - epoch + 1, epoch):  # every epoch takes every row once
            assert sorted(r for step in plan[first : first + epoch] for r in step) == [0, 1, 2]
    assert plan_steps(0, SFTConfig(steps=3), seed=0) == []
    assert len({str(plan_steps(9, SFTConfig(epochs=1), seed=s)) for s in range(5)}) == 5
    two = plan_steps(9, SFTConfig(epochs=2), seed=0)
    assert two[:9] != two[9:]  # each epoch in an order of its own
    for schedule, expected in (
        ("linear", [2.0, 1.5, 1.0, 0.5]),
        ("cosine", [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]),
        ("constant", [2.0] * 4),
    ):
        s = SFTConfig(lr=2.0, schedule=schedule)
        assert [s.lr_at(k, 4) for k in range(4)] == pytest.approx(expected)


def test_with_too_many_tokens_lower_states_are_computed_in_each_step(model, monkeypatch):
    """Memory must not grow with the length of a text; what is learnt stays the same."""
    examples, flats = [[example(n, i) for n in range(3, 9)] for i in range(2)], []
    sft = SFTConfig(lr=1e-2, epochs=2, row_len=12)
    for limit in (1 << 16, 0):
        monkeypatch.setattr(inner, "KEPT_STATES", limit)
        rows = inner.lay_rows(model, examples, [sft] * 2, start=2)
        assert all((row.x is None) is (limit == 0) for own in rows for row in own)
        adapters = Adapters.init(model, TOP, 2, seed=0)
        inner_update(model, adapters, examples, [sft] * 2, seed=0)
        flats.append(adapters.flat)
    torch.testing.assert_close(flats[0], flats[1], atol=1e-5, rtol=1e-4)
