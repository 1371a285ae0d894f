"""What bench/speed.py reports: its table; and where the time of the inner update goes, as a share
of the machine's GEMM rate.

python bench/speed.py --only mfu --out runs/mfu.json
"""

import statistics
import time
from dataclasses import replace
from functools import partial

import torch

from data.qa import load_passages
from inner import SFTConfig, inner_update, lay_rows, plan_steps
from lm.grid import Step
from lm.packing import Example
from lora import PROJECTIONS
from model import attention


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def population(b) -> None:
    """16 candidates, each with a passage and no notes, in populations of 1, 2, 4, 8 and 16: seconds
    for each."""
    candidates, seconds = [b.candidate(p, ()) for p in b.passages], {}
    lora, sft = b.fast[0], replace(b.fast[1], steps=4)
    for _ in range(b.args.repeats):
        for P in (1, 2, 4, 8, 16):
            groups = [candidates[n : n + P] for n in range(0, 16, P)]
            run = lambda groups=groups: [b.train(g, lora, sft) for g in groups]  # noqa: E731
            seconds.setdefault(P, []).append(timed(run) / 16)
    each = {P: statistics.median(s) for P, s in seconds.items()}
    for P in each:
        row = {
            "work": f"population-{P}",
            "ours_s": each[P],
            "other": "ours with P = 1",
            "other_s": each[1],
        }
        b.add(
            row
            | {"ratio": each[1] / each[P], "note": "seconds per candidate, 4 steps on a passage"}
        )


def sequence(b) -> None:
    """A step of 2048 tokens in sequences of one length: seconds for each token."""
    text = b.tok.encode(" ".join(p.text for p in load_passages("data/passages.json")))
    ids = [(text * 2)[i : i + 1024] for i in (0, 1024)]
    seconds, lengths = {}, (64, 128, 256, 512, 1024)
    for _ in range(b.args.repeats):
        for length in lengths:
            pieces = []
            for half in ids:
                pieces += [tuple(half[start : start + length]) for start in range(0, 1024, length)]
            texts = [Example(piece, (True,) * length) for piece in pieces]
            own = [texts[::2], texts[1::2]]
            sft = SFTConfig(epochs=1, row_len=0, batch=len(own[0]))
            lora = replace(b.fast[0], start=0)
            adapters = b.fresh(lora, 2)
            spent = timed(partial(inner_update, b.model, adapters, own, [sft] * 2, 0))
            seconds.setdefault(length, []).append(spent / 2048)
    each = {length: statistics.median(s) for length, s in seconds.items()}
    for length in lengths:
        row = {
            "work": f"sequence-{length}",
            "ours_s": each[length],
            "other": "ours with 64",
            "other_s": each[64],
        }
        b.add(
            row
            | {
                "ratio": each[64] / each[length],
                "note": "seconds per token, all layers, a step of 2048 tokens",
            }
        )


def utilization(b) -> None:
    """Model FLOPs of the inner update, over its seconds times the GEMM rate at the same shapes; and
    a profile."""
    lora, sft = b.fast
    outcomes, seconds = [], []
    for row in b.rows:
        seconds += row["turns"][0] if row["work"] == "inner-fast" else []
    while not outcomes or len(seconds) < b.args.repeats:
        seconds.append(timed(lambda: outcomes.append(b.train(b.longest, lora, sft))))
    tokens, steps = sum(o.tokens for o in outcomes[0]), max(o.steps for o in outcomes[0])
    flops = inner_flops(b.model, [c.examples for c in b.longest], lora, sft)
    rate = gemm_rate(b, lora, tokens // steps)
    with torch.profiler.profile(record_shapes=True) as profile:
        wall = timed(lambda: b.train(b.longest, lora, replace(sft, steps=2)))
    second = statistics.median(seconds)
    b.mfu |= {"inner": flops / second / rate, "gemm_gflops": rate / 1e9}
    b.mfu |= {"tokens_per_s": tokens / second, "shares": shares(profile, wall, len(b.longest))}
    print(
        "mfu", {k: round(v, 3) if isinstance(v, float) else v for k, v in b.mfu.items()}, flush=True
    )


def inner_flops(model, examples, lora, sft) -> float:
    """2 FLOPs per weight and token, forward and again for the gradient of the input; a frozen
    weight has no other."""
    c, (layer, *_) = model.config, model.layers
    weights = {
        name: layer.get_submodule(f"{home}.{name}").weight for name, home in PROJECTIONS.items()
    }
    per_layer = sum(w.numel() for w in weights.values())
    low_rank = lora.rank * sum(sum(weights[t].shape) for t in lora.targets)
    rows, trained = lay_rows(model, examples, [sft] * len(examples), lora.start), []
    below = {row.key for own in rows for row in own}
    for own in rows:
        for step in plan_steps(len(own), sft, seed=0):
            trained += [own[r] for r in step]
    tokens, n = sum(len(row.ids) for row in trained), lora.stop - lora.start
    total = 2 * lora.start * per_layer * sum(len(ids) for ids, _ in below)
    total += n * (4 * per_layer + 6 * low_rank) * tokens
    # Nothing below asks for the gradient of the first adapted layer's input.
    total -= 2 * sum(weights[q].numel() for q in ("q_proj", "k_proj", "v_proj")) * tokens
    total += 4 * c.vocab_size * c.n_embd * sum(len(row.at) for row in trained)
    return total + n * 12 * c.n_head * c.head_dim * sum(looks(row.lengths) for row in trained)


def looks(lengths: tuple) -> float:
    """How many tokens the tokens of a row look at in all: a prefix at itself, what follows at
    itself and at the prefix."""
    prefix, total = lengths[0], prefix_looks(lengths[0])
    return total + sum(prefix_looks(t) + t * prefix for t in lengths[1:])


def prefix_looks(t: int) -> float:
    return t * (t + 1) / 2


@torch.no_grad()
def gemm_rate(b, lora, M) -> float:
    """FLOP/s of only the products of one step: M tokens through the adapted layers' weights and the
    head, and back."""
    linears = []
    for layer in b.model.layers[lora.start :]:
        linears += [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    linears.append(b.model.lm_head)
    inputs = {}
    for linear in linears:
        for n in linear.weight.shape:
            inputs[n] = torch.randn(M, n, dtype=b.model.dtype)

    def run():
        for m in linears:
            out, into = m.weight.shape
            chunk = 256 if m is linears[-1] else M
            for x, y in zip(inputs[into].split(chunk), inputs[out].split(chunk)):
                x @ m.weight.T, y @ m.weight

    run()
    seconds = statistics.median(timed(run) for _ in range(5))
    return sum(4 * M * m.weight.numel() for m in linears) / seconds


def shares(profile, wall: float, P: int) -> dict:
    """Share of the wall time by kind of operation; "Python" is what no operation of torch accounts
    for."""
    total = dict.fromkeys(
        ["GEMM", "LoRA", "attention", "loss", "optimiser", "copies", "elementwise", "Python"], 0.0
    )
    kinds = {
        "aten::mm": "GEMM",
        "aten::_fused_adamw_": "optimiser",
    }
    kinds |= dict.fromkeys(
        ["aten::copy_", "aten::cat", "aten::index_select", "aten::index_fill_", "aten::index"],
        "copies",
    )
    for event in profile.key_averages(group_by_input_shape=True):
        shape = event.input_shapes[0] if event.input_shapes else []
        kind = kinds.get(event.key, "elementwise" if event.key.startswith("aten::") else "Python")
        if event.key in ("aten::bmm", "aten::baddbmm"):
            kind = "LoRA" if shape[0] <= P else "attention"
        elif "softmax" in event.key:
            kind = "loss" if len(shape) == 2 else "attention"
        total[kind] += event.self_cpu_time_total / 1e6 / wall
    total["Python"] += max(0.0, 1 - sum(total.values()))
    return {k: round(v, 4) for k, v in total.items()}


def kernels(b) -> None:
    """lm/kernels.py: an inner update with its attention and with the plain one, of notes, and of
    sequences of 2048 tokens, the longest of a puzzle."""
    lora, sft = b.fast[0], replace(b.fast[1], steps=2)
    text = b.tok.encode(" ".join(p.text for p in load_passages("data/passages.json")))
    long = Example(tuple(text[:2048]), (True,) * 2048)
    whole = (b.model, b.fresh(lora, 2), [[long]] * 2, [replace(sft, row_len=0)] * 2, 0)
    work = {"8 candidates, 2 steps of the default recipe": lambda: b.train(b.longest, lora, sft)}
    work["2 candidates, 2 steps of 2048 tokens"] = partial(inner_update, *whole)
    ways, seconds = {"ours": b.model.attention, "plain": attention}, {}
    for turn in range(b.args.repeats + 1):  # the first one only warms up
        for way in list(ways)[:: 1 - 2 * (turn % 2)]:
            b.model.attention = ways[way]
            for note, run in work.items():
                seconds.setdefault((note, way), []).append(timed(run))
    b.model.attention = ways["ours"]
    for name, note in zip(("notes", "long"), work):
        turns = [seconds[note, way][1:] for way in ways]
        ours, other = map(statistics.median, turns)
        row = {"work": f"kernels-{name}", "ours_s": ours, "other": "ours, plain attention"}
        row |= {"other_s": other, "ratio": other / ours, "note": note}
        b.add(row | {"turns": turns})


def compiled(b) -> None:
    """The step in fixed shapes (lm/grid.py), run as it is and by inductor, after it has compiled,
    against the step that pads nothing."""
    lora, sft = b.fast
    steps = {"off": None, "eager": Step("eager"), "inductor": Step("inductor")}
    first, seconds = {}, {name: [] for name in steps}
    run = lambda: b.train(b.longest, lora, replace(sft, steps=4))  # noqa: E731
    for turn in range(b.args.repeats + 1):
        for name, step in steps.items():
            b.model.step = step
            spent = timed(run)
            if turn:
                seconds[name].append(spent)
            else:
                first[name] = spent  # with the time that compiling takes
    b.model.step = None
    each = {name: statistics.median(times) for name, times in seconds.items()}
    for name, work in (("eager", "compile-grid"), ("inductor", "compile")):
        note = f"8 candidates, 4 steps, --compile {name}; its first run took "
        note += f"{first[name] - each[name]:.0f} s more, to compile"
        row = {"work": work, "ours_s": each[name], "other": "ours, --compile off"}
        row |= {"other_s": each["off"], "ratio": each["off"] / each[name], "note": note}
        b.add(row | {"turns": seconds})


def table(rows: list[dict]) -> list[str]:
    """The rows as lines of Markdown."""
    lines = [
        "| work | ours | other | ratio | other side | note |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        ours, other = written(row["ours_s"]), written(row["other_s"])
        ours = "~" * row.get("ours_scaled", False) + ours
        other = "~" * row.get("scaled", False) + other
        times = f"{ours} | {other} | {row['ratio']:.2f}"
        lines.append(f"| `{row['work']}` | {times} | {row['other']} | {row['note']} |")
    return lines


def written(t: float) -> str:
    return f"{t:.1f} s" if t >= 10 else f"{t:.2f} s" if t >= 0.1 else f"{1e3 * t:.2f} ms"
