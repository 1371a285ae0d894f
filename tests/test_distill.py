"""reward.py: what a teacher expects, as what is trained on; many adapters into one."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from test_inner import ALL, TOP, example

from data.qa import Passage
from experiments import distill
from inner import SFTConfig, inner_update, lay_rows, train_step
from lm.packing import Example
from lora import Adapters, attached, merged
from reward import consolidate, expecting, predictions
from selfedit import Part, SelfEdit


def test_what_a_model_expects_is_no_news_to_it(model):
    """Of its own predictions, all of them, a model has nothing to learn: the gradient is none. Of a
    token beside them, in the same row, it has."""
    e = example(20, 1, skip=15)
    [soft] = predictions(model, [e], k=model.config.vocab_size)
    ids, shares = soft
    assert len(ids) == sum(e.counts) and math.isclose(shares[0].float().sum(), 1, abs_tol=1e-3)
    with torch.no_grad():
        p = model(torch.tensor([e.ids]))[0, 14:19].softmax(-1)
    assert ids[:, 0].tolist() == p.argmax(-1).tolist()  # the most likely one first
    grads = []
    for examples in ([replace(e, soft=soft)], [replace(e, soft=soft), example(9, 2)]):
        adapters = Adapters.init(model, ALL, 1, 0)
        with attached(model, adapters) as lora:
            [rows] = lay_rows(model, [examples], [SFTConfig(row_len=64)], ALL.start)
            _, grad = train_step(model, lora, [0], [rows])
            grads.append(float(grad.norm()))
    assert grads[0] < 1e-2 * grads[1]  # shares are kept in half precision


def test_many_adapters_into_one(model):
    """One adapter comes to expect what each teacher does on its own sequence, and the base model's
    predictions elsewhere are left as they were."""
    own, anchor = [[example(14, n)] for n in (1, 2)], example(14, 3)
    teachers = []
    for n, examples in enumerate(own):
        teachers.append(Adapters.init(model, TOP, 1, n))
        inner_update(model, teachers[-1], [examples], [SFTConfig(lr=2e-2, steps=20)], 0)

    def off(adapter) -> list[float]:
        """How far its predictions are from the teachers', and the base model's on the anchor."""
        found = []
        for teacher, e in [*zip(teachers, (own[0][0], own[1][0])), (None, anchor)]:
            logp = []
            for a in (teacher, adapter):
                with torch.no_grad(), merged(model, a):
                    logp.append(model(torch.tensor([e.ids]))[0, :-1].log_softmax(-1))
            found.append(F.kl_div(logp[1], logp[0], log_target=True, reduction="batchmean").item())
        return found

    config = SFTConfig(lr=2e-2, steps=40)
    one, outcome = consolidate(model, teachers, own, [anchor], config, seed=0)
    assert outcome.steps == 80 and one.config == TOP and len(one) == 1
    without, _ = consolidate(model, teachers, own, [], config, seed=0)
    before, after = off(teachers[0]), off(one)
    assert after[0] < 0.3 and after[1] < 0.2 * before[1]
    assert after[2] < 0.5 * off(without)[2]


def test_unlike_shapes_are_refused(model):
    teachers = [Adapters.init(model, config, 1, 0) for config in (TOP, ALL)]
    with pytest.raises(SystemExit, match="with other --rank, .* cannot be put together"):
        consolidate(model, teachers, [[example(9, 1)]] * 2, [], SFTConfig(), 0)


def test_too_long_for_the_teacher(model):
    long = example(model.config.max_seq_len + 1, 1)
    with pytest.raises(SystemExit, match="is longer than the model's context"):
        predictions(model, [long])


def test_half_of_what_a_teacher_says():
    """Beside the token itself; of tokens that count, the first of all is never predicted."""
    ids, shares = torch.tensor([[7, 8], [9, 7]]).int(), torch.tensor([[0.75, 0.25]] * 2)
    for e in (Example((1, 2, 3), (True,) * 3), Example((1, 2, 3), (False, True, True))):
        [half] = expecting([e], [(ids, shares)], 0.5)
        assert half.soft[0].tolist() == [[2, 7, 8], [3, 9, 7]]
        assert half.soft[1].tolist() == [[0.5, 0.375, 0.125]] * 2 and half.ids == e.ids
        [whole] = expecting([e], [(ids, shares)])
        assert whole.soft[0] is ids


def test_the_teacher_sees_the_passage(tiny, tok, monkeypatch):
    seen = []

    def predictions(model, examples):
        seen.extend(tok.decode(e.ids) for e in examples)
        nothing = [torch.zeros(sum(e.counts), 1) for e in examples]
        return [(zeros.int(), zeros + 1) for zeros in nothing]

    monkeypatch.setattr(distill, "predictions", predictions)
    p = Passage("x", "Rolm", "Rolm was founded by Ada Quell.", ())
    note = "Question: Who founded Rolm?\nAnswer: Rolm was founded by Ada Quell."
    [student] = distill.in_view(tiny, tok, p, [note])
    assert seen[0].count(p.text) == 2 and tok.decode(student.ids).count(p.text) == 1
    assert len(student.soft[0]) == sum(student.counts)


def test_the_experiment(tiny_folder, passages_file, tmp_path, monkeypatch):
    def write(model, tok, passages, copies, args, seed, log):
        notes = "Question: Who founded {0}?\nAnswer: {0} was founded."
        return [SelfEdit(p.id, [Part("", [notes.format(p.title)])]) for p in passages]

    monkeypatch.setattr(distill, "write_self_edits", write)
    taught, real = [], distill.in_view
    monkeypatch.setattr(distill, "in_view", lambda *a: taught.append(a[-1]) or real(*a))
    args = ["--data", passages_file, "--limit", 2, "--steps", 2, "--top-layers", 2, "--rank", 2]
    args += ["--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    run_script(monkeypatch, distill, tiny_folder, *args)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["share"] for row in rows] == [0, 0.5, 1] and taught == [0.5, 0.5, 1.0, 1.0]
    assert rows[0]["against_hard"]["delta"] == 0 and len({row["tokens"] for row in rows}) == 1
    losses = []
    for share in ("0", "0.5", "1"):
        lines = (tmp_path / f"work/share-{share}.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["loss"])
    assert len(set(losses)) == 3
    with pytest.raises(SystemExit):
        run_script(monkeypatch, distill, tiny_folder, *args, "--shares", 0)
