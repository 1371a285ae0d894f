"""lm/grid.py: in fixed shapes a population learns what it learns end to end, and each shape is
compiled once, as one graph."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_inner import CONFIGS, EXAMPLES, TOP, example, same_change

import inner
from data.qa import Passage, Question
from inner import SFTConfig, inner_update
from lm.grid import FixedRows, Step, grid_of, size_of
from lm.packing import Example, make_row
from lora import PROJECTIONS, Adapters, LoRAConfig, merged
from quiz import ask, quiz_items
from sampler import generate


class Counted:
    """A backend that runs each graph as it is, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both(model, config, examples, configs, backend):
    """(outcomes, adapters) end to end, and with a compiled step; and the adapters at the start."""
    found, n = [], len(examples)
    for step in (None, Step(backend)):
        model.step, adapters = step, Adapters.init(model, config, n, 0)
        found.append((inner_update(model, adapters, examples, configs, 0), adapters.flat))
    model.step = None
    return *found, Adapters.init(model, config, 1, 0).flat[0]


def agree(one, other, start) -> None:
    for p, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        assert (a.tokens, a.diverged) == (b.tokens, b.diverged)
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
        if not a.diverged:
            assert same_change(one[1][p], other[1][p], start)


@pytest.mark.parametrize("config", [TOP, LoRAConfig(2, 4.0, ("q_proj", "v_proj"), 1, 3)])
def test_the_same_is_learnt(model, config):
    """By candidates that are unlike in everything, beside one with nothing to learn; one of them
    expects what a teacher does."""
    others = torch.tensor([[t, 7] for t in example(12, 5).ids[1:]], dtype=torch.int32)
    taught = replace(example(12, 4), soft=(others, torch.tensor([[0.75, 0.25]] * 11).half()))
    examples, configs = [*EXAMPLES, [], [taught, example(9, 3)]], [*CONFIGS, CONFIGS[0], CONFIGS[1]]
    agree(*both(model, config, examples, configs, Counted()))


def test_one_that_diverges_is_alone(model):
    """Its neighbours learn as if it were not there."""
    rates = (1e-2, 1e38, 2e-2)
    examples, configs = [], []
    for n, lr in enumerate(rates):
        examples.append([example(20, n)])
        configs.append(SFTConfig(lr=lr, steps=6, row_len=40))
    one, other, start = both(model, TOP, examples, configs, Counted())
    assert [o.diverged for o in other[0]] == [False, True, False]
    for p in (0, 2):
        assert one[0][p].losses == pytest.approx(other[0][p].losses, rel=1e-4)
        assert same_change(one[1][p], other[1][p], start)


def test_lower_states_of_each_step(model, monkeypatch):
    config = LoRAConfig(2, 4.0, ("q_proj",), 3, 4)
    monkeypatch.setattr(inner, "KEPT_STATES", 0)
    agree(*both(model, config, EXAMPLES, CONFIGS, Counted()))


def test_each_shape_is_compiled_once(model):
    """Populations of other sizes, texts and numbers of steps have the same few shapes."""
    backend, config = Counted(), LoRAConfig(2, 4.0, ("q_proj",), 3, 4)
    model.step = Step(backend)
    graphs = []
    texts = [(30, 9, 17), (21, 33), (12, 40, 38, 8), (25, 26, 27)]
    for seed, sizes in enumerate([*texts, *texts[::-1]]):
        for n in (5, 7):
            examples = [[example(size, 10 * seed + p) for size in sizes] for p in range(n)]
            configs = [SFTConfig(lr=1e-2, steps=2 + p, row_len=40) for p in range(n)]
            inner_update(model, Adapters.init(model, config, n, 0), examples, configs, seed)
            graphs.append(backend.graphs)
    assert graphs[-1] == graphs[7] <= 1 + 3  # AdamW, and three shapes at most


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_real_backends(model, backend):
    """Most of the time is the compiler's, so one projection of one layer adapts."""
    config = LoRAConfig(4, 8.0, ("down_proj",), 3, 4)
    examples, configs = [[example(20, 1)], [example(30, 2)]], [SFTConfig(lr=1e-2, steps=2)] * 2
    configs = [replace(c, row_len=40) for c in configs]
    agree(*both(model, config, examples, configs, backend))


def test_a_grid_by_hand():
    """Two candidates: one row with a prefix of 1 token and two sequences, and after it another row;
    one row. Sizes are 8 and 4 times a power of two."""
    prefixed = make_row([Example.reply([5], [6, 7]), Example.reply([5], [8])], prefix=1)
    plain = make_row([Example((1, 2), (True, True))])
    grid = grid_of([[prefixed, plain], [plain], []], 4, 8)
    assert grid.token.shape == (4, 8) and grid.at.shape == (4, 4)
    assert grid.token[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert grid.token[1].tolist() == [6, 7, 0, 0, 0, 0, 0, 0]
    assert grid.segment[0].tolist() == [0, 1, 1, 2, 4, 4, -1, -1]
    assert grid.prefix[0].tolist() == [0, 0, 0, 0, 3, 3, -2, -2]
    assert grid.pos[0].tolist() == [0, 1, 2, 1, 0, 1, 0, 0]
    assert grid.at[0].tolist() == [0, 1, 0, 4] and grid.target[0, :, 0].tolist() == [6, 7, 8, 2]
    assert grid.weight.tolist() == [[0.25] * 4, [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert [size_of(n, 32) for n in (0, 32, 33, 65)] == [32, 32, 64, 128]


def test_a_token_held_for_impossible_is_no_divergence(model):
    with torch.no_grad():
        model.norm.weight.mul_(1e4)
    sft = SFTConfig(lr=1e-6, steps=1, row_len=40)
    one, other, _ = both(model, TOP, [[example(20, 1)]], [sft], Counted())
    assert math.isfinite(other[0][0].loss) and other[0][0].loss == pytest.approx(one[0][0].loss)


# -----------------------------------------------------------------------------
# decoding


def unlike(model, n: int) -> Adapters:
    adapters = Adapters.init(model, LoRAConfig(4, 8.0, tuple(PROJECTIONS), 1, 4), n, seed=0)
    draw = torch.Generator().manual_seed(1)
    adapters.flat += 0.3 * torch.randn(adapters.flat.shape, generator=draw)
    return adapters


PROMPTS = [[7, 8, 9, 10, 11], [7, 8, 9, 3], [7, 8, 9, 20, 21, 22, 23], [9, 9], [7, 8, 30]]


def both_ways(model, step, *args, **options) -> list:
    found = []
    for own in (None, step):
        model.step = own
        found.append(generate(model, *args, **options))
    model.step = None
    return found


def alike(one: list, other: list) -> bool:
    """But for a row, or a tenth of them: rounding may decide which word is next."""
    return sum(a != b for a, b in zip(one, other, strict=True)) <= max(1, len(one) // 10)


@pytest.mark.parametrize("copies", [1, [3, 1, 2, 1, 5]])
@pytest.mark.parametrize("owner", [None, [2, 0, 2, 1, 2], [4, 4, 4, 4, 4]])
def test_the_same_is_said(model, owner, copies):
    """By rows that share a prompt, in part or as a whole, under unlike adapters or none."""
    step, adapters = Step(Counted()), unlike(model, 5) if owner else None
    options = {"temperature": 1.0, "seed": 3, "copies": copies, "adapters": adapters}
    one, other = both_ways(model, step, PROMPTS, 40, (), owner=owner, **options)
    assert alike(one, other) and len({tuple(ids) for ids in one}) == len(one)


def test_rows_that_have_finished_leave_and_the_cache_grows(model, monkeypatch):
    options = {"temperature": 1.0, "seed": 5, "copies": 4}
    full = generate(model, PROMPTS, 280, (), **options)
    ends = set(range(211)) - set(full[0][:270])  # so that one goes on, and others do not
    sizes, real = [], FixedRows.lay

    def lay(self, places):
        real(self, places)
        sizes.append(tuple(self.cache[0].shape[1:3]))

    monkeypatch.setattr(FixedRows, "lay", lay)
    one, other = both_ways(model, Step(Counted()), PROMPTS, 280, ends, **options)
    assert alike(one, other) and 1 < len({len(ids) for ids in one})
    assert sizes[0] == (32, 256) and sizes[-1] == (8, 512)


@pytest.mark.parametrize("length", [254, 255, 256, 257])
def test_prompts_that_just_fit(model, length):
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 211, (n,), generator=draw).tolist() for n in (length, length - 9)]
    one, other = both_ways(model, Step(Counted()), prompts, 4, ())
    assert one == other


def test_adapters_whose_rows_have_finished_leave(model):
    """One adapter's rows all do, and others' go on as they would."""
    adapters, owner, n = unlike(model, 5), [3, 0, 3, 1, 3], 40
    options = {"temperature": 1.0, "seed": 2, "copies": 4, "adapters": adapters, "owner": owner}
    full = generate(model, PROMPTS, n, (), **options)
    of_1 = {t for ids in full[12:16] for t in ids[:3]}
    one, other = both_ways(model, Step(Counted()), PROMPTS, n, of_1, **options)
    assert alike(one, other) and max(map(len, one[12:16])) <= 3 < max(map(len, one))


def test_a_quiz_is_scored_alike(tiny, tok):
    """Its reference answers are read by the batch before the rows go on."""
    passage = Passage("p", "Rolm", "", (Question("Who?", ("Ada Quell",)), Question("Why?", ("x",))))
    items, found = quiz_items(tok, passage, 0), []
    for step in (None, Step(Counted())):
        tiny.step = step
        found.append(ask(tiny, tok, items, unlike(tiny, 1), max_new=6))
    tiny.step = None
    assert found[0] == found[1] and len(found[0]) == 2


def test_each_shape_of_rows_is_compiled_once(model):
    """However many rows there are, and under whatever adapters or weights."""
    backend = Counted()
    model.step, graphs = Step(backend), []
    for turn in range(2):
        for n in (9, 10, 15, 16, 3, 4):
            prompts = [[7, k, 9] for k in range(n)]
            generate(model, prompts, 20, ())
            graphs.append(backend.graphs)
        adapters = unlike(model, 2)
        adapters.flat += turn
        owner = [k % 2 for k in range(4)]
        with merged(model, unlike(model, 1)):
            generate(model, prompts[:4], 20, (), adapters=adapters, owner=owner)
        graphs.append(backend.graphs)
    model.step = None
    assert graphs[0] == 1 and graphs[5] == 2 and graphs[6] == 3 == graphs[-1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_real_backends_say_the_same(model, backend):
    adapters, owner = unlike(model, 2), [0, 1, 0, 1, 0]
    how = {"adapters": adapters, "owner": owner}
    one, other = both_ways(model, Step(backend), PROMPTS, 12, (), **how)
    assert alike(one, other)


def test_no_triton():
    """What is compiled without inductor needs none."""
    code = """
import sys, torch
from lm.grid import Step, adamw
flat, count = torch.ones(2, 3), torch.zeros(2)
yes = torch.ones(2, dtype=torch.bool)
Step("aot_eager").adamw(flat, flat, flat + 0, flat + 0, count, count, count, yes, yes, count)
sys.exit("triton" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
