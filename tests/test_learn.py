"""learn.py: study a text, ask about it, keep the result as an adapter and as a whole model."""

from contextlib import nullcontext

import pytest
import torch
from conftest import run_script

import learn
from checkpoint import load_model
from common import read_json
from lora import Adapters, LoRAConfig, attached, load_adapter, merged, save_adapter


def run(monkeypatch, tiny_folder, *args):
    run_script(
        monkeypatch, learn, tiny_folder, *args, "--max-new", 8, "--rank", 2, "--top-layers", 2
    )


@pytest.mark.parametrize("who", [None, "base", "policy"])
def test_study_then_ask(who, tiny, tiny_folder, tmp_path, monkeypatch, capsys):
    """Without a policy, and with one that only writes, or studies too: then the adapter stands on it."""
    (tmp_path / "rolm.txt").write_text("Rolm was founded by Ada Quell.")
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj", "up_proj"), 0, 4), 1, seed=0)
    policy.flat += 0.05
    save_adapter(policy, tmp_path / "p", tiny_folder)
    extra = ["--policy", tmp_path / "p", "--learner", who] if who else []
    paths = ["--out", tmp_path / "a", "--merged", tmp_path / "m"]
    run(monkeypatch, tiny_folder, "study", tmp_path / "rolm.txt", "--title", "Rolm", *paths, *extra)
    assert read_json(tmp_path / "a" / "study.json") == {
        "title": "Rolm",
        "policy": str(tmp_path / "p") if who == "policy" else None,
    }
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = tiny(ids)
        with (
            merged(tiny, policy) if who == "policy" else nullcontext(),
            attached(tiny, load_adapter(tiny, tmp_path / "a")),
        ):
            expected = tiny(ids)
    torch.testing.assert_close(
        load_model(tmp_path / "m", "cpu", "float32")(ids), expected, atol=1e-4, rtol=1e-3
    )
    assert (expected - before).abs().max() > 1e-3
    capsys.readouterr()
    seen = []
    monkeypatch.setattr(
        learn,
        "generate",
        lambda model, *_, **how: seen.append((model.layers[0].mlp.up_proj, how)) or [[5]],
    )
    run(monkeypatch, tiny_folder, "ask", "Who founded Rolm?", "--adapter", tmp_path / "a")
    [(up, how)] = seen
    assert (
        torch.equal(up.weight, tiny.layers[0].mlp.up_proj.weight) is (who != "policy")
        and len(how["adapters"]) == 1
    )
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message", [(None, "cannot read"), ("  \n", "is empty"), (b"\xff\xfe\xfa", "cannot read")]
)
def test_bad_text(text, message, tiny_folder, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "x.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tiny_folder, "study", tmp_path / "x.txt", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_divergence_is_one_clear_line(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("Rolm was founded by Ada Quell.")
    with pytest.raises(SystemExit, match="diverged"):
        run(
            monkeypatch,
            tiny_folder,
            "study",
            tmp_path / "x.txt",
            "--lr",
            "1e38",
            "--out",
            tmp_path / "a",
        )
