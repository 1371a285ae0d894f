"""bench.py: its work is what it says, both sides do the same work, and FLOPs are counted right."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bench
import scaling
from checkpoint import load_model
from common import read_json, write_json
from data.qa import load_passages
from inner import Example, Study, inner_update
from lora import PROJECTIONS, Adapters, LoRAConfig
from model import packed_mask
from selfedit import generate, parse, sentences
from tests.baselines import Baseline


def examples(*lengths):
    return [Example(tuple(7 * (n + t) % 211 for t in range(n)), (True,) * n) for n in lengths]


@pytest.fixture
def sides(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "smollm2")
    return load_model(folder, "cpu", "float32"), Baseline(folder, torch.float32)


def test_the_work_is_real():
    passages, edits = load_passages(ROOT / bench.WORK), read_json(ROOT / bench.WORK)["self_edits"]
    texts = {p.id: sentences(p.text) for p in passages}
    assert [e["passage"] for e in edits] == [p.id for p in passages for _ in range(4)] and len(passages) == 16
    for e in edits:  # of each part, ended or cut off
        about = zip(e["parts"], texts[e["passage"]], strict=True)
        notes = [{n for ended in (True, False) for n in parse(text, "questions", ended, of)[0]} for text, of in about]
        assert set(e["notes"]) <= set().union(*notes)
        assert {f"Question: {q}" for m in e["mended"] if m for q in m.split("\n")} <= {n.split("\n")[0] for n in e["notes"]}
    assert len({tuple(e["parts"]) for e in edits}) > 60


@pytest.mark.parametrize("packed", [False, True])
def test_both_sides_train_alike(packed, sides):
    """A row of its own each; and packed rows, some of which share a prompt, which the other repeats."""
    model, other = sides
    config, mine = LoRAConfig(4, 8.0, ("q_proj", "v_proj"), 1, 4), examples(20, 13, 28)
    study = Study(lr=1e-2, epochs=3, row_len=0)
    if packed:
        prompt = examples(9)[0].ids
        mine += [Example(prompt + e.ids, (False,) * 9 + e.counts) for e in examples(7, 12, 5)]
        study = Study(lr=1e-2, steps=4, row_len=40)
    [outcome] = inner_update(model, Adapters.init(model, config, 1, 0), [mine], [study], seed=0)
    batches = bench.Bench.batches(SimpleNamespace(args=SimpleNamespace(seed=0)), mine, study)
    assert other.train(Adapters.init(model, config, 1, 0), batches, study) == pytest.approx(outcome.losses, rel=1e-3)
    other.trainer_steps(Adapters.init(model, config, 1, 0), mine, study, 1, pad=64)


def test_a_share_of_the_work_is_scaled(monkeypatch):
    """Ours 2 s for a quarter of the work; the other 1 s to set up, which it does 8 times in all, and 2 s for a tenth."""
    b = object.__new__(bench.Bench)
    b.args, b.rows, b.other = SimpleNamespace(repeats=3), [], SimpleNamespace(setup=0.0)

    def other():
        b.other.setup += 1.0
        return 3.0

    monkeypatch.setattr(bench, "timed", lambda run: run())
    b.versus("quiz", lambda: 2.0, "other", other, part=4, other_part=10, setups=8)
    [row] = b.rows
    assert (row["ours_s"], row["other_s"], row["ratio"]) == (8.0, 28.0, 3.5) and row["scaled"] and row["ours_scaled"]
    assert "| ~8.00 s | ~28.0 s | 3.50 |" in scaling.table(b.rows)[2]


def test_parts_that_are_not_run_keep_their_rows(tmp_path):
    b, head, file = object.__new__(bench.Bench), {"machine": "m", "dtype": "torch.float32"}, tmp_path / "bench.json"
    rows = [{"work": work} for work in ("load", "quiz", "quiz-merged", "population-16")]
    write_json(file, head | {"rows": rows, "mfu": {"inner": 0.5}, "minutes": 40, "commands": ["python bench.py"]})
    b.args = SimpleNamespace(only=["quiz"], out=file)
    assert b.keep_others(head) == ([rows[0], rows[3]], ["python bench.py"], 40) and b.mfu == {"inner": 0.5}
    with pytest.raises(SystemExit, match="error: .*bench.json was measured with machine m, not n"):
        b.keep_others(head | {"machine": "n"})
    b.args.only = list(bench.PARTS)
    assert b.keep_others(head) == ([], [], 0.0)


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


def test_flops_are_those_that_torch_counts(sides, monkeypatch):
    model, _ = sides
    monkeypatch.setattr("model.Linear.may_block", lambda linear: False)  # torch does not count blocked products
    config, mine = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 2, 4), [examples(40, 40, 40), examples(40, 40)]
    study = Study(steps=3, row_len=0)
    assert scaling.looks((2, 1, 3)) == packed_mask(torch.tensor([[0, 0, 1, 2, 2, 2]])).sum()
    with FlopCounterMode(display=False) as counter:
        inner_update(model, Adapters.init(model, config, 2, 0), mine, [study] * 2, seed=0)
    counted = scaling.inner_flops(model, mine, config, study)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_readmes_table_is_the_committed_result():
    result, readme = read_json(ROOT / "results" / "bench.json"), (ROOT / "README.md").read_text()
    works = {row["work"] for row in result["rows"]}
    assert {"load", "inner-strict", "inner-paper", "inner-fast", "quiz", "sampling", "round", "compile"} <= works
    assert all(line in readme for line in scaling.table(result["rows"]))
