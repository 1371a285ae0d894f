"""reward.py: what a teacher expects, as what is trained on; many adapters into one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_inner import ALL, TOP, example, folder, model  # noqa: F401

from inner import SFTConfig, inner_update, lay_rows, train_step
from lora import Adapters, attached, merged
from reward import consolidate, predictions


def test_what_a_model_expects_is_no_news_to_it(model):  # noqa: F811
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


def test_many_adapters_into_one(model):  # noqa: F811
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


def test_unlike_shapes_are_refused(model):  # noqa: F811
    teachers = [Adapters.init(model, config, 1, 0) for config in (TOP, ALL)]
    with pytest.raises(SystemExit, match="with other --rank, .* cannot be put together"):
        consolidate(model, teachers, [[example(9, 1)]] * 2, [], SFTConfig(), 0)


def test_too_long_for_the_teacher(model):  # noqa: F811
    long = example(model.config.max_seq_len + 1, 1)
    with pytest.raises(SystemExit, match="is longer than the model's context"):
        predictions(model, [long])
