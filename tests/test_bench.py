"""bench/: its work is what it says, both sides do the same work, FLOPs are counted right."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bench import cost, gpu, memory, scaling, speed
from bench.baselines import Baseline
from data.qa import load_passages
from data.text import sentences
from inner import SFTConfig, inner_update
from lm.checkpoint import load_model
from lm.files import read_json, write_json, write_jsonl
from lm.packing import Example, packed_mask
from lora import PROJECTIONS, Adapters, LoRAConfig
from sampler import generate
from selfedit import parse


def examples(*lengths):
    return [Example(tuple(7 * (n + t) % 211 for t in range(n)), (True,) * n) for n in lengths]


@pytest.fixture
def sides(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "smollm2")
    return load_model(folder, "cpu", "float32"), Baseline(folder, torch.float32)


def test_the_work_is_real():
    passages, edits = load_passages(ROOT / speed.WORK), read_json(ROOT / speed.WORK)["self_edits"]
    texts = {p.id: sentences(p.text) for p in passages}
    assert [e["passage"] for e in edits] == [p.id for p in passages for _ in range(4)]
    assert len(passages) == 16
    for e in edits:
        notes, questions = set(), {note.split("\n")[0] for note in e["notes"]}
        for text, about in zip(e["parts"], texts[e["passage"]], strict=True):
            for ended in (True, False):  # each part ended, or was cut off
                notes |= set(parse(text, "questions", ended, about)[0])
        assert set(e["notes"]) <= notes
        imitated = [q for text in e["mended"] if text for q in text.split("\n")]
        assert {f"Question: {q}" for q in imitated} <= questions
    assert len({tuple(e["parts"]) for e in edits}) > 60


@pytest.mark.parametrize("packed", [False, True])
def test_both_sides_train_alike(packed, sides):
    """A row of its own each; and packed rows, some of which share a prompt, which the other
    repeats."""
    model, other = sides
    lora, texts = LoRAConfig(4, 8.0, ("q_proj", "v_proj"), 1, 4), examples(20, 13, 28)
    sft = SFTConfig(lr=1e-2, epochs=3, row_len=0)
    if packed:
        prompt = examples(9)[0].ids
        texts += [Example(prompt + e.ids, (False,) * 9 + e.counts) for e in examples(7, 12, 5)]
        sft = SFTConfig(lr=1e-2, steps=4, row_len=40)
    [outcome] = inner_update(model, Adapters.init(model, lora, 1, 0), [texts], [sft], seed=0)
    batches = speed.Bench.batches(SimpleNamespace(args=SimpleNamespace(seed=0)), texts, sft)
    losses = other.train(Adapters.init(model, lora, 1, 0), batches, sft)
    assert losses == pytest.approx(outcome.losses, rel=1e-3)
    other.trainer_steps(Adapters.init(model, lora, 1, 0), texts, sft, 1, pad=64)


def test_a_share_of_the_work_is_scaled(monkeypatch):
    """Ours 2 s for a quarter of the work; the other 1 s to set up, which it does 8 times in all,
    and 2 s for a tenth."""
    b = object.__new__(speed.Bench)
    b.args, b.rows, b.other = SimpleNamespace(repeats=3), [], SimpleNamespace(setup=0.0)

    def other():
        b.other.setup += 1.0
        return 3.0

    monkeypatch.setattr(speed, "timed", lambda run: run())
    b.versus("quiz", lambda: 2.0, "other", other, part=4, other_part=10, setups=8)
    [row] = b.rows
    assert (row["ours_s"], row["other_s"], row["ratio"]) == (8.0, 28.0, 3.5)
    assert row["scaled"] and row["ours_scaled"]
    assert "| ~8.00 s | ~28.0 s | 3.50 |" in scaling.table(b.rows)[2]


def test_the_other_sides_padding_is_counted():
    """A step's sequences are one batch, each as long as the longest: 3 x 28 tokens, and 2 x 9."""
    b = object.__new__(speed.Bench)
    b.args = SimpleNamespace(seed=0)
    b.longest = [
        SimpleNamespace(examples=examples(20, 13, 28)),
        SimpleNamespace(examples=examples(5, 9)),
    ]
    for sft in (SFTConfig(epochs=2, row_len=0, batch=3), SFTConfig(epochs=2, row_len=64)):
        assert b.padded(sft) == 2 * (3 * 28 + 2 * 9)
        assert b.padded(sft, 1) == 3 * 28 + 2 * 9


def test_two_sides_that_do_not_train_alike_are_not_compared():
    """Of the four steps of ours the other took three."""
    b, theirs = object.__new__(speed.Bench), [2.02, 1.01, 0.5]
    b.rows, b.longest = [{}], []
    b.versus = lambda work, ours, name, other, note: (ours(), other())
    b.train = lambda *_: [SimpleNamespace(losses=[2.0, 1.0, 0.5, 0.2])]
    b.train_other = lambda *_: [theirs]
    how = (b, "inner", None, None, "", 3)
    speed.compare_training(*how)
    mean, most = pytest.approx(0.01), pytest.approx(0.02)
    assert b.rows == [{"loss_gap": {"mean": mean, "max": most, "steps": 3}}]
    theirs[1] = 1.3
    with pytest.raises(SystemExit, match="their losses differ by 0.107 on average"):
        speed.compare_training(*how)


def test_a_round_is_its_parts(monkeypatch):
    """Ours 2 s for two of 16 passages. The other: 10 s to sample 128 tokens for each of one prompt,
    and here are 64 tokens for each of two; 0.5 s to train 4 of 64 candidates and 0.25 s to ask
    them; 0.5 s to train the policy."""
    b = object.__new__(speed.Bench)
    b.args = SimpleNamespace(repeats=1, max_new=64, model="m", seed=0)
    b.rows, b.kept, b.fast = [{"work": "sampling", "other_s": 10.0}], [], (None, SFTConfig())
    b.model = SimpleNamespace(config=SimpleNamespace(n_layer=4), dtype=torch.float32)
    b.tok = SimpleNamespace(end_ids=[], newline_ids=[])
    b.prompts, b.candidates = [["a", "b"]] * 16, [SimpleNamespace(subject=None)] * 64
    b.batches, b.fresh = lambda *_: [[]] * 4, lambda *_: None
    b.other_time = lambda run, *_: 0.5
    theirs = SimpleNamespace(eval=lambda: theirs, unload=lambda: None)
    b.other = SimpleNamespace(attach=lambda adapters: theirs)

    def one_round(command, **_):
        write_jsonl(Path(command[-1]) / "metrics.jsonl", [{"seconds": 2.0}])

    monkeypatch.setattr(speed.subprocess, "run", one_round)
    monkeypatch.setattr(speed, "timed", lambda run: 0.25)
    monkeypatch.setattr(speed, "quiz_items", lambda *_: [])
    monkeypatch.setattr(speed, "policy_example", lambda *_: None)
    speed.outer(b)
    row = b.rows[-1]
    spent = {"sample": 10.0, "update": 16 * 0.5, "quiz": 16 * 0.25, "reinforce": 0.5}
    assert row["turns"] == [(16.0, spent)]
    assert (row["ours_s"], row["other_s"], row["ratio"]) == (16.0, 22.5, 22.5 / 16.0)


def test_parts_that_are_not_run_keep_their_rows(tmp_path):
    b, file = object.__new__(speed.Bench), tmp_path / "bench.json"
    head = {"machine": "m", "dtype": "torch.float32"}
    rows = [{"work": work} for work in ("load", "quiz", "quiz-merged", "population-16")]
    commands = ["python bench/speed.py"]
    rest = {"rows": rows, "mfu": {"inner": 0.5}, "minutes": 40, "commands": commands}
    write_json(file, head | rest)
    b.args = SimpleNamespace(only=["quiz"], out=file)
    assert b.keep_others(head) == ([rows[0], rows[3]], commands, 40) and b.mfu == {"inner": 0.5}
    with pytest.raises(SystemExit, match=r"error: .*bench.json was measured with machine m, not n"):
        b.keep_others(head | {"machine": "n"})
    b.args.only = list(speed.PARTS)
    assert b.keep_others(head) == ([], [], 0.0)


def test_both_sides_answer_alike(sides):
    model, other = sides
    adapters = Adapters.init(model, LoRAConfig(4, 8.0, tuple(PROJECTIONS), 0, 4), 2, 0)
    noise = torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(1))
    adapters.flat += 0.1 * noise
    prompts = [list(e.ids) for e in examples(9, 14, 11, 9)]
    theirs, answers = other.attach(adapters), []
    for n in range(2):
        theirs.set_adapter(str(n))
        answers += other.generate(prompts[2 * n : 2 * n + 2], 6, theirs)
    assert generate(model, prompts, 6, (), adapters=adapters, owner=[0, 0, 1, 1]) == answers


def test_flops_are_those_that_torch_counts(sides):
    """On the plain model: torch does not count the products of lm/kernels.py."""
    model, _ = sides
    lora = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 2, 4)
    texts, sft = [examples(40, 40, 40), examples(40, 40)], SFTConfig(steps=3, row_len=0)
    mask = packed_mask(torch.tensor([[0, 0, 1, 2, 2, 2]]))
    assert scaling.looks((2, 1, 3)) == mask.sum()
    with FlopCounterMode(display=False) as counter:
        inner_update(model, Adapters.init(model, lora, 2, 0), texts, [sft] * 2, seed=0)
    counted = scaling.inner_flops(model, texts, lora, sft)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_bench_has_every_row():
    """tests/test_readme.py compares them with the table of docs/SPEED.md."""
    works = {row["work"] for row in read_json(ROOT / "results" / "bench.json")["rows"]}
    rows = "load inner-strict inner-paper inner-fast quiz sampling round compile"
    assert set(rows.split()) <= works


def test_the_gpus_script_in_small(tiny_folder, tmp_path, monkeypatch):
    """On a CPU; every part, and one that fails leaves its error and the next goes on."""
    out = tmp_path / "gpu.json"
    args = ["--device", "cpu", "--populations", 2, "--repeats", 1, "--backends", "off", "eager"]
    args += ["--steps", 2, "--top-layers", 2, "--rank", 2, "--row-len", 64, "--out", out]
    monkeypatch.setattr(gpu, "TOKENS", 3)
    run_script(monkeypatch, gpu, tiny_folder, *args)
    rows = read_json(out)["rows"]
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert not [row for row in rows if "error" in row], rows
    [same] = [row for row in rows if row["part"] == "same"]
    assert same["largest_loss_gap"] == 0 and same["same_tokens"] == 1 and same["n_steps"] == 4
    trained = {(r["P"], r["compile"]): r for r in rows if r["part"] == "train"}
    assert set(trained) == {(2, "off"), (2, "eager")}
    assert all(r["tokens_per_s"] > 0 and r["of_peak"] > 0 for r in trained.values())
    said = [(r["work"], r["compile"]) for r in rows if r["part"] == "generate"]
    assert said == [(work, how) for how in ("off", "eager") for work in ("sample", "quiz")]

    def fails(b):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu.PARTS, "same", fails)
    run_script(monkeypatch, gpu, tiny_folder, *args, "--parts", "same", "generate")
    rows = read_json(out)["rows"]
    assert rows[0] == {"part": "same", "error": "RuntimeError: out of memory"} and len(rows) == 5


# -----------------------------------------------------------------------------
# bench/cost.py


def cost_row(flops, layers, tokens, width):
    row = {"flops": flops, "adapted": layers, "tokens": tokens, "n_embd": width, "number": 2}
    return row | {"n_inner": 3 * width}


def test_the_model_of_the_cost_finds_what_it_was_made_of():
    rows = []
    for layers, width, tokens in ((4, 256, 256), (8, 512, 128), (16, 512, 1024), (24, 768, 512)):
        row = cost_row(1e3 * layers * width**2 * tokens, layers, tokens, width)
        row["seconds"] = 2e-12 * row["flops"] + 0.003 * layers + 4e-9 * tokens * layers * 4 * width
        row["bytes"] = 30 * tokens * layers * 4 * width * 2
        rows.append(row)
    found = cost.fit(rows)
    assert found == pytest.approx({"a": 2e-12, "b": 0.003, "c": 4e-9, "d": 30}, rel=1e-6)
    told = cost.with_model(rows[2], found)
    assert told["says_seconds"] == pytest.approx(rows[2]["seconds"])
    assert told["says_bytes"] == pytest.approx(rows[2]["bytes"])


def test_no_factor_of_the_cost_is_below_zero():
    columns = np.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    # 2 x - 0.5 fits best: without the constant, what is left is fitted again.
    found = cost.fitted(columns, 2 * columns[:, 0] - 0.5)
    assert found[1] == 0 and 1.5 < found[0] < 2


@pytest.mark.parametrize("shape", [(2, 64, 2, 16), ()])
def test_a_step_is_measured(shape, tiny_folder):
    args = SimpleNamespace(model=tiny_folder, dtype="float32", seed=0, repeats=1, steps=2)
    row = cost.measure(shape, args)
    P, tokens = (2, 16) if shape else (8, 256)
    assert (row["P"], row["tokens"], row["number"]) == (P, P * tokens, 4)
    assert row["seconds"] > 0
    if shape:  # one step of all layers, by hand
        model = cost.random_model(2, 64, torch.float32)
        counter = FlopCounterMode(display=False)
        lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), 0, 2)
        examples = [cost.texts(16, p) for p in range(2)]
        with counter:
            sft = SFTConfig(lr=1e-4, steps=1, row_len=16)
            inner_update(model, Adapters.init(model, lora, 2, 0), examples, [sft] * 2, 0)
        assert row["flops"] == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_a_prediction_by_hand():
    """Of a model of one layer on one GPU of round numbers, with a candidate for each number."""
    model = {"toy": (1, 10, 20, 10, 5, 100, False)}
    weights, adapter = 10 * 10 * 2 + 10 * 5 * 2 + 10 * 20 * 3, 2 * (20 * 2 + 15 * 2 + 30 * 3)
    work = {"candidates": 4, "samples": 3, "epochs": 2, "tokens": 7, "counted": 5, "asked": 3}
    work |= {"written": 11, "questions": 2, "prompt": 6, "answer": 5, "rank": 2, "population": 2}
    work |= {"row_len": 8, "batch": 128}
    gpu = {"flops": 1e4, "bytes": 1e6, "bytes_per_s": 1e3, "share_of_flops": 0.5}
    gpu |= {"share_of_bandwidth": 0.2, "link": 500, "to_a_copy": [1, 2, 4]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODELS", model), ("WORK", work)):
            patch.setattr(cost, name, value)
        patch.setattr(cost, "GPU", gpu)
        row, two = (cost.predict("toy", n, d=3.0) for n in (1, 2))
        shared = cost.planned("toy", 4, 3.0, 2, 2)
        patch.setattr(cost, "GPU", gpu | {"bytes": 15000})
        assert cost.predict("toy", 1, d=3.0)["P"] == 1  # two candidates side by side do not fit
        patch.setattr(cost, "GPU", gpu | {"bytes": 11000})
        assert not cost.predict("toy", 1, d=3.0)["fits"]
        patch.setattr(cost, "WORK", work | {"written": 999, "batch": 2})
        long = cost.planned("toy", 1, 3.0, 1, 2)
    study = 4 * 2 * (7 * (4 * weights + 6 * adapter) + 5 * 4 * 1000)
    assert row["study_min"] == pytest.approx(study / 5e3 / 60)
    forward, read = 2 * (weights + 1000), 2 * (weights + 1000) / 200
    quiz = 4 * 2 * (6 + 5) * forward / 5e3 + 2 * 5 * (read + 2 * 2 * adapter / 200)
    assert row["quiz_min"] == pytest.approx(quiz / 60)
    sample = 3 * (3 + 11) * forward / 5e3 + 11 * read
    assert row["sample_min"] == pytest.approx(sample / 60)
    held = 2 * (weights + 1000) + 2 * 20 * adapter + 3 * 2 * (2 * 8 * 30)
    assert row["gb"] * 1e9 == pytest.approx(held) and row["shards"] == 1
    assert two["study_min"] == pytest.approx(row["study_min"] / 2)
    assert two["minutes"] < row["minutes"] < 2 * two["minutes"]
    # Four GPUs hold two copies; each GPU of one trains a candidate of two, gathers the other half
    # of the layers forward and backward, and adds up both gradients. All answer and write all.
    gather, reduce = 2 * weights / 2 / 100, 2 * 4 * 2 * adapter / 2 / 100
    study = 2 * (study / 8 / 5e3 + 2 * gather + reduce)
    assert shared["study_min"] == pytest.approx(study / 60)
    quiz = 2 * 2 * (6 + 5) * forward / 5e3 + 5 * (read + gather + 2 * 2 * adapter / 200)
    quiz += 3 * gather
    assert shared["quiz_min"] == pytest.approx(quiz / 60)
    sample = 2 * (3 + 11) * forward / 5e3 + 11 * (read + gather)
    assert shared["sample_min"] == pytest.approx(sample / 60)
    held = 2 * (weights / 2 + 1000) + 4 * weights + (2 * 20 + 4) * adapter + 3 * 2 * (8 * 30)
    assert shared["gb"] * 1e9 == pytest.approx(held)
    # A step over a long sample takes more than a study; three samples are two batches.
    held = 2 * (weights + 1000) + 20 * adapter + 3 * 2 * (1002 * 30)
    assert long["gb"] * 1e9 == pytest.approx(held)
    sample = 3 * (3 + 999) * forward / 5e3 + 2 * 999 * read
    assert long["sample_min"] == pytest.approx(sample / 60)


def test_what_does_not_fit_is_said():
    one, many = (cost.predict("Llama-3.1-70B", n, d=9.0) for n in (1, 64))
    assert not one["fits"] and many["fits"] and one["gb"] * 1e9 > 2 * 70e9
    assert many["gb"] * 1e9 < cost.GPU["bytes"] < many["gb"] * 1e9 * many["shards"]


def test_an_error_in_the_process_that_measures_is_one_line():
    args = SimpleNamespace(model="nowhere", dtype="float32", seed=0, repeats=1, steps=2)
    with pytest.raises(SystemExit, match="nowhere is not a model folder"):
        cost.in_own_process((), args)


def test_the_tables_of_the_cost_are_the_committed_results():
    result, text = read_json(ROOT / "results" / "cost.json"), (ROOT / "docs/SCALE.md").read_text()
    for line in cost.tables(result):
        assert line in text, line
    a, b, d = (result["fit"][name] for name in "abd")
    told = f"The products run at {1e-9 / a:.0f} GFLOP/s, a layer costs {1e3 * b:.1f} ms"
    assert told in text and f"and {d:.1f} numbers" in text.replace("\n", " ")


# -----------------------------------------------------------------------------
# bench/memory.py


def test_a_memory_is_filled_and_asked(tiny_folder, passages_file, tmp_path, monkeypatch, capfd):
    out = tmp_path / "memory.json"
    small = ["--study", "max-new=8", "rank=2", "alpha=4", "top-layers=2", "samples=1"]
    flags = ["--documents", 3, "--repeats", 2, "--data", passages_file, "--out", out, *small]
    run_script(monkeypatch, memory, tiny_folder, *flags)
    found = read_json(out)
    assert found["documents"] == 3 and found["bytes"] > 3 * 2 * 1000
    first = found["first_word"]
    for way in ("chat", "command"):
        seconds, median = first[way]["seconds"], first[way]["median"]
        assert len(seconds) == 2 and median == pytest.approx(np.mean(seconds), abs=2e-3)
    assert 0 < first["chat"]["median"] < first["command"]["median"]  # which loads torch
    assert "--documents 3" in found["command"]
    assert "3 documents" in capfd.readouterr().out


def test_a_memory_that_cannot_be_filled(tiny_folder, passages_file, tmp_path, monkeypatch, capfd):
    out = tmp_path / "memory.json"
    flags = ["--documents", 2, "--data", passages_file, "--out", out, "--study", "rank=none"]
    with pytest.raises(SystemExit, match="learn.py study failed"):
        run_script(monkeypatch, memory, tiny_folder, *flags)
    with pytest.raises(SystemExit, match="--documents 9999: .* has "):
        run_script(monkeypatch, memory, tiny_folder, "--documents", 9999, "--out", out)
    assert not out.exists()
