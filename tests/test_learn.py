"""learn.py: study a text, ask about it, keep the result as an adapter and as a whole model."""

import pytest
import torch
from conftest import run_script

import learn
from checkpoint import load_model
from lora import attached, load_adapter


def run(monkeypatch, tiny_folder, *args):
    run_script(monkeypatch, learn, tiny_folder, *args, "--max-new", 8, "--rank", 2, "--top-layers", 2)


def test_study_then_ask(tiny, tiny_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "rolm.txt").write_text("Rolm was founded by Ada Quell.")
    run(
        monkeypatch,
        tiny_folder,
        "study",
        tmp_path / "rolm.txt",
        "--title",
        "Rolm",
        "--out",
        tmp_path / "a",
        "--merged",
        tmp_path / "m",
    )
    ids = torch.arange(10)[None]
    with torch.no_grad(), attached(tiny, load_adapter(tiny, tmp_path / "a")):
        expected = tiny(ids)
    torch.testing.assert_close(load_model(tmp_path / "m", "cpu", "float32")(ids), expected, atol=1e-4, rtol=1e-3)
    assert (expected - tiny(ids)).abs().max() > 1e-3
    capsys.readouterr()
    run(monkeypatch, tiny_folder, "ask", "Who founded Rolm?", "--adapter", tmp_path / "a")
    assert capsys.readouterr().out


@pytest.mark.parametrize("text, message", [(None, "cannot read"), ("  \n", "is empty"), (b"\xff\xfe\xfa", "cannot read")])
def test_bad_text(text, message, tiny_folder, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "x.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tiny_folder, "study", tmp_path / "x.txt", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_divergence_is_one_clear_line(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("Rolm was founded by Ada Quell.")
    with pytest.raises(SystemExit, match="diverged"):
        run(monkeypatch, tiny_folder, "study", tmp_path / "x.txt", "--lr", "1e38", "--out", tmp_path / "a")
