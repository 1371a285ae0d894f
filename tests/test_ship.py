"""A policy that is shipped: its size, what it was made for, and that another base refuses it."""

import json
import shutil

import pytest
import torch
from conftest import run_script, write_checkpoint

import train_outer
from experiments import ship
from lm.adapters import base_of, load_adapter
from lm.checkpoint import load_model
from lm.files import read_jsonl, write_jsonl
from lora import merge


@pytest.fixture(scope="module")
def shipped(tiny_folder, tmp_path_factory):
    """A run of one round that imitates everything, its data and the shipped policy."""
    tmp = tmp_path_factory.mktemp("ship")
    entry = {"title": "Rolm", "passage": "Rolm was founded by Ada Quell."}
    entry |= {"questions": [{"question": "Who?", "answer": "Ada"}]}
    data, note = tmp / "passages.json", "Question: Who founded it?\nAnswer: Ada Quell."
    data.write_text(json.dumps([entry]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfedit.parse", lambda text, *_: ([note], ""))
        patch.setattr("reward.keep_best_part", lambda group, k: None)
        args = ["--data", data, "--out", tmp / "run", "--samples", 2, "--rounds", 1]
        args += ["--max-new", 6, "--steps", 2, "--top-layers", 2, "--outer-rank", 2]
        run_script(patch, train_outer, tiny_folder, "qa", *args, "--outer-epochs", 9)
        run_script(patch, ship, tiny_folder, "--run", tmp / "run", "--out", tmp / "policy")
    return tmp


def test_what_is_shipped(shipped, tiny):
    folder = shipped / "policy"
    about = json.loads((folder / "policy.json").read_text())
    policy, run = load_adapter(tiny, folder), load_adapter(tiny, shipped / "run/round-1/policy")
    assert torch.equal(policy.flat, run.flat.bfloat16().float())
    assert (about["round"], about["n"], about["bytes"]) == ("round-1", 2, 2 * policy.size)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert about["bytes"] < size < 1.5 * about["bytes"]
    scores = about["logprob"]  # the policy was taught these
    assert scores["float32"] > scores["untrained"] + 0.1
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=0.02)
    assert about["settings"]["samples"] == 2 and about["base"] == base_of(tiny)


def test_another_base_refuses_it(shipped, tiny, tmp_path):
    other = load_model(write_checkpoint(tmp_path / "other", "smollm2"), "cpu", "float32")
    with torch.no_grad():
        other.embed_tokens.weight[0, 0] += 1.0
    with pytest.raises(SystemExit, match="is a policy for another base model than this one"):
        load_adapter(other, shipped / "policy")
    assert base_of(other) != base_of(tiny)


def test_the_fingerprint_is_the_bases(shipped, tiny_folder, tiny):
    for dtype in ("float32", "bfloat16"):
        model = load_model(tiny_folder, "cpu", dtype)
        assert base_of(model) == base_of(model.bfloat16())
        merge(model, load_adapter(model, shipped / "policy"))
        load_adapter(model, shipped / "policy")  # a merged policy makes no other base


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--round", 2], "round 2 is not finished, of 1"),
        (["--run", "nowhere"], "nowhere"),
        (["--out", "README.md"], "README.md"),
        (["--model", "elsewhere"], "was trained with --model"),
    ],
)
def test_what_cannot_be_shipped(extra, message, shipped, tiny_folder, tmp_path, monkeypatch):
    args = ["--run", shipped / "run", "--out", tmp_path / "policy", *extra]
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, ship, tiny_folder, *args)


def test_a_large_one_is_refused(shipped, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "LARGEST", 1000)
    with pytest.raises(SystemExit, match="has rank 2, 0.0 MB .* smaller --outer-rank"):
        args = ["--run", shipped / "run", "--out", tmp_path / "policy"]
        run_script(monkeypatch, ship, tiny_folder, *args)
    assert not (tmp_path / "policy").exists()


def test_other_data_and_nothing_imitated_are_one_line(shipped, tiny_folder, tmp_path, monkeypatch):
    data, args = shipped / "passages.json", ["--run", shipped / "run", "--out", tmp_path / "policy"]
    before = data.read_text()
    data.write_text(before.replace("Who?", "Whom?"))
    with pytest.raises(SystemExit, match="passages.json has changed since"):
        run_script(monkeypatch, ship, tiny_folder, *args)
    data.write_text(before)
    monkeypatch.setattr(ship, "to_imitate", lambda *_: [])
    with pytest.raises(SystemExit, match="round-1: nothing was imitated in this round"):
        run_script(monkeypatch, ship, tiny_folder, *args)
    assert not (tmp_path / "policy").exists()


def test_it_is_measured_on_what_the_round_imitated(shipped, tiny_folder, tmp_path, monkeypatch):
    """By the run's own rule, of which older runs had one."""
    shutil.copytree(shipped / "run", tmp_path / "run")
    file, seen = tmp_path / "run" / "settings.json", []
    monkeypatch.setattr(ship, "to_imitate", lambda *how: seen.append(how[2:]) or [])
    settings = json.loads(file.read_text())
    assert settings["outer"] == "restem"
    for outer in ({"outer": "restem"}, {"outer": "weighted"}, {}):
        file.write_text(json.dumps({k: v for k, v in settings.items() if k != "outer"} | outer))
        with pytest.raises(SystemExit, match="nothing was imitated"):
            args = ["--run", tmp_path / "run", "--out", tmp_path / "policy"]
            run_script(monkeypatch, ship, tiny_folder, *args)
    assert [how[-1] for how in seen] == ["restem", "weighted", "restem"]


@pytest.mark.parametrize("outer", ["grpo", "pairs"])
def test_of_samples_the_better_are_measured(outer, shipped, tiny_folder, tmp_path, monkeypatch):
    """Of a run that learnt from the worse, too: as they were sampled."""
    shutil.copytree(shipped / "run", tmp_path / "run")
    file, log = tmp_path / "run/settings.json", tmp_path / "run/round-1/candidates.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outer": outer}))
    records, seen = read_jsonl(log), []
    for credit, record in zip((0.0, 1.0), records, strict=True):
        record["parts"][0] |= {"credit": credit, "ids": f"5 6 {int(credit)}"}
    write_jsonl(log, records)
    real = ship.prefill

    def watched(model, prompts, *rest):
        seen.append(prompts)
        return real(model, prompts, *rest)

    monkeypatch.setattr(ship, "prefill", watched)
    monkeypatch.setattr(ship, "answer_logprobs", lambda replies, *_: seen.append(replies) or [0.0])
    args = ["--run", tmp_path / "run", "--out", tmp_path / "policy"]
    run_script(monkeypatch, ship, tiny_folder, *args)
    assert seen[1::2] == [[[5, 6, 1]]] * 3 and all(len(prompts) == 1 for prompts in seen[::2])
    assert json.loads((tmp_path / "policy/policy.json").read_text())["n"] == 1


def test_a_damaged_label_is_no_label(shipped, tiny, tmp_path):
    """A policy.json that names no base does not pass for one that fits."""
    shutil.copytree(shipped / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "policy.json").write_text("{}")
    with pytest.raises(SystemExit, match="for another base model"):
        load_adapter(tiny, tmp_path / "policy")
