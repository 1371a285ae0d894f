"""train_outer.py end to end on a tiny model: files, resuming after a kill, bad input."""

import itertools
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dies_at, one_note, run_script, watch_weights
from safetensors.torch import load_file, save_file

import reward
import train_outer
from inner import learner
from lm.adapters import load_adapter
from lm.checkpoint import load_model
from lm.files import read_jsonl, write_jsonl
from lm.tokenizer import Tokenizer
from lora import PROJECTIONS, Adapters, LoRAConfig
from quiz import ask
from reward import to_imitate
from selfedit import Part, SelfEdit


def run(monkeypatch, tiny_folder, passages_file, out, *extra):
    args = ["--data", passages_file, "--out", out, "--samples", 3, "--rounds", 2, "--max-new", 6]
    args += ["--steps", 2, "--top-layers", 2, "--rank", 2, "--outer-rank", 2, "--population", 4]
    args += ["--select", "best"]
    run_script(monkeypatch, train_outer, tiny_folder, "qa", *args, *extra)


def files(folder):
    """Everything a run wrote, without the seconds it took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                data = read_jsonl(path)
                for line in data:
                    del line["seconds"]
            found[str(path.relative_to(folder))] = data
    return found


@pytest.fixture(autouse=True, scope="module")
def brief():
    """Short answers: that an answer may have 48 tokens makes no difference here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reward.ask", partial(ask, max_new=4))
        yield


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory, brief):
    """One uninterrupted run, with the passages it used."""
    tmp, entries = tmp_path_factory.mktemp("outer"), []
    for n in range(3):
        entry = {"title": f"Rolm {n}", "passage": "Rolm was founded by Ada Quell."}
        entries.append(entry | {"questions": [{"question": "Who?", "answer": "Ada"}]})
    data = tmp / "passages.json"
    data.write_text(json.dumps(entries))
    with pytest.MonkeyPatch.context() as patch:
        # A random model never ends its turn by itself: count every sample as ended, or nothing is
        # ever selected.
        patch.setattr("selfedit.parse", one_note)
        run(patch, tiny_folder, data, tmp / "out")
    return data, tmp / "out"


def test_a_round_leaves_its_records(finished):
    _, out = finished
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["round"] for m in metrics] == [1, 2]
    assert all(m["total"] == 9 and m["kept"] == m["kept_parts"] == 3 for m in metrics)
    policies = []
    for k in (1, 2):
        folder = out / f"round-{k}"
        records = read_jsonl(folder / "candidates.jsonl")
        assert len(records) == 9
        policies.append((folder / "policy" / "adapter_model.safetensors").read_bytes())
        for r in records:
            assert r["parts"] and r["why"] and r["config"]["steps"] == 2
            assert set(r["score"]) >= {"accuracy", "logprob"}
            assert r["reward"] == r["score"]["accuracy"] and len(r["parts"]) == 1
            [part] = r["parts"]
            assert part["text"] and part["target"] and part["credit"] == r["reward"]
            assert part["kept"] is (r["why"] == "best")
            assert part["notes"] and part["flaw"] == r["flaw"] == ""
        assert sum(r["parts"][0]["kept"] for r in records) == 3
        sampled = [SelfEdit.from_record(r) for r in read_jsonl(folder / "sampled.jsonl")]
        assert [e.notes for e in sampled] == [SelfEdit.from_record(r).notes for r in records]
        assert [r["n"] for r in read_jsonl(folder / "scored.jsonl")] == list(range(9))
    assert policies[0] != policies[1]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["domain"], settings["samples"]) == ("qa", 3) and "rounds" not in settings


@pytest.mark.parametrize(
    "stage, call",
    [
        ("train_outer.inner_update", 1),  # sampled
        ("train_outer.inner_update", 2),  # in the middle of a round's three populations
        ("reward.quiz_candidates", 3),  # trained, not asked
        ("train_outer.select", 1),  # everything scored
        ("reward.round_metrics", 1),  # after it: round 1 has its policy, but is not finished
        ("train_outer.save_adapter", 2),  # after it, in round 2
        ("train_outer.inner_update", 4),  # round 2: sampled
    ],
)
def test_killed_and_resumed_ends_the_same(
    stage, call, finished, tiny_folder, tmp_path, monkeypatch
):
    data, out = finished
    monkeypatch.setattr("selfedit.parse", one_note)
    dies_at(monkeypatch, stage, call)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, data, tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial"))
    run(monkeypatch, tiny_folder, data, tmp_path / "out")
    expected, got = files(out), files(tmp_path / "out")
    assert expected.keys() == got.keys() and all(expected[k] == got[k] for k in expected)


def test_one_more_round_goes_on_from_the_last_policy(finished, tiny_folder, tmp_path, monkeypatch):
    data, out = finished
    shutil.copytree(out, tmp_path / "out")
    loaded = dies_at(monkeypatch, "train_outer.load_adapter", 0)
    dies_at(monkeypatch, "reward.write_self_edits", 1)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, data, tmp_path / "out", "--rounds", 3)
    assert [folder for _, folder in loaded] == [tmp_path / "out" / "round-2" / "policy"]


def swap(path, change) -> None:
    records = read_jsonl(path)
    change(records)
    write_jsonl(path, records)


def two_passages(records):
    records[0], records[3] = records[3], records[0]


def two_of_a_passage(records):
    records[0], records[1] = records[1], records[0]


def two_names(records):
    records[0]["n"], records[1]["n"] = records[1]["n"], records[0]["n"]


def a_part_more(records):
    records[0]["parts"] *= 2


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("sampled", two_passages, "sampled.jsonl: its lines are not the self-edits that are"),
        ("sampled", two_of_a_passage, "result 0 is not of the self-edit that it stands for"),
        ("sampled", a_part_more, "sampled.jsonl: its lines are not the self-edits that are"),
        (
            "sampled",
            lambda records: records[4].pop("parts"),
            "sampled.jsonl line 5 is no self-edit",
        ),
        ("sampled", lambda records: records[4].update(x=1), "sampled.jsonl line 5 is no self-edit"),
        ("sampled", lambda records: records[4].update(loss="x"), "no self-edit: .*loss is 'x'"),
        ("sampled", lambda records: records[4]["parts"][0].update(notes=None), "notes is None"),
        ("sampled", lambda records: records[4].update(parts=["x"]), "'x' is no object"),
        ("sampled", lambda records: records[4].update(settings={"data": 5}), "settings are"),
        ("sampled", lambda records: records[4]["parts"][0].update(notes=[5]), "a note is no text"),
        ("sampled", lambda records: records.append(records[0]), "sampled.jsonl: its lines are not"),
        ("scored", two_names, "is not of the self-edit that it stands for"),
        ("scored", lambda records: records[1].update(n=0), "scored.jsonl: 0 stands there twice"),
        ("scored", lambda records: records[1].pop("answers"), "scored.jsonl line 2 is no result"),
        ("scored", lambda records: records[1].pop("steps"), "scored.jsonl line 2 is no result"),
        ("scored", lambda records: records[1].update(tokens=None), "scored.jsonl line 2 is no res"),
        ("scored", lambda records: records[1].update(diverged=2.5), "diverged is 2.5"),
    ],
)
def test_a_log_that_was_changed_is_noticed(
    name, change, message, finished, tiny_folder, tmp_path, monkeypatch
):
    """The records are those of a run killed at the end of its first round."""
    data, _ = finished
    monkeypatch.setattr("selfedit.parse", one_note)
    dies_at(monkeypatch, "train_outer.select", 1)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, data, tmp_path / "out")
    swap(tmp_path / "out" / "round-1" / f"{name}.jsonl", change)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tiny_folder, data, tmp_path / "out")


def test_a_run_without_its_last_record_ends_the_same(finished, tiny_folder, tmp_path, monkeypatch):
    data, out = finished
    monkeypatch.setattr("selfedit.parse", one_note)
    dies_at(monkeypatch, "train_outer.select", 1)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tiny_folder, data, tmp_path / "out")
    for name in ("sampled.jsonl", "scored.jsonl"):
        path = tmp_path / "out" / "round-1" / name
        path.write_bytes(path.read_bytes()[:-20])
    run(monkeypatch, tiny_folder, data, tmp_path / "out")
    expected, got = files(out), files(tmp_path / "out")
    assert expected.keys() == got.keys() and all(expected[k] == got[k] for k in expected)


def test_a_finished_run_does_nothing_more(finished, tiny_folder, monkeypatch):
    data, out = finished
    before = files(out)
    dies_at(monkeypatch, "reward.write_self_edits", 1)
    for stage in ("inner_update", "reinforce", "save_adapter"):
        dies_at(monkeypatch, f"train_outer.{stage}", 1)
    run(monkeypatch, tiny_folder, data, out)
    assert files(out) == before


@pytest.mark.parametrize("who", ["base", "policy"])
def test_when_the_policy_is_in_the_weights(who, finished, tiny_folder, tiny, tmp_path, monkeypatch):
    """While it writes, and learns and answers if it is to. The outer update trains it on the base,
    or round 2 would apply it twice."""
    seen = []
    monkeypatch.setattr("selfedit.parse", one_note)
    stages = ("write_self_edits", "inner_update", "quiz_candidates", "reinforce")
    for name in stages:
        module = "reward" if name in ("write_self_edits", "quiz_candidates") else "train_outer"
        watch_weights(monkeypatch, f"{module}.{name}", tiny, seen)
    extra = ["--learner", who, "--population", 9]  # all in one population
    run(monkeypatch, tiny_folder, finished[0], tmp_path / "out", *extra)
    learns = who == "policy"
    one = zip(stages, (False, False, False, False))  # round 1: B is still zero
    two = zip(stages, (True, learns, learns, False))
    assert seen == [*one, *two]


@pytest.mark.parametrize(
    "who, given, changed", [("base", True, False), ("policy", True, True), ("policy", False, False)]
)
def test_the_learner_is_the_base_or_the_policy(who, given, changed, tiny):
    config, q_proj = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4), tiny.layers[3].self_attn.q_proj
    policy = Adapters.init(tiny, config, 1, seed=0)
    policy.flat += 0.05
    before, place = q_proj.weight.clone(), q_proj.weight.data_ptr()
    with learner(tiny, policy if given else None, SimpleNamespace(learner=who)):
        assert torch.equal(q_proj.weight, before) is not changed
    assert torch.equal(q_proj.weight, before) and q_proj.weight.data_ptr() == place


def test_a_random_models_self_edits_never_stop_a_run(
    tiny_folder, passages_file, tmp_path, monkeypatch, capsys
):
    """It rambles to the limit: every self-edit is flawed, counted, scored, none is reinforced."""
    extra = ["--select", "improving", "--reward", "logprob"]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    [metrics, _] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert metrics["kept"] == 0 and metrics["outer_loss"] is None
    assert sum(metrics["flaws"].values()) == 18
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    assert all(r["why"] == r["flaw"] == "endless" for r in records)
    assert all(r["score"]["logprob"] < 0 for r in records)
    # Without notes a self-edit is the passage alone, which is learnt once.
    assert len(read_jsonl(tmp_path / "out" / "round-1" / "scored.jsonl")) == 3
    assert "reward_mean" in capsys.readouterr().out


def test_metrics_of_repeats():
    """Of four texts two say the same twice, and one has no end; on one passage two are the same."""
    texts = [("a", "X. X.", "repeats"), ("a", "X. X.", "repeats"), ("a", "Y.", "")]
    texts += [("b", "Y.", "endless")]
    edits = []
    for passage, text, flaw in texts:
        # The second part was not asked for.
        parts = [Part(text, [text], text, flaw), Part("")]
        edits.append(SelfEdit(passage, parts, score={"accuracy": 0.5}))
    for e, earned in zip(edits, (0.2, 0.4, 0.6, -100.0)):
        e.reward = earned
    metrics = reward.round_metrics(1, [edits[:2], edits[2:]], [None, 0.5], "accuracy", 2.0)
    found = [metrics[name] for name in ("repeats", "endless", "distinct", "notes_mean")]
    assert found == [0.5, 0.25, 0.75, 1.0]
    assert metrics["outer_loss"] == 0.5 and metrics["reward_mean"] == pytest.approx(0.4)
    assert metrics["reward_agents"] == pytest.approx([0.3, 0.6])  # -100 stands for no answer


def test_the_proxy_reward_trains_nothing(tiny_folder, passages_file, tmp_path, monkeypatch):
    """Some notes ask what a quiz question asks: these are imitated."""
    asked = itertools.cycle(["Who founded it?", "Who?", "Why?"])
    monkeypatch.setattr(
        "selfedit.parse",
        lambda text, style, ended, about: ([f"Question: {next(asked)}\nAnswer: {about}"], ""),
    )
    monkeypatch.setattr("train_outer.inner_update", None)
    extra = ["--reward", "proxy", "--select", "notes"]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    [first, second] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert first["accuracy_mean"] is None and second["round"] == 2
    assert 0 < first["reward_mean"] < first["reward_kept"]
    assert 0 < first["kept_parts"] < 18 and first["outer_loss"] is not None
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    assert all(r["parts"][0]["note_credits"] and set(r["score"]) == {"proxy"} for r in records)


def test_parts_are_credited_and_imitated(tiny_folder, passages_file, tmp_path, monkeypatch):
    """The default way, on passages of two sentences with both questions about the first: its parts
    alone are kept."""
    monkeypatch.setattr("selfedit.parse", one_note)
    extra = ["--select", "parts", "--reward", "logprob", "--rounds", 1]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    for id in {r["passage"] for r in records}:
        own = [r for r in records if r["passage"] == id]
        earned = [r["parts"][0]["credit"] for r in own]
        assert earned == [r["score"]["logprob"] for r in own] and len(set(earned)) == 3
        assert [r["parts"][1]["credit"] for r in own] == [None] * 3
        assert [r["parts"][0]["kept"] for r in own] == [c == max(earned) for c in earned]
        assert not any(r["parts"][1]["kept"] for r in own)
    [metrics] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert metrics["kept_parts"] == metrics["kept"] == 3


NOTE = "Question: What is old?\nAnswer: Rolm is old."


def test_the_same_notes_are_studied_once_and_earn_the_same(
    tiny_folder, passages_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("selfedit.parse", lambda *_: ([NOTE], ""))
    seen, update = [], train_outer.inner_update
    count = lambda *a: seen.append(len(a[2])) or update(*a)  # noqa: E731
    monkeypatch.setattr(train_outer, "inner_update", count)
    extra = ["--reward", "logprob", "--rounds", 1]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    ids = {r["passage"] for r in records}
    assert sum(seen) == len(ids) == len(records) / 3
    for id in ids:
        assert len({r["reward"] for r in records if r["passage"] == id}) == 1


def test_where_the_passage_alone_diverged_nothing_improves_on_it(
    tiny_folder, passages_file, tmp_path, monkeypatch
):
    """Its -100 is no bar; and the -100 of a self-edit that diverged is in no mean."""
    monkeypatch.setattr("selfedit.parse", one_note)
    quiz = train_outer.reward.quiz_candidates

    def diverged_alone(model, tok, group, adapters, outcomes):
        for c, outcome in zip(group, outcomes):
            outcome.diverged = len(c.examples) == 1 or c.name == 0  # the passage; a self-edit
        return quiz(model, tok, group, adapters, outcomes)

    monkeypatch.setattr("train_outer.reward.quiz_candidates", diverged_alone)
    extra = ["--select", "improving", "--reward", "logprob", "--rounds", 1]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    records = read_jsonl(tmp_path / "out" / "round-1" / "candidates.jsonl")
    [metrics] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert not any(part["kept"] for r in records for part in r["parts"])
    assert records[0]["flaw"] == "diverged" and records[0]["reward"] == -100
    assert metrics["reward_mean"] == pytest.approx(np.mean([r["reward"] for r in records[1:]]))


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--samples", "0"], "0 is not a number from 1 up"),
        (["--samples", "1", "--select", "parts"], "it needs --samples of at least 2"),
        (["--data", "nowhere.json"], "cannot read nowhere.json"),
        (["--model", "nowhere"], "nowhere is not a model folder"),
        (["--skip", "99"], "no passages"),
        (["--max-new", "99999"], "over the model's context of 2048"),
        (["--top-layers", "9"], "the model has 4 layers"),
        (["--out", "README.md"], "cannot write README.md"),
        (["--frobnicate"], "unrecognized arguments"),
        (["--reward", "proxy", "--style", "self-qa"], "--reward proxy is for --style questions"),
        (["--reward", "proxy", "--select", "improving"], "and not for --select improving"),
        (["--select", "notes"], "--select notes needs --reward proxy"),
        (["--outer", "weighted", "--reward", "logprob"], "weighted needs --reward accuracy"),
        (["--keep", 2], "--keep has no effect with --select best"),
        (["--lr", "fast"], "invalid float value"),
    ],
)
def test_bad_input_is_one_clear_line(
    extra, message, tiny_folder, passages_file, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    text = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err
    assert message in text and text.startswith("error: ") and text.strip().count("\n") == 0
    assert e.value.code != 0


def test_another_setting_in_the_same_folder_is_refused(finished, tiny_folder, monkeypatch):
    data, out = finished
    with pytest.raises(SystemExit, match="was started with temperature = 0.7, now it is 0.1"):
        run(monkeypatch, tiny_folder, data, out, "--temperature", "0.1")


def test_passages_that_changed_are_not_resumed(finished, tiny_folder, tmp_path, monkeypatch):
    data, out = finished
    other = tmp_path / "passages.json"
    other.write_text(data.read_text().replace("Ada Quell", "Hessa Lorn"))
    settings = json.loads((out / "settings.json").read_text()) | {"data": str(other)}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="was started with data_sha256"):
        run(monkeypatch, tiny_folder, other, tmp_path / "out")


def test_only_what_is_kept_is_imitated(tok, monkeypatch):
    seen = []

    def spy(model, policy, examples, config, *args):
        seen.extend(examples)
        assert (config.lr, config.epochs, config.row_len, config.batch) == (1e-3, 1, 0, 2)
        return SimpleNamespace(diverged=False, loss=1.0)

    monkeypatch.setattr(train_outer, "update_one", spy)
    args = SimpleNamespace(outer_lr=1e-3, outer_epochs=1, outer_row_len=0, outer_batch=2)
    args.outer, edits = "weighted", []
    for texts, kept in (
        (["good", "not this"], [True, False]),
        (["nor", "that"], [False, False]),
        (["no", "fine"], [False, True]),
    ):
        parts = [Part("as sampled", target=t, kept=k) for t, k in zip(texts, kept)]
        edits.append(SelfEdit("a", parts))
    edits[0].parts[0].credit, edits[2].parts[1].credit = 0.6, 0.2
    pairs = to_imitate({"a": [[5], [6]]}, edits, "parts", 6, "weighted")
    how = (None, args, 0, "test")
    assert train_outer.reinforce(None, tok, pairs, *how) == 1.0
    assert [tok.decode(e.ids[1:]) for e in seen] == ["good<|im_end|>", "fine<|im_end|>"]
    assert [e.ids[0] for e in seen] == [5, 6]
    assert [e.weight for e in seen] == pytest.approx([1.5, 0.5])
    assert train_outer.reinforce(None, tok, [], *how) is None and len(seen) == 2


def test_an_outer_update_that_diverges_is_one_clear_line(
    tiny_folder, passages_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("selfedit.parse", one_note)
    extra = ["--outer-lr", "1e38", "--outer-epochs", 4, "--limit", 1, "--rounds", 1]
    with pytest.raises(SystemExit, match="error: the outer update diverged, after .*--outer-lr"):
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# -----------------------------------------------------------------------------
# one writes, another studies


def test_what_one_model_writes_another_studies(
    finished, tiny_folder, student_folder, tmp_path, monkeypatch
):
    """The policy is of the writer; adapters, examples and answers are of the student."""
    data, _ = finished
    monkeypatch.setattr("selfedit.parse", one_note)
    its_tok, studied, asked = Tokenizer(student_folder), [], []
    real, quiz = train_outer.inner_update, reward.ask

    def watched(model, adapters, examples, *rest):
        studied.append((model, examples))
        return real(model, adapters, examples, *rest)

    def asks(model, tok, *rest, **options):
        asked.append((model, tok))
        return quiz(model, tok, *rest, **options)

    monkeypatch.setattr(train_outer, "inner_update", watched)
    monkeypatch.setattr("reward.ask", asks)
    out = tmp_path / "out"
    run(monkeypatch, tiny_folder, data, out, "--student", student_folder, "--rounds", 1)
    student = studied[0][0]
    assert student.config.qkv_bias and student.dtype == torch.float32
    assert all(model is student for model, _ in studied)
    assert all(model is student for model, _ in asked) and asked
    assert all(tok.encode(" the") == its_tok.encode(" the") for _, tok in asked)
    texts = set()
    for _, examples in studied:
        for e in (e for own in examples for e in own):
            texts.add(its_tok.decode(list(e.ids)))
    assert any("Rolm was founded by Ada Quell." in text for text in texts)
    policy = load_adapter(load_model(tiny_folder, "cpu", "float32"), out / "round-1" / "policy")
    assert policy.config.rank == 2
    # Another student is another run, also in the same folder.
    tensors = load_file(student_folder / "model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(student_folder, other)
    save_file({name: t + 0.1 for name, t in tensors.items()}, other / "model.safetensors")
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"student": str(other)}))
    with pytest.raises(SystemExit, match="was started with student_weights = "):
        run(monkeypatch, tiny_folder, data, out, "--student", other, "--rounds", 1)


def test_a_student_has_no_policy(tiny_folder, student_folder, finished, tmp_path, monkeypatch):
    more = ("--student", student_folder, "--learner", "policy")
    with pytest.raises(SystemExit, match="^error: --learner policy: the policy is of --model"):
        run(monkeypatch, tiny_folder, finished[0], tmp_path / "out", *more)
    with pytest.raises(SystemExit, match="nowhere is not a model folder"):
        run(monkeypatch, tiny_folder, finished[0], tmp_path / "out", "--student", "nowhere")
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# several agents


def records_of(out):
    return [SelfEdit.from_record(r) for r in read_jsonl(out / "round-1" / "candidates.jsonl")]


TWO = ("--agents", 2, "--select", "best", "--temperature", 1, "--rounds", 1)


def first_is_better_once(e, passage, result, metric, of=reward.credit):
    """A self-edit earns by its passage's and its writer's number: on one passage the first agent is
    the better one, on two the second."""
    of(e, passage, result, metric)
    better = (e.agent == 1) == (passage.title == "Rolm 0")
    e.reward = e.parts[0].credit = 0.5 + 0.25 * better


@pytest.fixture(scope="module")
def of_two(finished, tiny_folder, tmp_path_factory):
    """{exchange: folder} of runs of two agents, with what was imitated in taught.json."""
    home, folders = tmp_path_factory.mktemp("agents"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfedit.parse", one_note)
        patch.setattr("reward.credit", first_is_better_once)
        for exchange in train_outer.EXCHANGE:
            folders[exchange], taught = home / exchange, []
            patch.setattr(train_outer, "reinforce", partial(noted, taught))
            run(patch, tiny_folder, finished[0], folders[exchange], *TWO, "--exchange", exchange)
            (home / f"{exchange}.json").write_text(json.dumps(taught))
    return folders


def noted(taught: list, model, tok, pairs, *rest, of=train_outer.reinforce):
    taught.append([text for _, text, _ in pairs])
    return of(model, tok, pairs, *rest)


def policy_bytes(out, k: int) -> list[bytes]:
    found = sorted((out / f"round-{k}").glob("policy*/adapter_model.safetensors"))
    return [path.read_bytes() for path in found]


def test_every_agent_writes_and_all_is_studied(of_two):
    for out in of_two.values():
        [metrics] = read_jsonl(out / "metrics.jsonl")
        edits, folder, texts = records_of(out), out / "round-1", []
        assert [e.agent for e in edits] == [1] * 9 + [2] * 9 and metrics["total"] == 18
        assert len(read_jsonl(folder / "scored.jsonl")) == 18
        for name in ("sampled.jsonl", "sampled-2.jsonl"):
            own = [SelfEdit.from_record(r) for r in read_jsonl(folder / name)]
            texts.append([e.parts[0].text for e in own])
        assert texts[0] + texts[1] == [e.parts[0].text for e in edits]
        assert texts[0] != texts[1]  # the same policy at first, but another seed
        assert metrics["reward_agents"] == pytest.approx([0.5 + 0.25 / 3, 0.5 + 0.5 / 3])
        policies = sorted(folder.glob("policy*/adapter_model.safetensors"))
        assert len({path.read_bytes() for path in policies}) == 2


def test_who_learns_from_whom(of_two):
    for exchange, kept_by, taught in (
        ("all", [1, 2], [3, 3]),
        ("own", [3, 3], [3, 3]),
        ("special", [1, 2], [1, 2]),
    ):
        edits = records_of(of_two[exchange])
        assert [sum(e.kept and e.agent == a for e in edits) for a in (1, 2)] == kept_by
        imitated = json.loads(of_two[exchange].with_suffix(".json").read_text())
        assert list(map(len, imitated)) == taught
        for a, own in enumerate(imitated, 1):
            of = [e for e in edits if e.kept and (exchange == "all" or e.agent == a)]
            assert sorted(own) == sorted(e.parts[0].target for e in of)


def test_each_agent_goes_on_with_its_own_policy(
    of_two, finished, tiny_folder, tmp_path, monkeypatch
):
    out, loaded = tmp_path / "out", []
    shutil.copytree(of_two["special"], out)
    load = train_outer.load_adapter

    def loads(model, folder):
        loaded.append(str(folder.relative_to(out)))
        return load(model, folder)

    monkeypatch.setattr(train_outer, "load_adapter", loads)
    merged = train_outer.merged
    seen = []

    def merges(model, policy):
        seen.append(policy.flat.clone())
        return merged(model, policy)

    monkeypatch.setattr(train_outer, "merged", merges)
    monkeypatch.setattr("selfedit.parse", one_note)
    how = (*TWO, "--exchange", "special", "--rounds", 2)
    run(monkeypatch, tiny_folder, finished[0], out, *how)
    assert loaded == ["round-1/policy", "round-1/policy-2"]
    assert len(seen) == 2 and not torch.equal(*seen)
    assert len(read_jsonl(out / "metrics.jsonl")) == 2


def test_agents_that_are_killed_go_on(of_two, finished, tiny_folder, tmp_path, monkeypatch):
    """After the first agent's policy is written, and before the second's."""
    monkeypatch.setattr("selfedit.parse", one_note)
    monkeypatch.setattr("reward.credit", first_is_better_once)
    how = (tiny_folder, finished[0], tmp_path / "out", *TWO, "--exchange", "special")
    with monkeypatch.context() as patch:
        dies_at(patch, "train_outer.save_adapter", 2)
        with pytest.raises(KeyboardInterrupt):
            run(patch, *how)
    assert (tmp_path / "out" / "round-1" / "policy").exists()
    assert not (tmp_path / "out" / "round-1" / "policy-2").exists()
    run(monkeypatch, *how)
    assert files(tmp_path / "out") == files(of_two["special"])


@pytest.mark.parametrize(
    "flags, told",
    [
        (
            ["--agents", 2, "--select", "notes", "--reward", "proxy", "--exchange", "special"],
            "pooled",
        ),
        (["--reward", "proxy", "--student", "x"], "--student has no effect with --reward proxy"),
        (["--agents", 0], "--agents: 0 is not a number from 1 up"),
        (["--exchange", "own"], "--exchange has no effect with one of --agents"),
        (
            ["--agents", 2, "--samples", 1, "--exchange", "own", "--select", "parts"],
            "it needs --samples of at least 2",  # each compares its own
        ),
        (["--agents", 2, "--learner", "policy"], "--learner policy: which of the --agents"),
    ],
)
def test_agents_that_cannot_be(flags, told, finished, tiny_folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tiny_folder, finished[0], tmp_path / "out", *flags)
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
