"""learn.py: study a text, ask about it, keep the result as an adapter and as a whole model."""

from contextlib import nullcontext

import pytest
import torch
from conftest import run_script

import learn
from lm.adapters import load_adapter, save_adapter
from lm.checkpoint import load_model
from lm.files import read_json
from lora import Adapters, LoRAConfig, attached, merged


def run(monkeypatch, tiny_folder, *args):
    small = ["--max-new", 8, "--rank", 2, "--top-layers", 2]
    run_script(monkeypatch, learn, tiny_folder, *args, *small)


@pytest.mark.parametrize("who", [None, "base", "policy"])
def test_study_then_ask(who, tiny, tiny_folder, tmp_path, monkeypatch, capsys):
    """Without a policy, and with one that only writes, or learns too: then the adapter stands on
    it."""
    (tmp_path / "rolm.txt").write_text("Rolm was founded by Ada Quell.")
    policy = Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj", "up_proj"), 0, 4), 1, seed=0)
    policy.flat += 0.05
    save_adapter(policy, tmp_path / "p", tiny_folder)
    extra = ["--policy", tmp_path / "p", "--learner", who] if who else []
    paths = ["--out", tmp_path / "a", "--merged", tmp_path / "m"]
    about = ["study", tmp_path / "rolm.txt", "--title", "Rolm"]
    run(monkeypatch, tiny_folder, *about, *paths, *extra)
    below = str(tmp_path / "p") if who == "policy" else None
    assert read_json(tmp_path / "a" / "study.json") == {"title": "Rolm", "policy": below}
    ids, learnt = torch.arange(10)[None], load_adapter(tiny, tmp_path / "a")
    with torch.no_grad():
        before = tiny(ids)
        with merged(tiny, policy) if below else nullcontext(), attached(tiny, learnt):
            expected = tiny(ids)
        whole = load_model(tmp_path / "m", "cpu", "float32")(ids)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-3)
    assert (expected - before).abs().max() > 1e-3
    capsys.readouterr()
    seen = []

    def generate(model, *_, **options):
        seen.append((model.layers[0].mlp.up_proj, options))
        return [[5]]

    monkeypatch.setattr(learn, "generate", generate)
    run(monkeypatch, tiny_folder, "ask", "Who founded Rolm?", "--adapter", tmp_path / "a")
    [(up, options)] = seen
    assert torch.equal(up.weight, tiny.layers[0].mlp.up_proj.weight) is not bool(below)
    assert len(options["adapters"]) == 1 and capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [(None, "cannot read"), ("  \n", "is empty"), (b"\xff\xfe\xfa", "cannot read")],
)
def test_bad_text(text, message, tiny_folder, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "x.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tiny_folder, "study", tmp_path / "x.txt", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_divergence_is_one_clear_line(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("Rolm was founded by Ada Quell.")
    args = ["study", tmp_path / "x.txt", "--lr", "1e38", "--out", tmp_path / "a"]
    with pytest.raises(SystemExit, match="diverged"):
        run(monkeypatch, tiny_folder, *args)
