"""inner.py: a population learns exactly what its candidates would learn alone, and what PEFT would teach them."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import write_checkpoint

import inner
from checkpoint import load_model
from inner import Example, Study, arrange, backward_through_head, inner_update, make_row, pack, plan_steps, shared_prefix
from lora import PROJECTIONS, Adapters, LoRAConfig
from rows import Forks, Ragged

ALL = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 0, 4)
TOP = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 2, 4)


def same_change(a, b, start):
    """Two trained adapters agree: AdamW divides by the gradient's size, so single numbers near zero may differ more."""
    return (a - b).norm() <= 1e-3 * (b - start).norm()


def example(length, seed, weight=1.0, skip=0):
    ids = torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids), tuple(t >= skip for t in range(length)), weight)


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "base", "smollm2")


@pytest.fixture
def model(folder):
    return load_model(folder, "cpu", "float32")


CANDIDATES = [  # unlike in everything: lengths, number of sequences, masks, learning rate, epochs, clip, schedule
    ([example(30, 1), example(9, 2), example(17, 3)], Study(lr=1e-2, epochs=3, row_len=40)),
    ([example(12, 4)], Study(lr=3e-2, epochs=5, clip=0.05, row_len=40)),
    (
        [example(21, 1), example(40, 5, skip=8), example(33, 6)],
        Study(lr=5e-3, steps=4, schedule="cosine", row_len=40),
    ),
]


@pytest.mark.parametrize("config", [ALL, TOP, LoRAConfig(2, 4.0, ("q_proj", "v_proj"), 1, 3)])
def test_population_update_equals_separate_updates(model, config):
    together = Adapters.init(model, config, 3, seed=0)
    outcomes = inner_update(model, together, [e for e, _ in CANDIDATES], [s for _, s in CANDIDATES], seed=0)
    for p, (examples, study) in enumerate(CANDIDATES):
        alone = Adapters.init(model, config, 1, seed=0)
        [outcome] = inner_update(model, alone, [examples], [study], seed=0)
        assert same_change(together.flat[p], alone.flat[0], Adapters.init(model, config, 1, seed=0).flat[0])
        assert outcome.steps == outcomes[p].steps and math.isclose(outcome.loss, outcomes[p].loss, rel_tol=1e-4)
    assert [o.steps for o in outcomes] == [6, 5, 4]


@pytest.mark.parametrize("start", [0, 2])
def test_same_training_as_peft(model, folder, start):
    """The paper's way, one unpadded sequence a step, against peft + torch's AdamW + transformers' linear schedule."""
    config, examples = LoRAConfig(4, 8.0, ("q_proj", "v_proj"), start, 4), [example(20, 1), example(13, 2), example(28, 3)]
    study, adapters = Study(lr=1e-2, epochs=3, clip=0.02, row_len=0), Adapters.init(model, config, 1, seed=0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = list(range(start, 4))
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    theirs = peft.get_peft_model(base, lora)
    params = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for path in adapters.slots:
            name = f"base_model.model.model.{path}.lora_A.default.weight"
            params[name].copy_(adapters.views(adapters.flat, path)[0][0])
    optimizer = torch.optim.AdamW(params.values(), lr=study.lr, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 9)
    clipped = []
    rows = pack([len(e.ids) for e in examples], row_len=0)  # the longest first
    for [step] in plan_steps(3, study, seed=0):
        ids = torch.tensor([examples[rows[step][0]].ids])
        theirs(input_ids=ids, labels=ids).loss.backward()
        clipped.append(float(torch.nn.utils.clip_grad_norm_(params.values(), study.clip)) > study.clip)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    assert any(clipped)
    inner_update(model, adapters, [examples], [study], seed=0)
    for path in adapters.slots:
        for part, ours in zip("AB", adapters.views(adapters.flat, path)):
            expected = params[f"base_model.model.model.{path}.lora_{part}.default.weight"]
            torch.testing.assert_close(ours[0], expected.detach(), atol=2e-4, rtol=1e-3)


def test_base_weights_stay_and_only_a_and_b_get_gradients(model, monkeypatch):
    before, touched = {n: p.clone() for n, p in model.named_parameters()}, set()
    step = inner.train_step

    def spy(model, lora, active, taken):
        result = step(model, lora, active, taken)
        touched.update(n for n, p in model.named_parameters() if p.grad is not None or p.requires_grad)
        wrapped = [m for m in model.modules() if hasattr(m, "scale")]
        assert wrapped and all(m.a.grad.abs().sum() > 0 or m.b.grad.abs().sum() > 0 for m in wrapped)
        return result

    monkeypatch.setattr(inner, "train_step", spy)
    inner_update(model, Adapters.init(model, TOP, 3, 0), [e for e, _ in CANDIDATES], [s for _, s in CANDIDATES], seed=0)
    assert not touched
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_diverged_candidate_stops_alone(model):
    studies = [Study(lr=1e-2, epochs=4), Study(lr=1e30, epochs=4, clip=1e30), Study(lr=1e-2, epochs=4)]
    adapters = Adapters.init(model, TOP, 3, 0)
    outcomes = inner_update(model, adapters, [[example(20, 1)]] * 3, studies, seed=0)
    alone = Adapters.init(model, TOP, 1, 0)
    inner_update(model, alone, [[example(20, 1)]], studies[:1], seed=0)
    assert [o.diverged for o in outcomes] == [False, True, False]
    assert outcomes[1].steps < 4 and math.isfinite(outcomes[1].loss)  # of the last step that counted
    for p in (0, 2):
        assert same_change(adapters.flat[p], alone.flat[0], Adapters.init(model, TOP, 1, 0).flat[0])


def test_packed_rows_give_the_gradients_of_separate_rows(model):
    """One step on a packed row equals one step on the same sequences in rows of their own, all in one batch."""
    lengths = (30, 9, 17)
    flats = []
    for row_len, batch in ((100, 1), (0, 3)):
        adapters, study = Adapters.init(model, ALL, 1, 0), Study(lr=1e-2, steps=1, row_len=row_len, batch=batch)
        inner_update(model, adapters, [[example(n, n) for n in lengths]], [study], seed=0)
        flats.append(adapters.flat)
    assert same_change(*flats, Adapters.init(model, ALL, 1, 0).flat)


def test_lower_layers_run_once_per_distinct_row(model, monkeypatch):
    seen = []
    batch = inner._lower_batch
    monkeypatch.setattr(inner, "_lower_batch", lambda model, rows, stop: seen.extend(rows) or batch(model, rows, stop))
    shared, other, study = example(20, 1), example(9, 2), Study(epochs=4, row_len=0)
    inner_update(model, Adapters.init(model, TOP, 2, 0), [[shared, other], [shared]], [study] * 2, seed=0)
    assert sorted(ids for ids, _ in seen) == sorted({shared.ids, other.ids})


@pytest.mark.parametrize("config", [ALL, TOP])
def test_a_prompt_read_once_teaches_the_same(model, config, monkeypatch):
    """Three questions under one prefix of 12 tokens, and a text: packed, they learn what they learn in rows of their own."""
    prefix = example(12, 1).ids
    asked = [Example(prefix + example(n, n).ids, (False,) * skip + (True,) * (12 + n - skip)) for n, skip in TAILS]
    texts, flats, shapes, layout = [example(14, 5), *asked], [], [], inner.layout
    monkeypatch.setattr(inner, "layout", lambda rows: shapes.append(layout(rows)) or shapes[-1])
    for row_len, batch in ((64, 2), (0, 4)):
        adapters, study = Adapters.init(model, config, 1, 0), Study(lr=1e-2, steps=2, row_len=row_len, batch=batch)
        inner_update(model, adapters, [texts], [study], seed=0)
        flats.append(adapters.flat)
    assert same_change(*flats, Adapters.init(model, config, 1, 0).flat)
    assert {type(shape) for shape, _ in shapes} == {Forks, Ragged}  # packed, and all in rows of their own
    assert arrange(asked, 12) == [([1], 12), ([0], 12), ([2], 12)]  # no room beside the prefix: a row each
    assert arrange(texts, 64) == [([2, 1, 3], 12), ([0], 0)]  # 12 + 29 tokens, and 14
    assert shared_prefix(asked) == 12 and shared_prefix(texts) == 0 and shared_prefix(asked[:1]) == 0
    assert arrange([example(12, 1), example(12, 1)], 64) == [([0, 1], 0)]  # counted: no prompt
    other = [Example((7, *e.ids), (False, *e.counts)) for e in asked]
    assert shared_prefix(asked + other) == 0  # no common beginning


TAILS = ((9, 12), (14, 20), (6, 12))  # length after the prefix, first counted token


def test_loss_in_chunks_equals_the_whole(model):
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, weight = torch.arange(37), torch.linspace(0.1, 2, 37)
    whole = F.cross_entropy(model.head(x), target, reduction="none")
    [expected] = torch.autograd.grad((whole * weight).sum(), x)
    nll = backward_through_head(model, x, target, weight, chunk=8)
    torch.testing.assert_close(nll, whole.detach())
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [ALL, TOP])
def test_only_counted_tokens_are_learned(model, config):
    """Tokens that do not count are context: the loss is the mean over the others, each predicted by the token before."""
    e = example(20, 1, skip=15)
    [outcome] = inner_update(model, Adapters.init(model, config, 1, 0), [[e]], [Study(steps=1)], seed=0)
    with torch.no_grad():
        logits = model(torch.tensor([e.ids]))[0]
    assert math.isclose(outcome.loss, F.cross_entropy(logits[14:19], torch.tensor(e.ids[15:])).item(), rel_tol=1e-4)


def test_a_negative_weight_unlearns(model):
    def loss_after(weight):
        study, adapters = Study(lr=1e-2, steps=5, schedule="constant"), Adapters.init(model, ALL, 1, 0)
        [outcome] = inner_update(model, adapters, [[example(20, 1, weight)]], [study], seed=0)
        return outcome.loss / weight

    assert loss_after(1.0) < loss_after(-1.0) - 0.1


def test_bfloat16_base_learns_like_float32(folder):
    losses = {"float32": [], "bfloat16": []}
    for dtype, seen in losses.items():
        model = load_model(folder, "cpu", dtype)
        adapters, study = Adapters.init(model, TOP, 2, 0), Study(lr=1e-2, steps=12)
        examples = [[example(20, 1)], [example(31, 2)]]
        inner_update(model, adapters, examples, [study] * 2, 0, lambda n, loss, seen=seen: seen.append(loss))
        assert adapters.flat.dtype == torch.float32
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3) and seen[-1] < seen[0] - 0.2


def test_rows_as_documented():
    assert pack([60, 50, 30, 70], 128) == [[0, 1], [3, 2]]
    assert pack([60, 50, 30, 70], 100) == [[1, 2], [3], [0]]  # two rows would do for 210 tokens, but none splits so
    assert pack([30, 300, 60], 128) == [[1], [2, 0]]
    assert len(pack([300] + [60] * 10, 128)) == 6 and pack([50, 60], 0) == [[1], [0]] and pack([], 128) == []
    row = make_row([Example((5, 6, 7), (True,) * 3), Example((8, 9), (True,) * 2)])
    assert row.at.tolist() == [0, 1, 3] and row.target.tolist() == [6, 7, 9]
    assert row.pos.tolist() == [0, 1, 2, 0, 1] and row.lengths == (0, 3, 2)
    row = make_row([Example((5, 6, 7), (False, False, True)), Example((5, 6, 8, 9), (False, False, False, True))], prefix=2)
    assert row.ids.tolist() == [5, 6, 7, 8, 9] and row.pos.tolist() == [0, 1, 2, 2, 3]
    assert row.lengths == (2, 1, 2) and row.at.tolist() == [1, 3] and row.target.tolist() == [7, 9]


def test_plans():
    for n_rows, study, total in ((3, Study(epochs=2), 6), (3, Study(epochs=2, batch=2), 4), (3, Study(steps=7), 7)):
        plan = plan_steps(n_rows, study, seed=1)
        assert len(plan) == total == len(plan_steps(n_rows, study, seed=1))
        assert sorted(r for step in plan[: total // 2 if study.epochs == 2 and not study.steps else 3] for r in step) == [
            0,
            1,
            2,
        ]
    assert plan_steps(0, Study(steps=3), seed=0) == []
    alone, beside = plan_steps(2, Study(epochs=3), seed=0), plan_steps(2, Study(epochs=3), seed=0, slots=5)
    assert [step for step in beside if step] == alone and len(beside) > len(alone)  # [] is a pause
    longest = plan_steps(5, Study(epochs=3), seed=0, slots=5)
    assert all(mine in ([], theirs) for mine, theirs in zip(beside, longest))  # rows of like rank together
    s = Study(lr=1.0)
    assert [s.lr_at(k, 4) for k in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert Study(lr=1.0, schedule="cosine").lr_at(2, 4) == pytest.approx(0.5)


def test_sequences_of_a_row_are_attended_to_apart_where_that_is_less_work():
    prompt = example(10, 1).ids
    notes = [Example(prompt + example(40, n).ids, (False,) * 10 + (True,) * 40) for n in range(6)]
    row, passage = make_row(notes, 10), make_row([example(200, 7)])
    shape, masks = inner.layout([row])
    assert isinstance(shape, Forks) and masks[1].shape == (6, 40, 64)  # the head is padded to 24
    assert isinstance(inner.layout([passage])[0], Ragged)  # no head
    assert isinstance(inner.layout([row, passage])[0], Ragged)  # the notes would be padded to 200


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_teach_the_same(model, backend):
    """Rows of unequal length, and in the next step sequences after a prompt, which are attended to apart."""
    config, flats, prompt = LoRAConfig(4, 8.0, ("q_proj", "down_proj"), 3, 4), [], example(16, 9).ids
    asked = [Example(prompt + example(n, n).ids, (False,) * 16 + (True,) * n) for n in (30, 32, 28, 31)]
    candidates = [[example(40, 1), *asked], [example(33, 2), *asked[:3]]]
    for _ in range(2):
        adapters = Adapters.init(model, config, 2, 0)
        inner_update(model, adapters, candidates, [Study(lr=1e-2, steps=2, row_len=160)] * 2, seed=0)
        flats.append(adapters.flat)
        model.compile_blocks(backend)
    assert same_change(*flats, Adapters.init(model, config, 2, 0).flat)
