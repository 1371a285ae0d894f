"""bench.py: its work is what it says, both sides do the same work, and FLOPs are counted right."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bench
import scaling
from checkpoint import load_model
from common import read_json
from data.qa import load_passages
from inner import Example, Study, inner_update, pack, plan_steps
from lora import PROJECTIONS, Adapters, LoRAConfig
from selfedit import generate, parse
from tests.baselines import Baseline


def examples(*lengths):
    return [Example(tuple(7 * (n + t) % 211 for t in range(n)), (True,) * n) for n in lengths]


@pytest.fixture
def sides(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "smollm2")
    return load_model(folder, "cpu", "float32"), Baseline(folder, torch.float32)


def test_the_work_is_real():
    passages, edits = load_passages(ROOT / bench.WORK), read_json(ROOT / bench.WORK)["self_edits"]
    assert [e["passage"] for e in edits] == [p.id for p in passages for _ in range(4)] and len(passages) == 16
    assert all(e["notes"] in (parse(e["text"], "implications", ended)[0] for ended in (True, False)) for e in edits)
    assert len({e["text"] for e in edits}) > 60


def test_both_sides_train_alike(sides):
    model, other = sides
    config, study, mine = (
        LoRAConfig(4, 8.0, ("q_proj", "v_proj"), 1, 4),
        Study(lr=1e-2, epochs=3, row_len=0),
        examples(20, 13, 28),
    )
    [outcome] = inner_update(model, Adapters.init(model, config, 1, 0), [mine], [study], seed=0)
    rows = pack([len(e.ids) for e in mine], 0)
    batches = [[mine[rows[r][0]] for r in step] for step in plan_steps(3, study, 0)]
    assert other.train(Adapters.init(model, config, 1, 0), batches, study) == pytest.approx(outcome.losses, rel=1e-3)
    other.trainer_steps(Adapters.init(model, config, 1, 0), mine, study, 1, pad=64)


def test_both_sides_answer_alike(sides):
    model, other = sides
    adapters = Adapters.init(model, LoRAConfig(4, 8.0, tuple(PROJECTIONS), 0, 4), 2, 0)
    adapters.flat += 0.1 * torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    prompts = [list(e.ids) for e in examples(9, 14, 11, 9)]
    theirs, answers = other.attach(adapters), []
    for n in range(2):
        theirs.set_adapter(str(n))
        answers += other.generate(prompts[2 * n : 2 * n + 2], 6, theirs)
    assert generate(model, prompts, 6, (), adapters=adapters, owner=[0, 0, 1, 1]) == answers


def test_flops_are_those_that_torch_counts(sides):
    model, _ = sides
    config, study, mine = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 2, 4), Study(epochs=3), [examples(40), examples(40)]
    with FlopCounterMode(display=False) as counter:
        outcomes = inner_update(model, Adapters.init(model, config, 2, 0), mine, [study] * 2, seed=0)
    counted = scaling.inner_flops(SimpleNamespace(model=model), mine, config, study, sum(o.tokens for o in outcomes))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_readmes_table_is_the_committed_result():
    result, readme = read_json(ROOT / "results" / "bench.json"), (ROOT / "README.md").read_text()
    works = {row["work"] for row in result["rows"]}
    assert {"load", "inner-strict", "inner-paper", "inner-fast", "quiz", "sampling", "round", "compile"} <= works
    assert all(line in readme for line in scaling.table(result["rows"]))
