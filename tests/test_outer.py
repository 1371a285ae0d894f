"""lm/outer.py and experiments/outer.py: the outer update that learns from what earned less, too,
and the ways to reinforce side by side."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dies_at, one_note, run_script
from test_inner import example

import reward
import train_outer
from experiments import outer as experiment
from inner import Outcome, SFTConfig, laid_out, train_step, update_one
from lm.files import chunks, read_json, read_jsonl, write_jsonl
from lm.outer import CLIP, GAP, KL, RULES, by_gradient, log_probs
from lm.packing import Example, make_row, shared_prefix
from lm.tokenizer import Tokenizer
from lora import PROJECTIONS, Adapters, LoRAConfig, attached
from reward import GRADIENTS, advantages, select, to_imitate
from selfedit import Part, SelfEdit, settings_of

ALL = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 0, 4)
PROMPT = list(example(9, 1).ids)


def samples(*weights):
    """A prompt and a sample of other length after it, for each weight."""
    found = []
    for n, weight in enumerate(weights):
        found.append(Example.reply(PROMPT, list(example(5 + 3 * n, 2 + n).ids), weight))
    return found


def away(model, seed, size=0.02):
    adapters = Adapters.init(model, ALL, 1, 0)
    adapters.flat += size * torch.randn(
        adapters.flat.shape, generator=torch.Generator().manual_seed(seed)
    )
    return adapters


def of_sample(model, lora, e):
    """Log-probabilities of the sampled tokens, plainly, with gradients for A and B."""
    logp = model(torch.tensor([e.ids]))[0].log_softmax(-1)
    predicted = [t for t in range(1, len(e.ids)) if e.counts[t]]
    return logp[[t - 1 for t in predicted], [e.ids[t] for t in predicted]]


def rows_of(rule, examples):
    if rule == "pairs":
        return [make_row(pair, shared_prefix(pair)) for pair in chunks(examples, 2)]
    return laid_out(examples, 40)


def with_before(rows, examples, model, old):
    """The rows, as by_gradient() makes them."""
    base = log_probs(model, rows)
    with attached(model, old):
        before = log_probs(model, rows)
    return [replace(r, before=torch.stack(b, 1)) for r, b in zip(rows, zip(before, base))]


def test_log_probabilities(tiny):
    examples = samples(1.0, 1.0, 1.0)
    rows = laid_out(examples, 30)
    assert len(rows) == 2 and any(row.lengths[0] for row in rows)
    expected = sorted(float(of_sample(tiny, None, e).sum()) for e in examples)
    one_each = [float(p.sum()) for p in log_probs(tiny, laid_out(examples, 0))]
    assert sorted(one_each) == pytest.approx(expected, rel=1e-4)
    packed = sum(float(p.sum()) for p in log_probs(tiny, rows))
    assert packed == pytest.approx(sum(expected), rel=1e-4)


def objective(rule, model, lora, examples, before):
    """What the papers minimise, a mean over the tokens of a step, in plain autograd. before {ids:
    (old, base)}."""
    total, tokens = 0.0, sum(sum(e.counts) for e in examples)
    if rule == "grpo":
        for e in examples:
            logp, (old, base) = of_sample(model, lora, e), before[e.ids]
            r = (logp - old).exp()
            gain = torch.minimum(r * e.weight, r.clamp(1 - CLIP, 1 + CLIP) * e.weight)
            apart = (base - logp).exp() - (base - logp) - 1
            total = total - (gain - KL * apart).sum()
        return total / tokens
    for best, worst in chunks(examples, 2):
        changes = [(of_sample(model, lora, e) - before[e.ids][0]).mean() for e in (best, worst)]
        both = sum(best.counts) + sum(worst.counts)
        total = total + both * (changes[0] - changes[1] - GAP) ** 2
    return total / tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [0.0, 0.3])
def test_the_gradient_is_that_of_the_papers_objective(rule, size, tiny):
    """At the policy that sampled, and away from it, where some ratios are clipped."""
    weights = (1.0, -1.0, 1.0, -1.0) if rule == "pairs" else (1.3, -0.9, 0.2, -1.7)
    examples, old = samples(*weights), away(tiny, 1)
    now = away(tiny, 1)
    now.flat += away(tiny, 2, size).flat - Adapters.init(tiny, ALL, 1, 0).flat
    before = {}
    for e in examples:
        [row] = with_before(laid_out([e], 0), [e], tiny, old)
        before[e.ids] = row.before.unbind(1)
    rows = with_before(rows_of(rule, examples), examples, tiny, old)
    with attached(tiny, now) as lora:
        _, got = train_step(tiny, lora, [0], [rows], weigh=RULES[rule])
        got = got.clone()
        lora.bind([0], train=True)
        objective(rule, tiny, lora, examples, before).backward()
        expected = lora.gradients()
        ratios = []
        for e in examples:
            ratios += (of_sample(tiny, lora, e) - before[e.ids][0]).exp().tolist()
    assert (got - expected).norm() <= 1e-3 * expected.norm() > 0
    beyond = [r for r in ratios if not 1 - CLIP < r < 1 + CLIP]
    assert bool(beyond) is (size > 0) and len(beyond) < len(ratios)


@pytest.mark.parametrize("rule", RULES)
def test_the_better_becomes_likelier_and_the_worse_less_likely(rule, tiny):
    examples, policy = samples(1.0, -1.0), Adapters.init(tiny, ALL, 1, 0)
    before = [float(p.mean()) for p in log_probs(tiny, laid_out(examples, 0))]
    config = SFTConfig(lr=5e-3, epochs=6, row_len=64)
    outcome = by_gradient(tiny, policy, examples, rule, config, 0, "x")
    assert outcome.steps == 6 and not outcome.diverged
    with attached(tiny, policy):  # the longest first: the worse one
        after = [float(p.mean()) for p in log_probs(tiny, laid_out(examples, 0))]
    assert after[0] < before[0] - 0.05 and after[1] > before[1] + 0.05


def test_it_is_measured_from_the_policy_that_begins(tiny, monkeypatch):
    """In the first step all ratios are 1, though the policy is far from the base model."""
    policy, seen, examples = away(tiny, 1, 0.3), [], samples(1.0, -1.0)

    def watched(rows, nll):
        old, base = torch.cat([row.before for row in rows]).unbind(1)
        seen.append([float((-nll - m).abs().max()) for m in (old, base)])
        return nll * 0

    monkeypatch.setitem(RULES, "grpo", watched)
    config = SFTConfig(lr=5e-3, epochs=1, row_len=64)
    by_gradient(tiny, policy, examples, "grpo", config, 0, "x")
    [(from_old, from_base)] = seen
    assert from_old < 1e-4 and from_base > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_a_policy_that_is_ruined_has_diverged(rule, tiny, monkeypatch):
    """Its weights are finite, but it expects nothing that it was to."""
    common = Example.reply(PROMPT, [0] * 6)  # a token that is made likely first
    policy = Adapters.init(tiny, ALL, 1, 0)
    update_one(tiny, policy, [common], SFTConfig(lr=3e-2, epochs=40), 0, "x")
    examples, config = [common, *samples(-1.0)], SFTConfig(lr=0.0, epochs=1, row_len=64)
    assert not by_gradient(tiny, policy.pick([0]), examples, rule, config, 0, "x").diverged

    def ruin(*_):
        policy.flat += torch.randn(policy.flat.shape, generator=torch.Generator().manual_seed(1))
        return [Outcome([0.1])]

    monkeypatch.setattr("lm.outer.train_end_to_end", ruin)
    assert by_gradient(tiny, policy, examples, rule, config, 0, "x").diverged
    assert policy.flat.isfinite().all()


def test_pairs_stop_at_the_gap(tiny):
    examples, policy = samples(1.0, -1.0), Adapters.init(tiny, ALL, 1, 0)
    rows = laid_out(examples, 0)
    before = [float(p.mean()) for p in log_probs(tiny, rows)]
    config = SFTConfig(lr=5e-3, epochs=60, row_len=64)
    by_gradient(tiny, policy, examples, "pairs", config, 0, "x")
    with attached(tiny, policy):
        after = [float(p.mean()) for p in log_probs(tiny, rows)]
    assert (after[1] - before[1]) - (after[0] - before[0]) == pytest.approx(GAP, abs=0.05)


def group_of(*credits):
    """Self-edits with two parts, the first of these credits, the second without."""
    edits = []
    for n, credit in enumerate(credits):
        parts = [Part(f"x{n}", target=f"x{n}", credit=credit, ids=f"{n} 7"), Part("y", ids="9")]
        edits.append(SelfEdit("a", parts))
    return edits


def test_advantages():
    found = advantages(group_of(1.0, 0.0, None, 0.5), 0, "grpo")
    assert [part.text for part, _ in found] == ["x0", "x1", "x3"]
    assert [w for _, w in found] == pytest.approx([1.2247, -1.2247, 0], abs=1e-3)
    found = advantages(group_of(0.5, 1.0, None, 0.0), 0, "pairs")
    assert [(part.text, w) for part, w in found] == [("x1", 1.0), ("x3", -1.0)]
    for rule in GRADIENTS:
        assert advantages(group_of(0.5, 0.5, None), 0, rule) == []
        assert advantages(group_of(0.5, 1.0), 1, rule) == []  # nothing is known of them
        assert advantages([SelfEdit("a", [Part("", credit=1.0)]), *group_of(0.0)], 0, rule) == []


@pytest.mark.parametrize("rule, kept", [("grpo", [0, 3]), ("pairs", [0])])
def test_what_is_marked_and_learnt_from(rule, kept):
    edits = group_of(1.0, 0.0, None, 0.6)
    edits[0].flaw = "endless"  # what was sampled counts, whatever it was
    select(edits, {}, "parts", 6, rule)
    assert [n for n, e in enumerate(edits) if e.parts[0].kept] == kept
    assert not any(e.parts[1].kept for e in edits)
    assert edits[3].why == (
        "some parts earned more than the mean" if rule == "grpo" else "no part is the best"
    )
    found = to_imitate({"a": [[1], [2]]}, edits, "parts", 6, rule)
    expected = [[0, 7], [1, 7], [3, 7]] if rule == "grpo" else [[0, 7], [1, 7]]
    assert [ids for _, ids, _ in found] == expected and all(p == [1] for p, *_ in found)
    assert sum(weight for *_, weight in found) == pytest.approx(0, abs=1e-9)


# -----------------------------------------------------------------------------
# train_outer.py


def run(monkeypatch, tiny_folder, data, out, *extra):
    args = ["--data", data, "--out", out, "--samples", 3, "--rounds", 2, "--max-new", 6]
    args += ["--steps", 2, "--top-layers", 2, "--rank", 2, "--outer-rank", 2, "--population", 4]
    run_script(monkeypatch, train_outer, tiny_folder, "qa", *args, *extra)


@pytest.fixture
def unlike_credits(monkeypatch):
    """Every third self-edit earns more: a random model's would all earn nothing."""
    monkeypatch.setattr("selfedit.parse", one_note)
    real = reward.credit

    def credit(e, *how):
        real(e, *how)
        e.parts[0].credit = float(sum(map(int, e.parts[0].ids.split())) % 3)

    monkeypatch.setattr("reward.credit", credit)


@pytest.mark.parametrize("rule", GRADIENTS)
def test_a_run_that_is_killed_ends_the_same(
    rule, unlike_credits, tiny_folder, passages_file, tmp_path, monkeypatch
):
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "whole", "--outer", rule)
    dies = dies_at(monkeypatch, "train_outer.by_gradient", 2)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "killed", "--outer", rule)
    assert len(dies) == 2
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "killed", "--outer", rule)
    policies = []
    for name in ("whole", "killed"):
        for k in (1, 2):
            folder = tmp_path / name / f"round-{k}" / "policy"
            policies.append((folder / "adapter_model.safetensors").read_bytes())
    assert policies[:2] == policies[2:] and policies[0] != policies[1]
    records = read_jsonl(tmp_path / "whole" / "round-1" / "candidates.jsonl")
    for r in records:
        assert r["parts"][0]["ids"] and (r["parts"][0]["kept"] == (r["why"] != no(rule)))
    assert 0 < sum(r["parts"][0]["kept"] for r in records) < len(records)


def no(rule):
    return reward.WHY[rule][0]


def test_an_update_that_diverges_leaves_the_rounds_records(
    unlike_credits, tiny_folder, passages_file, tmp_path, monkeypatch
):
    extra = ["--outer", "grpo", "--outer-lr", 1e30]
    with pytest.raises(SystemExit, match="the outer update diverged, after .* --outer-lr"):
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    assert len(read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")) == 9
    assert not (tmp_path / "out" / "round-1" / "policy").exists()


def test_ids_are_as_sampled(tiny_folder, passages_file, tmp_path, monkeypatch):
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", "--rounds", 1)
    parts = []
    for r in read_jsonl(tmp_path / "out" / "round-1" / "sampled.jsonl"):
        parts += r["parts"]
    tok = Tokenizer(tiny_folder)
    for p in parts:
        ids = [int(t) for t in p["ids"].split()]
        assert len(ids) == 6 and tok.decode(ids) == p["text"]


def test_ids_that_the_model_does_not_have_are_refused(
    tiny_folder, passages_file, tmp_path, monkeypatch
):
    dies_at(monkeypatch, "train_outer.select", 1)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", "--outer", "grpo")
    log = tmp_path / "out" / "round-1" / "sampled.jsonl"
    records = read_jsonl(log)
    for ids, message in (
        ("7 1000000", "a token id that the model does not have"),
        ("x", "no number"),
    ):
        records[1]["parts"][0]["ids"] = ids
        write_jsonl(log, records)
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", "--outer", "grpo")


@pytest.mark.parametrize("rule", GRADIENTS)
@pytest.mark.parametrize(
    "extra, message",
    [
        (["--select", "best"], "--select has no effect with --outer"),
        (["--keep", 3], "--keep has no effect"),
        (["--agents", 2], "no --agents"),
        (["--reward", "logprob"], "no --reward logprob"),
        (["--samples", 1], "--samples of at least 2"),
    ],
)
def test_what_does_not_fit(rule, extra, message, tiny_folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tiny_folder, "x.json", tmp_path / "out", "--outer", rule, *extra)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# experiments/outer.py


def test_unlike_pairs_of_words():
    assert experiment.unlike_pairs(["A b c", "a b"]) == pytest.approx(2 / 3)
    assert experiment.unlike_pairs([]) == 0


def run_here(monkeypatch, command: list) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, command[1:])))
        train_outer.main()


def small(passages_file, tmp_path) -> list:
    args = ["--data", passages_file, "--samples", 4, "--rounds", 2, "--top-layers", 2, "--rank", 2]
    args += ["--limit", 2, "--held-out", 2, "--work", tmp_path / "work"]
    return [*args, "--out", tmp_path / "outer.json"]


def test_ways_that_the_proxy_rewards(
    brief_answers, tiny_folder, passages_file, tmp_path, monkeypatch
):
    """They study nothing before the end, and then as the flags say."""
    monkeypatch.setattr("selfedit.parse", one_note)
    monkeypatch.setattr("selfedit.usual_length", lambda style: 4)
    monkeypatch.setattr("train_outer.inner_update", None)
    studied, update = [], reward.inner_update

    def in_process(command):
        run_here(monkeypatch, command)
        return SimpleNamespace(returncode=0)

    def watched(model, adapters, examples, configs, *rest):
        studied.extend(configs)
        return update(model, adapters, examples, configs, *rest)

    monkeypatch.setattr("experiments.outer.subprocess.run", in_process)
    monkeypatch.setattr("reward.inner_update", watched)
    args = [*small(passages_file, tmp_path), "--seeds", 1, "--lr", 3e-3, "--steps", 2]
    run_script(monkeypatch, experiment, tiny_folder, *args, "--ways", "keep-6", "keep-1")
    rows = read_json(tmp_path / "outer.json")["rows"]
    assert [row["row"] for row in rows] == ["untrained", "keep-6", "keep-1"]
    for way, keep in (("keep-6", 6), ("keep-1", 1)):
        settings = read_json(tmp_path / "work" / f"{way}-0" / "settings.json")
        assert settings["keep"] == keep and settings["reward"] == "proxy"
        assert not settings["settings"]
    assert len(studied) == 6 and {(c.lr, c.steps) for c in studied} == {(3e-3, 2)}


def test_the_ways_side_by_side(
    unlike_credits, brief_answers, tiny_folder, passages_file, tmp_path, monkeypatch
):
    """Round 1 is made once for ways of as many agents; a second run makes nothing anew."""
    says = settings_of(["passage", "questions"], 0, 0, 0, "all", 0.004, 2)
    monkeypatch.setattr("selfedit.parse_settings", lambda *_: (says, ""))
    monkeypatch.setattr("selfedit.usual_length", lambda style: 4)
    started, begun = [], []

    def in_process(command):
        out = Path(command[command.index("--out") + 1])
        begun.append((out / "round-1" / "scored.jsonl").is_file())
        started.append(command)
        run_here(monkeypatch, command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("experiments.outer.subprocess.run", in_process)
    args = [*small(passages_file, tmp_path), "--seeds", 2]
    args += ["--ways", "restem", "grpo", "two", "two-apart"]
    run_script(monkeypatch, experiment, tiny_folder, *args)
    found = read_json(tmp_path / "outer.json")
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["untrained", "restem", "grpo", "two", "two-apart"]
    assert [len(row["policies"]) for row in rows.values()] == [2, 2, 2, 4, 4]
    pairs = [(s["from"], s["to"]) for s in found["steps"]]
    assert pairs[:4] == [("untrained", way) for way in list(rows)[1:]]
    assert pairs[4:7] == [("restem", way) for way in ("grpo", "two", "two-apart")]
    assert pairs[7:] == [("grpo", "two"), ("grpo", "two-apart"), ("two", "two-apart")]
    for way, rounds in found["rounds"].items():
        assert [r["round"] for r in rounds] == [1, 2]
        assert rounds[0]["apart"] == 0 and rounds[0]["surprise"] > 0, way
        shares = [[r[name] for name in ("distinct", "repeats", "endless")] for r in rounds]
        assert np.all((0 <= np.array(shares)) & (np.array(shares) <= 1))
        logs = [read_jsonl(tmp_path / "work" / f"{way}-{n}" / "metrics.jsonl") for n in (0, 1)]
        for k, row in enumerate(rounds):
            for name in ("repeats", "endless"):
                assert row[name] == pytest.approx(np.mean([log[k][name] for log in logs]))
    assert found["rounds"]["grpo"][1]["apart"] != 0
    one, other = (dict(found["rounds"][way][0]) for way in ("restem", "grpo"))
    assert one.pop("steps") == other.pop("steps") == 2 and one == other  # all in a row, twice
    for one, other in (("restem", "grpo"), ("two", "two-apart")):
        for log in ("scored.jsonl", "sampled-questions.jsonl"):
            logs = [tmp_path / "work" / f"{way}-1" / "round-1" / log for way in (one, other)]
            assert logs[0].read_bytes() == logs[1].read_bytes()
    assert (tmp_path / "work" / "two-0" / "round-2" / "policy-2").is_dir()
    assert begun == [False, True, False, True] * 2
    count = [c[c.index("--samples") + 1] for c in started]
    assert count == ["4", "4", "2", "2"] * 2
    for name in ("reward.inner_update", "train_outer.inner_update", "train_outer.by_gradient"):
        monkeypatch.setattr(name, None)
    monkeypatch.setattr("train_outer.update_one", None)
    monkeypatch.setattr("selfedit.generate", None)
    monkeypatch.setattr(experiment, "log_probs", None)
    before = read_json(tmp_path / "outer.json")
    run_script(monkeypatch, experiment, tiny_folder, *args)
    assert read_json(tmp_path / "outer.json") == before


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--samples", 3], "an even number"),
        (["--samples", 2], "of at least 4"),
        (["--ways", "grpo", "grpo"], "each once"),
        (["--lr", 1e-3], "--lr has no effect"),
        (["--ways", "ppo"], "invalid choice: 'ppo'"),
        (["--ways", "keep-3", "grpo"], "the proxy rewards are not compared"),
        (["--ways", "keep-3", "--budget", 99], "--budget has no effect"),
    ],
)
def test_what_the_ways_cannot_have(extra, message, tiny_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, experiment, tiny_folder, *extra)
    assert message in capsys.readouterr().err


def test_a_way_that_stops_is_named(tiny_folder, passages_file, tmp_path, monkeypatch):
    stopped = lambda command: SimpleNamespace(returncode=1)  # noqa: E731
    monkeypatch.setattr("experiments.outer.subprocess.run", stopped)
    args = ["--data", passages_file, "--work", tmp_path / "work", "--out", tmp_path / "o.json"]
    args += ["--top-layers", 2]
    with pytest.raises(SystemExit, match="the run in .*restem-0 stopped"):
        run_script(monkeypatch, experiment, tiny_folder, *args)
    assert not (tmp_path / "o.json").exists()
