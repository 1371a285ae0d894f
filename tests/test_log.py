"""lm/log.py: the progress line, and that nothing which a log holds is computed again."""

from types import SimpleNamespace

import pytest

from lm.files import read_jsonl, write_jsonl
from lm.log import Log, Progress, trained_on


def candidates(*names):
    return [SimpleNamespace(name=name, examples=[name], config=None) for name in names]


def score(result) -> float:
    return result["score"]


def work(log, groups, dies_at=None) -> list[list]:
    """Do what is left of groups; returns the names of what was done. Killed in group `dies_at`."""
    done = []
    for group in log.remaining(groups, "test"):
        if len(done) == dies_at:
            raise KeyboardInterrupt
        done.append([c.name for c in group])
        log.add(group, [{"score": float(len(str(c.name)))} for c in group])
    return done


def test_what_is_logged_is_not_computed_again(tmp_path):
    groups = [candidates("c", "aaa"), candidates("bb"), candidates("d", "e")]
    log = Log(tmp_path / "whole" / "a.jsonl", score)
    assert work(log, groups) == [["c", "aaa"], ["bb"], ["d", "e"]]
    with pytest.raises(KeyboardInterrupt):
        work(Log(tmp_path / "b.jsonl", score), groups, dies_at=1)
    assert [r["n"] for r in read_jsonl(tmp_path / "b.jsonl")] == ["aaa", "c"]
    log = Log(tmp_path / "b.jsonl", score)
    assert work(log, groups) == [["bb"], ["d", "e"]]
    read_back = log[groups[0][1]]
    assert read_back == {"n": "aaa", "of": trained_on(groups[0][1]), "score": 3.0}
    assert work(Log(tmp_path / "b.jsonl", score), groups) == []
    written = (tmp_path / "b.jsonl").read_bytes()
    assert written == (tmp_path / "whole" / "a.jsonl").read_bytes()
    assert [r["n"] for r in read_jsonl(tmp_path / "b.jsonl")] == ["aaa", "bb", "c", "d", "e"]


def test_a_group_of_which_some_are_logged_is_computed_again(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"n": "a", "score": 5.0}])
    log, [group] = Log(tmp_path / "a.jsonl", score), [candidates("a", "b")]
    assert work(log, [group]) == [["a", "b"]] and log[group[0]]["score"] == 1.0


def test_what_other_logs_know_is_read_and_not_written(tmp_path):
    a, b, c = candidates("a", "b", "c")
    write_jsonl(tmp_path / "one.jsonl", [{"n": "a", "score": 7.0}])
    write_jsonl(tmp_path / "two.jsonl", [{"n": "b", "score": 8.0}])
    log = Log(tmp_path / "log.jsonl", score, [tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert log[a]["score"] == 7.0 and log[b]["score"] == 8.0
    assert work(log, [[c]]) == [["c"]]
    assert [r["n"] for r in read_jsonl(tmp_path / "log.jsonl")] == ["c"]


def test_a_result_of_something_else_is_refused(tmp_path):
    """As if lines of sampled.jsonl, or the names of results, had been swapped."""
    path, [[a, b]] = tmp_path / "log.jsonl", [candidates("a", "b")]
    work(Log(path, score), [[a, b]])
    a.examples, b.examples = b.examples, a.examples
    with pytest.raises(SystemExit, match="result 'a' is not of the self-edit that it stands for"):
        work(Log(path, score), [[a, b]])
    with pytest.raises(SystemExit, match="result 'b' is not of the self-edit"):
        Log(tmp_path / "other.jsonl", score, [path])[b]


def test_a_result_under_another_configuration_is_refused(tmp_path):
    [a] = candidates("a")
    log = Log(tmp_path / "log.jsonl", score)
    work(log, [[a]])
    a.config = {"lr": 0.1}
    with pytest.raises(SystemExit, match="result 'a' is not of the self-edit"):
        Log(tmp_path / "log.jsonl", score)[a]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"n": "b"}, r"line 2 is no result: KeyError\('score'\)"),
        ({"score": 1.0}, r"line 2 is no result: KeyError\('n'\)"),
        ({"n": ["b"], "score": 1.0}, "line 2 is no result"),
        ({"n": "b", "score": None}, "line 2 is no result"),
        ({"n": "b", "score": 10**400}, "line 2 is no result"),
        ({"n": "a", "score": 1.0}, ": 'a' stands there twice"),
    ],
)
def test_records_of_another_shape_are_refused(record, message, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"n": "a", "score": 5.0}, record])
    for known in ((), [tmp_path / "a.jsonl"]):
        with pytest.raises(SystemExit, match=rf"a\.jsonl:? ?{message.lstrip(': ')}"):
            Log(tmp_path / ("b.jsonl" if known else "a.jsonl"), score, known)


def test_every_candidate_needs_its_result(tmp_path):
    log = Log(tmp_path / "log.jsonl", score)
    with pytest.raises(ValueError):
        log.add(candidates("a", "b"), [{"score": 1.0}])


def test_a_log_shows_how_far_it_is(tmp_path, capsys):
    groups = [candidates("a", "bbb"), candidates("cc")]
    log = Log(tmp_path / "log.jsonl", score)
    for group in log.remaining(groups, "quiz"):
        log.tick(100, 0.25)
        log.add(group, [{"score": float(len(c.name))} for c in group])
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("quiz 3/3") and "accuracy 2.000" in line and "loss 0.250" in line
    assert "tok_s" in line


def test_progress_counts_to_the_end(capsys):
    progress = Progress("update", 3)
    progress.tokens(50, loss=1.5)
    for _ in range(3):
        progress.step(loss=0.5)
    [line] = capsys.readouterr().out.splitlines()  # to a file: every ten seconds, and the last one
    assert line.startswith("update 3/3  loss 0.500  tok_s ") and line.rstrip().endswith(" s")
