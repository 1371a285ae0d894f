"""tests/torture.py in short: a few tries of each part hold; and a part notices what does not."""

import itertools
import json
import sys
import time

import numpy as np
import pytest
import torture


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    torture.make_home(home)
    return home


def tries(part: str, home, tmp_path, count: int, seed: int = 0) -> list[str]:
    return list(torture.PARTS[part][0](home, tmp_path, count, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    "part, count, tried",
    [
        ("kill", 1, 1),
        ("stop", 1, 1),
        ("ranks", 1, 1),
        ("repeat", 2, 5),
        ("order", 2, 2),
        ("selfedits", 100, 100),
        ("files", 7, 7),
        ("numbers", 2, 2),
    ],
)
def test_a_few_tries_hold(part, count, tried, home, tmp_path):
    outcomes = tries(part, home, tmp_path, count)
    assert len(outcomes) >= tried and not any(outcomes), outcomes


def test_a_haul_in_short(home, tmp_path):
    """Memory settles after more updates than these, and other tests are at work beside it."""
    outcomes = tries("haul", home, tmp_path, 20)
    assert len(outcomes) == 8 and not any("weights" in told for told in outcomes)


def test_what_does_not_hold_is_told(home, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torture.selfedit, "parse_settings", lambda *_: ({}, "odd"))
        assert "flaw 'odd'" in tries("selfedits", home, tmp_path, 5)[0]
    with monkeypatch.context() as patch:
        patch.setattr(torture, "inner_update", lost_its_way())
        assert "learns the same: False" in tries("order", home, tmp_path, 1)[0]
        assert "neighbours the same: False" in tries("numbers", home, tmp_path, 1)[0]
        patch.setattr(torture.selfedit, "parse_settings", busy)
        assert tries("selfedits", home, tmp_path, 2)[0].endswith(" s")
    with monkeypatch.context() as patch:
        updates, seen = itertools.count(1), itertools.count(1)
        patch.setattr(torture, "learnt", lambda *_: time.sleep(0.0005 * 1.4 ** next(updates)))
        patch.setattr(torture, "memory", lambda _: 1.05 ** next(seen))
        told = tries("haul", home, tmp_path, 20)
        assert all("memory grew by" in t and "times as long" in t for t in told) and len(told) == 8
    with monkeypatch.context() as patch:
        patch.setattr(torture.test_ranks, "unlike", lambda *_: ["scored.jsonl"])
        patch.setattr(torture, "pair", lambda *_: ("", 1.0))
        (tmp_path / "ranks" / "ranks-0").mkdir(parents=True)
        [told] = tries("ranks", home, tmp_path / "ranks", 1)
        assert told.endswith(" s: scored.jsonl")
    monkeypatch.setattr(torture, "readers", lambda *_: {"odd": (home / "arc.json", fails)})
    [told] = tries("files", home, tmp_path / "files", 1)
    assert told == "odd, arc.json: KeyError('x')"


def busy(*_):
    until = time.process_time() + 0.11
    while time.process_time() < until:
        pass
    return {}, "malformed"


def lost_its_way():
    """inner_update(), of which no two calls learn the same."""
    real, calls = torture.inner_update, []

    def update(model, adapters, *args, **kwargs):
        calls.append(1)
        adapters.flat += 0.1 * len(calls)
        return real(model, adapters, *args, **kwargs)

    return update


def fails(path):
    raise KeyError("x")


def test_what_is_compared_of_two_runs(tmp_path):
    """All that they wrote, but for the seconds."""
    for name, n in (("one", 2), ("two", 3)):
        (tmp_path / name / "run").mkdir(parents=True)
        record = {"n": n, "seconds": n, "of": [{"seconds": n}]}
        (tmp_path / name / "run" / "m.jsonl").write_text(json.dumps(record) + "\n")
        (tmp_path / name / "run" / "a").write_bytes(b"1")
    one, two = (torture.written(tmp_path / name) for name in ("one", "two"))
    assert one == {"run/a": b"1", "run/m.jsonl": [{"n": 2, "of": [{}]}]} and one != two
    assert one["run/a"] == two["run/a"]


def test_the_result_file(home, tmp_path, monkeypatch, capsys):
    parts = {"good": (lambda *_: ["", ""], 2), "bad": (lambda *_: ["", "it fell"], 3)}
    monkeypatch.setattr(torture, "PARTS", parts)
    monkeypatch.setattr(torture, "make_home", lambda home: None)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["torture.py", "--out", str(out)])
    with pytest.raises(SystemExit, match="not everything held"):
        torture.main()
    good, bad = json.loads(out.read_text())["rows"]
    assert (good["part"], good["tried"], good["held"], good["failures"]) == ("good", 2, 2, [])
    assert (bad["part"], bad["tried"], bad["held"], bad["failures"]) == ("bad", 2, 1, ["it fell"])
    assert "bad: 1 of 2 held\n  it fell" in capsys.readouterr().out
