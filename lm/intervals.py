"""How sure a mean is: bootstrap intervals over passages or tasks, and differences of rows on the
same ones."""

import numpy as np


def bootstrap(values: np.ndarray, seed: int, n: int = 10_000) -> list[float]:
    """95 % interval of the mean of `values`, one per passage, by resampling passages `n` times."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (n, len(values)))].mean(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def of_sums(f, sums, seed: int, n: int = 10_000) -> dict:
    """{"value", "ci95"} of f(sums over passages), as a ratio of them. sums (passages, K); f takes
    (K, ...), one such sum or many. "ci95" is None if f is not defined for some draw of passages, as
    a ratio to nothing."""
    sums = np.array(sums)
    at = np.random.default_rng(seed).integers(0, len(sums), (n, len(sums)))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = f(sums[at].sum(axis=1).T)
    ci95 = None
    if np.isfinite(drawn).all():
        ci95 = [float(q) for q in np.quantile(drawn, [0.025, 0.975])]
    return {"value": float(f(sums.sum(axis=0))), "ci95": ci95}


def paired_steps(values: dict, pairs, seed: int) -> list[dict]:
    """The mean difference of each pair (from, to) of rows, on the same passages; values {method:
    one per passage}."""
    steps = []
    for a, b in pairs:
        delta = values[b] - values[a]
        steps.append(
            {"from": a, "to": b, "delta": float(delta.mean()), "ci95": bootstrap(delta, seed)}
        )
    return steps


def pairs_of(methods: list[str], more=()) -> tuple[list, list]:
    """Pairs of rows to compare: each with the one after it, `more`, and every row before the last
    seal-K with that one; and the last seal-K, [] if there is none."""
    seal = [m for m in methods if m.startswith("seal-")][-1:]
    below = methods[: methods.index(*seal)] if seal else []
    return list(
        dict.fromkeys([*zip(methods, methods[1:]), *more, *((m, *seal) for m in below)])
    ), seal


def gap_closed(
    low: np.ndarray, high: np.ndarray, reached: np.ndarray, seed: int, n: int = 10_000
) -> dict:
    """(reached - low) / (high - low) of the means over passages, with its interval; None if high is
    not surely above."""
    at = np.random.default_rng(seed).integers(0, len(low), (n, len(low)))
    gain, gap = (reached - low)[at].mean(axis=1), (high - low)[at].mean(axis=1)
    if high.mean() <= low.mean() or (gap <= 0).any():
        return {"share": None, "ci95": None}
    share = (reached - low).mean() / (high - low).mean()
    return {
        "share": float(share),
        "ci95": [float(q) for q in np.quantile(gain / gap, [0.025, 0.975])],
    }


def written_steps(rows: list, steps: list) -> tuple[dict, dict]:
    """As text, in points: {method: its step from the row above it}, and {(from, to): step} of the
    others."""
    above = {b["method"]: a["method"] for a, b in zip(rows, rows[1:])}
    texts = {}
    for s in steps:
        numbers = (100 * v for v in (s["delta"], *s["ci95"]))
        texts[s["from"], s["to"]] = "{:+5.1f} [{:+.1f}, {:+.1f}]".format(*numbers)
    others = {(a, b): text for (a, b), text in texts.items() if above[b] != a}
    return {b: text for (a, b), text in texts.items() if above[b] == a}, others


def protocol_title(result: dict) -> str:
    """How many steps the rows of a result file took, in words."""
    s = result["settings"]
    if result["protocol"] == "none":
        return "nothing learnt"
    if result["protocol"] == "epochs":
        return f"equal epochs, {s['epochs']} in every row (the paper's protocol)"
    how = f"{s['steps']} optimiser steps in every row"
    if s["recipes"]:
        how = "optimiser steps as suits each row best"
    if s.get("settings"):
        how += f"; where a self-edit says how it is studied, within {s['budget']} trained tokens"
    return how
