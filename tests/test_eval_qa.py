"""eval_qa.py: statistics, and the whole ladder on a tiny model."""

import json

import numpy as np
import pytest
from conftest import run_script, watch_weights

import eval_qa
from eval_qa import bootstrap, per_passage, summarize
from lora import PROJECTIONS, Adapters, LoRAConfig, save_adapter


def test_bootstrap_covers_the_mean_of_normal_data():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap(rng.normal(0.3, 1, 40), seed=trial, n=1000)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199  # 95 % nominal, a little less with 40 passages
    assert bootstrap(np.full(10, 0.5), 0) == [0.5, 0.5]


def test_differences_are_paired():
    base = np.linspace(0, 0.8, 20)  # passages differ a lot, the step up is the same in each
    table = {
        m: {k: v for k in eval_qa.METRICS} for m, v in (("base", base), ("passage", base + 0.1))
    }
    result = summarize(table, seed=0)
    rows, [step] = result["rows"], result["steps"]
    assert (
        "gap_closed" not in result
        and step["delta"] == pytest.approx(0.1)
        and step["ci95"] == pytest.approx([0.1, 0.1])
    )
    assert rows[0]["ci95"][0] < rows[0]["accuracy"] < rows[0]["ci95"][1]


def test_the_last_policy_is_compared_with_every_row_below():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 50)
    table = {
        m: {k: np.full(50, v) + noise * (m != "base") for k in eval_qa.METRICS}
        for m, v in [
            ("base", 0.0),
            ("passage", 0.2),
            ("seal-1", 0.3),
            ("seal-2", 0.4),
            ("in-context", 0.7),
        ]
    }
    result = summarize(table, seed=0)
    pairs = {(s["from"], s["to"]): s["delta"] for s in result["steps"]}
    assert len(pairs) == len(result["steps"]) == 6  # four from row to row, and two more to seal-2
    assert pairs["passage", "seal-2"] == pytest.approx(0.2) and ("base", "seal-2") in pairs
    gap = result["gap_closed"]
    assert (
        gap["by"] == "seal-2"
        and gap["share"] == pytest.approx(0.4)
        and gap["ci95"] == pytest.approx([0.4, 0.4])
    )
    table["in-context"] = table["base"]
    assert summarize(table, seed=0)["gap_closed"]["share"] is None  # nothing to close


def test_directions_are_averaged_apart():
    class P:
        questions = tuple(
            type("Q", (), {"direction": d}) for d in ("forward", "forward", "reversed")
        )

    answers = [{"accuracy": a, "em": 0.0, "f1": 0.0, "logprob": -1.0} for a in (1.0, 0.0, 1.0)]
    table = per_passage([P], [[answers]])
    assert (
        table["accuracy"][0] == pytest.approx(2 / 3)
        and table["forward"][0] == 0.5
        and table["reversed"][0] == 1.0
    )

    class Q:  # without reversed questions: it counts for forward only
        questions = P.questions[:2]

    table = per_passage([P, Q], [[answers], [answers[:2]]])
    assert table["forward"].tolist() == [0.5, 0.5] and table["reversed"].tolist() == [1.0]


def ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra):
    args = [
        "--data",
        passages_file,
        "--out",
        tmp_path / "ladder.json",
        "--work",
        tmp_path / "work",
        "--max-new",
        8,
    ]
    args += ["--epochs", 2, "--steps", 3, "--top-layers", 2, "--rank", 2]
    run_script(monkeypatch, eval_qa, tiny_folder, *args, *extra)


def test_the_ladder(tiny, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, tuple(PROJECTIONS), 0, 4), 1, seed=0)
    policy.flat += 0.05
    save_adapter(policy, tmp_path / "run" / "round-1" / "policy", tiny_folder)
    settings = {"task": "qa", "data": str(passages_file), "split": "train", "skip": 0, "limit": 0}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    extra = ["--run", tmp_path / "run", "--match", "both", "--samples", 2, "--seeds", 2]
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    out = capsys.readouterr().out
    methods = (
        "base passage passage+unrelated passage+self-edit passage+pooled seal-1 in-context".split()
    )
    for protocol in ("epochs", "steps"):
        result = json.loads((tmp_path / f"ladder_{protocol}.json").read_text())
        assert (
            [r["method"] for r in result["rows"]] == methods
            and result["n_passages"] == 2
            and result["n_questions"] == 4
        )
        pairs = [(s["from"], s["to"]) for s in result["steps"]]
        notes = ("passage", "passage+self-edit")
        assert pairs == [*zip(methods, methods[1:]), notes, *((m, "seal-1") for m in methods[:4])]
        for r in result["rows"]:
            assert {
                "accuracy",
                "ci95",
                "em",
                "f1",
                "logprob",
                "forward",
                "reversed",
            } <= r.keys() and r["logprob"] < 0
        trained = [r["train_steps"] for r in result["rows"][1:-1]]
        assert trained == [3.0] * 5 if protocol == "steps" else trained[0] == 2.0
        assert (result["settings"]["steps"], result["settings"]["seeds"]) == (3, 2)
        assert result["protocol"] == protocol and result["command"].startswith("python eval_qa.py")
    assert all(m in out for m in methods) and "--- seal-1" in out
    before = (tmp_path / "ladder_steps.json").read_text()
    monkeypatch.setattr("quiz.study_and_quiz", None)  # everything is found in the work folder
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    assert (tmp_path / "ladder_steps.json").read_text() == before
    with pytest.raises(SystemExit, match="was trained on 3 of these passages"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra, "--split", "")
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {"split": ""}))
    with pytest.raises(SystemExit, match="was trained on 2 of these passages"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    for key, other in (("style", "rewrite"), ("learner", "policy"), ("task", "arc")):
        (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {key: other}))
        with pytest.raises(SystemExit, match=f"was trained with --{key} {other}"):
            ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "run" / "round-1" / "policy" / "adapter_model.safetensors").write_bytes(
        b"another policy"
    )
    with pytest.raises(SystemExit, match="was started with policies"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)


def test_recipes_and_a_stronger_editor(tiny_folder, passages_file, tmp_path, monkeypatch):
    data = json.loads(passages_file.read_text())
    for p in data["passages"]:
        p["completions"] = ["1. One note.\n2. Another.", "A third."]
    passages_file.write_text(json.dumps(data))
    best = {"passage": {"lr": 1e-3, "steps": 2}, "passage+unrelated": {"lr": 2e-3, "steps": 3}}
    recipes = tmp_path / "recipes.json"
    recipes.write_text(json.dumps({"best": best}))
    extra = ["--match", "steps", "--recipes", recipes, "--samples", 2]
    with pytest.raises(SystemExit, match=r"no 'lr' and 'steps' for 'passage\+self-edit'"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    recipes.write_text(
        json.dumps(
            {"best": best | {"passage+self-edit": {"lr": 4e-3, "steps": 4, "accuracy": 0.5}}}
        )
    )
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, *extra)
    rows = {r["method"]: r for r in json.loads((tmp_path / "ladder.json").read_text())["rows"]}
    used = {m: (r["train_steps"], r["lr"]) for m, r in rows.items() if "lr" in r}
    own = (4, pytest.approx(4e-3))
    notes = dict.fromkeys(["passage+self-edit", "passage+pooled", "stronger-editor"], own)
    assert used == {"passage": (2, 1e-3), "passage+unrelated": (3, 2e-3)} | notes


def test_what_the_notes_of_a_row_are(tiny_folder, passages_file, tmp_path, monkeypatch):
    seen = {}
    real = eval_qa.study_all

    def spy(model, tok, candidates, lora, study, seed, population, log, label):
        seen[label] = candidates
        return real(model, tok, candidates, lora, study, seed, population, log, label)

    monkeypatch.setattr(eval_qa, "study_all", spy)
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path)
    assert "passage+pooled (steps)" not in seen  # of one self-edit there is nothing to pool
    own, other = seen["passage+self-edit (steps)"], seen["passage+unrelated (steps)"]
    assert [c.passage for c in own] == [c.passage for c in other] and own[0].passage.title == own[
        0
    ].title
    assert [(c.notes, c.title) for c in other] == [
        (own[1].notes, "Town 4"),
        (own[0].notes, "Town 3"),
    ]
    monkeypatch.setattr(
        eval_qa.Climb, "write", lambda self, method: [[("a", "b"), ("b", "c")], [(), ("d",)]]
    )
    ladder(
        monkeypatch,
        tiny_folder,
        passages_file,
        tmp_path,
        "--work",
        tmp_path / "two",
        "--samples",
        2,
    )
    assert [c.notes for c in seen["passage+pooled (steps)"]] == [("a", "b", "c"), ("d",)]


def test_no_rounds_there(tiny_folder, passages_file, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no finished round"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--run", tmp_path)


def test_a_passage_longer_than_the_context(tiny_folder, passages_file, tmp_path, monkeypatch):
    data = json.loads(passages_file.read_text())
    data["passages"][-1]["passage"] = "long " * 3000
    passages_file.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="context of 2048"):
        ladder(monkeypatch, tiny_folder, passages_file, tmp_path)
    assert not (tmp_path / "ladder.json").exists()


def test_without_studying(tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    ladder(monkeypatch, tiny_folder, passages_file, tmp_path, "--no-study", "--split", "")
    result = json.loads((tmp_path / "ladder.json").read_text())
    assert [r["method"] for r in result["rows"]] == ["base", "in-context"] and result[
        "n_passages"
    ] == 5
    assert "nothing studied" in capsys.readouterr().out


@pytest.mark.parametrize("learner", ["base", "policy"])
def test_a_policy_writes_and_its_learner_studies(
    learner, tiny, tiny_folder, passages_file, tmp_path, monkeypatch
):
    policy, seen = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 0, 4), 1, seed=0), []
    policy.flat += 0.05
    save_adapter(policy, tmp_path / "policy", tiny_folder)
    for name in ("write_self_edits", "study_all"):
        watch_weights(monkeypatch, f"eval_qa.{name}", tiny, seen)
    ladder(
        monkeypatch,
        tiny_folder,
        passages_file,
        tmp_path,
        "--policy",
        tmp_path / "policy",
        "--learner",
        learner,
    )
    *before, writes, studies = seen
    assert not any(changed for _, changed in before) and len(before) == 4
    assert (writes, studies) == (("write_self_edits", True), ("study_all", learner == "policy"))
