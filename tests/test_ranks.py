"""lm/ranks.py: as many processes as torchrun starts end with what one ends with."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from lm import files, ranks
from lm.files import read_json, read_jsonl, write_jsonl
from lm.flags import load
from lm.log import Log, trained_on
from lora import Adapters, LoRAConfig

# What a random model writes is taken as it is, or nothing would be imitated. The process that is
# told to dies, once, as it begins its second population.
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from functools import partial
from pathlib import Path
import reward, selfedit, train_outer
from lm.files import run_main

def taken_as_it_is(text, style, ended, about):
    return [f"Question: {{' '.join(text.split()) or 'x'}}\\nAnswer: {{about}}"], ""

def dies(*args, calls=[]):
    calls.append(1)
    with open("updates", "a") as updates:
        updates.write("one\\n")
    if os.environ.get("RANK") == "1" and len(calls) == 2 and Path("dies").is_file():
        Path("dies").unlink()
        os.kill(os.getpid(), 9)
    outcomes, numbers = update(*args), 0
    for p in args[0].layers.parameters():
        own = p.to_local() if hasattr(p, "to_local") else p
        numbers += own.untyped_storage().nbytes() // own.element_size()
    Path("held-" + os.environ.get("RANK", "0")).write_text(str(numbers))
    return outcomes

selfedit.parse, reward.ask = taken_as_it_is, partial(reward.ask, max_new=4)
update, train_outer.inner_update = train_outer.inner_update, dies
run_main(train_outer.main, alone=False)
"""


def command(folder: Path, tiny_folder, passages_file, processes: int, restarts=0, shard=1) -> list:
    """To run it in `folder`, which is made."""
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        start += ["--max-restarts", restarts]
    flags = ["--model", tiny_folder, "--device", "cpu", "--dtype", "float32", "--out", "out"]
    flags += ["--data", passages_file, "--max-new", 6, "--steps", 2, "--top-layers", 2]
    flags += ["--rank", 2, "--outer-rank", 2, "--outer-batch", 2, "--outer-row-len", 0]
    flags += ["--samples", 3, "--rounds", 1, "--select", "best", "--population", 2]
    flags += ["--student", tiny_folder, "--agents", 2]  # the student is loaded once more
    flags += ["--shard", shard]
    flags += ["--temperature", 0.1]  # all words are nearly alike to a random model: no rounding
    return list(map(str, [*start, "driver.py", "qa", *flags]))


def run(folder: Path, *about):
    options = {"capture_output": True, "text": True, "cwd": folder, "timeout": 200}
    return subprocess.run(command(folder, *about), **options)


def write_four(path: Path) -> None:
    entries = []
    for n in range(4):
        entry = {"id": f"p{n}", "title": f"Rolm {n}", "passage": f"Rolm {n} was founded by Ada."}
        entries.append(entry | {"questions": [{"question": "Who?", "answers": ["Ada", "the"]}]})
    write_jsonl(path, entries)


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    write_four(folder / "passages.json")
    done = run(folder, tiny_folder, folder / "passages.json", 1)
    assert done.returncode == 0, done.stderr
    return folder


def test_many_end_with_what_one_ends_with(alone, tiny_folder, tmp_path):
    """One of two is killed in mid-round: torchrun starts all again, and what was done is not done
    again."""
    (tmp_path / "dies").write_text("")
    done = run(tmp_path, tiny_folder, alone / "passages.json", 2, 1)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "dies").exists() and done.stdout.count("round 1  reward") == 1
    assert not list((tmp_path / "out" / "round-1").glob("*-of-*"))
    assert unlike(alone, tmp_path) == []
    updates = [(folder / "updates").read_text().count("one") for folder in (alone, tmp_path)]
    in_flight = updates[1] - updates[0]
    assert 1 <= in_flight <= 2
    policy = load_file(alone / "out/round-1/policy/adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in policy.items() if "lora_B" in name)


@pytest.mark.parametrize("processes", [2, 4])
def test_two_that_hold_a_model_between_them_end_with_what_one_ends_with(
    alone, tiny_folder, tmp_path, processes
):
    """Two, of which one is killed and goes on, and two pairs of them: --shard 2."""
    restarts = int(processes == 2)
    if restarts:
        (tmp_path / "dies").write_text("")
    done = run(tmp_path, tiny_folder, alone / "passages.json", processes, restarts, 2)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "dies").exists() and done.stdout.count("round 1  reward") == 1
    assert not list((tmp_path / "out" / "round-1").glob("*-of-*"))
    assert unlike(alone, tmp_path) == []
    held = [int(file.read_text()) for file in sorted(tmp_path.glob("held-*"))]
    whole = int((alone / "held-0").read_text())
    assert held == [whole / 2] * processes  # of the layers, also after a training step


# Two that hold a model between them, and each a whole one.
MERGES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lm import ranks
from lm.checkpoint import load_model
from lora import PROJECTIONS, Adapters, LoRAConfig, merged
from sampler import generate

ranks.start("cpu", 2)
shared = load_model(sys.argv[1], "cpu", "float32")
mesh, ranks.MESH = ranks.MESH, None
whole = load_model(sys.argv[1], "cpu", "float32")
ranks.MESH = mesh
policy = Adapters.init(whole, LoRAConfig(2, 4.0, tuple(PROJECTIONS), 0, 4), 1, seed=0)
policy.flat += 0.05

def alike():
    for ours, theirs in zip(shared.layers.parameters(), whole.layers.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs)
    written = [generate(m, [[1, 2, 3], [1, 5]], 6, [0], temperature=1.0) for m in (shared, whole)]
    assert written[0] == written[1]
    return written[0]

before = alike()
with merged(shared, policy), merged(whole, policy):
    assert alike() != before
assert alike() == before
"""


def test_a_policy_is_merged_into_shares(tiny_folder, tmp_path):
    (tmp_path / "merges.py").write_text(MERGES)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*start, tmp_path / "merges.py", tiny_folder], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_own_rows_are_those_of_torch_chunk():
    for n, holders in ((5, 4), (6, 4), (2, 4), (8, 2), (7, 2)):
        chunks = [list(chunk) for chunk in torch.arange(n).chunk(holders)]
        chunks += [[]] * (holders - len(chunks))
        rows = [list(torch.arange(n)[ranks.own_rows(n, holders, k)]) for k in range(holders)]
        assert rows == chunks


def test_all_of_a_copy_go_on_with_the_words_of_its_first(monkeypatch):
    seen = []

    def broadcast(tokens, first, group):
        seen.append((first, group))
        tokens.fill_(7)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    assert ranks.as_first(torch.tensor([1, 2])).tolist() == [1, 2]
    mesh = SimpleNamespace(size=lambda: 2, get_group=lambda: "the two")
    monkeypatch.setattr(ranks, "MESH", mesh)
    monkeypatch.setattr(ranks, "RANK", 5)
    assert ranks.as_first(torch.tensor([1, 2])).tolist() == [7, 7] and seen == [(4, "the two")]


def unlike(one: Path, other: Path) -> list[str]:
    """What two runs in these folders wrote differently, but for rounding."""
    rounds, found = [folder / "out" / "round-1" for folder in (one, other)], []
    own, theirs = (read_json(folder / "out" / "settings.json") for folder in (one, other))
    found += [name for name in ("weights", "student_weights") if own.get(name) != theirs.get(name)]
    for name in ("sampled.jsonl", "sampled-2.jsonl", "scored.jsonl", "candidates.jsonl"):
        found += [] if same(*(read_jsonl(folder / name) for folder in rounds)) else [name]
    for agent in ("policy", "policy-2"):
        own, theirs = (load_file(f / agent / "adapter_model.safetensors") for f in rounds)
        for name in own.keys() | theirs.keys():
            found += [] if torch.allclose(own[name], theirs[name], atol=1e-5) else [name]
    return found


def same(a, b) -> bool:
    """But for rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(a, float) else a == b


# -----------------------------------------------------------------------------
# as one of two, without another process


@pytest.fixture
def second_of_two(monkeypatch):
    """The second process; the first one's lists are what this one's are."""
    for name in ("lm.ranks", "lm.log", "lm.files", "lm.runs", "selfedit"):
        for constant, value in (("RANK", 1), ("WORLD", 2)):
            monkeypatch.setattr(f"{name}.{constant}", value, raising=False)


def candidate(name: int):
    return SimpleNamespace(name=name, examples=[name], config=None)


def test_results_of_all_are_known_to_all(second_of_two, tmp_path, monkeypatch):
    theirs = {0: {"n": 0, "score": 1.0}, 2: {"n": 2, "score": 1.0}}
    monkeypatch.setattr("lm.log.gathered", lambda own: [theirs, *own])
    monkeypatch.setattr(ranks, "gathered", lambda own: own)
    log, done = Log(tmp_path / "scored.jsonl", lambda r: r["score"]), []
    for group in log.remaining([[candidate(n)] for n in range(4)], "study"):
        done.append(group[0].name)
        log.add(group, [{"score": 0.0}])
    assert done == [1, 3] and [log[candidate(n)]["score"] for n in range(4)] == [1, 0, 1, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["scored.2-of-2.jsonl"]  # rank 0 writes the rest
    assert [r["n"] for r in read_jsonl(tmp_path / "scored.2-of-2.jsonl")] == [1, 3]
    for rank in (0, 1):  # whoever goes on, and however many there are
        monkeypatch.setattr(ranks, "RANK", rank)
        again = Log(tmp_path / "scored.jsonl", lambda r: r["score"])
        assert [r["n"] for r in again.done.values()] == [1, 3]


def test_the_parts_of_a_file_go_when_it_is_whole(tmp_path, monkeypatch):
    for name in ("a.1-of-2.jsonl", "a.2-of-3.jsonl", "b.1-of-2.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / ".a.2-of-2.jsonl.partial").write_text("{")  # by one that was killed
    for world, rank, wrote, left in ((2, 1, 1, 4), (1, 0, 1, 1), (1, 0, 0, 1), (2, 0, 1, 1)):
        monkeypatch.setattr(ranks, "RANK", rank)
        monkeypatch.setattr(ranks, "WORLD", world)
        monkeypatch.setattr(ranks, "gathered", lambda items: items)
        written = []
        ranks.whole(tmp_path / "a.jsonl", written.append)
        assert len(written) == wrote and len(list(tmp_path.iterdir())) == left


def test_one_process_goes_on_with_the_parts_of_several(tmp_path):
    """Also if nothing is left to do; a part that is older than the whole file counts less."""
    groups = [[candidate(n)] for n in range(2)]
    for n in (0, 1):
        record = {"n": n, "of": trained_on(groups[n][0]), "score": float(n)}
        write_jsonl(tmp_path / f"scored.{n + 1}-of-2.jsonl", [record])
    write_jsonl(tmp_path / "scored.jsonl", [record | {"score": 5.0}])
    log = Log(tmp_path / "scored.jsonl", lambda r: r["score"])
    assert list(log.remaining(groups, "study")) == []
    assert [p.name for p in tmp_path.iterdir()] == ["scored.jsonl"]
    assert [r["score"] for r in read_jsonl(tmp_path / "scored.jsonl")] == [0.0, 5.0]


def test_what_runs_alone_is_refused_to_torchrun(second_of_two, monkeypatch):
    with pytest.raises(SystemExit) as e:
        files.run_main(lambda: None)
    assert e.value.code == 1  # rank 0 speaks
    monkeypatch.setattr(files, "RANK", 0)
    with pytest.raises(SystemExit, match="^error: .* runs as one process: no torchrun$"):
        files.run_main(lambda: None)
    files.run_main(lambda: None, alone=False)


def test_unlike_settings_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "lists_of_all", lambda own: [own, {"lr": 0.1, "seed": 0}])
    ranks.agree({"lr": 0.1, "seed": 0})
    told = "^error: rank 0 was started with seed = 1, rank 1 with 0$"
    with pytest.raises(SystemExit, match=told):
        ranks.agree({"lr": 0.1, "seed": 1})


def test_one_that_has_ended_is_told_in_one_line(second_of_two, monkeypatch):
    def ended(*_):
        raise RuntimeError("Connection closed by peer\nmore of it")

    monkeypatch.setattr(torch.distributed, "all_gather_object", ended)
    told = "^error: another process of this run has ended\\? Connection closed by peer$"
    with pytest.raises(SystemExit, match=told):
        ranks.gathered([1])


@pytest.mark.parametrize("sharded", [False, True])
def test_rows_are_shared_by_what_they_count(model, second_of_two, monkeypatch, sharded):
    """Of the first candidate this one's row counts 3 tokens, the other one's 1; the second has a
    row for the other one only. One that has a share of the layers runs them even without a row."""
    adapters = Adapters.init(model, LoRAConfig(1, 1.0, ("q_proj",), 3, 4), 2, seed=0)
    rows, seen, found = [SimpleNamespace(at=[0] * n) for n in (1, 3, 2)], [], []

    def step(model, lora, active, taken):
        seen.append((active, taken))
        return torch.tensor([2.0]), torch.full((1, adapters.size), 4.0)

    mesh = SimpleNamespace(size=lambda: 2, get_group=lambda: "the two") if sharded else None
    monkeypatch.setattr(ranks, "MESH", mesh)
    reduce = lambda own, group: found.append((own.clone(), group))  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    lora, group = SimpleNamespace(adapters=adapters), "the two" if sharded else None
    shared_step = ranks.shared(step, by_all=not sharded)
    losses, grads = shared_step(model, lora, [5, 7], [rows[:2], rows[2:]])
    assert seen == [([5], [[rows[1]]])] and [own for _, own in found] == [group]
    assert losses.tolist() == [3 / 4 * 2, 0.0] and torch.equal(found[0][0][:, 1:], grads)
    assert grads.shape == (2, adapters.size) and grads[0].eq(3.0).all() and not grads[1].any()
    losses, grads = shared_step(model, lora, [7], [rows[2:]])  # fewer rows than processes
    assert seen[1:] == ([([7], [rows[2:]])] if sharded else [])
    assert losses.tolist() == [0.0] and not grads.any() and len(found) == 2


def test_processes_that_hold_a_model_are_dealt_work_as_one(monkeypatch):
    monkeypatch.setattr(ranks, "MESH", SimpleNamespace(size=lambda: 2))
    monkeypatch.setattr(ranks, "WORLD", 6)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda lists, own: fill(lists))

    def fill(lists):
        lists[:] = [[n // 2] for n in range(6)]

    shares = []
    for rank in range(6):
        monkeypatch.setattr(ranks, "RANK", rank)
        name = ranks.own_file("a.jsonl").name
        shares.append((ranks.dealt([*range(5)]), name, ranks.may_write(name)))
    names = [f"a.{n}-of-3.jsonl" for n in (1, 1, 2, 2, 3, 3)]
    expected = [[0, 3], [0, 3], [1, 4], [1, 4], [2], [2]]
    assert shares == [*zip(expected, names, [True, False] * 3)]
    assert ranks.gathered([9]) == [0, 1, 2] and not ranks.may_write("a.jsonl")


def test_processes_that_do_not_divide_are_refused(monkeypatch):
    for world in (1, 3):
        monkeypatch.setattr(ranks, "WORLD", world)
        told = f"^error: --shard 2: so many processes hold a copy, and there are {world} in all"
        with pytest.raises(SystemExit, match=told):
            ranks.start("cpu", 2)
    monkeypatch.setattr(ranks, "WORLD", 2)
    for device in ("mps", "cuda:1"):
        with pytest.raises(SystemExit, match=f"^error: --shard is for .* and not {device}$"):
            ranks.start(device, 2)


def test_a_model_that_is_shared_out_is_not_compiled(tiny_folder):
    args = SimpleNamespace(
        model=tiny_folder, device="cpu", dtype="auto", compile="inductor", shard=2
    )
    with pytest.raises(SystemExit, match="^error: --shard with --compile: not both$"):
        load(args)
