"""Is nothing lost, and nothing let in? Faults and hostile input, counted.

    python tests/torture.py                                # -> results/torture.json: 15 minutes
    python tests/torture.py --only kill files --share 0.1

On tiny random models, by part:
    kill        a run is killed (-9) at a random moment and the same command goes on: it must write
                what a run that is left alone writes, byte by byte, but for the seconds. By turns
                outer rounds on passages and on puzzles, a ladder, and a memory of documents.
    stop        SIGTERM and Ctrl-C end it with one line that says how to go on, and it goes on
    ranks       torchrun runs an outer round in two processes, one of which is killed (-9) at a
                random moment: all are started again, and end with what an undisturbed run has,
                but for rounding
    repeat      the same seed writes the same bytes; populations of 1, 3 and 8 choose the same
    order       in another order, and beside others, a candidate learns the same (within 1e-4 of its
                loss) and a sample has the same text
    selfedits   text of all sorts as a self-edit, by hypothesis: each is read within 0.1 s, without
                opening a file, and is sound or has a flaw that docs/OUTPUT.md names
    files       checkpoints, tokenizers, adapters, memories and data with bytes changed, cut off,
                added, or values swapped: they are read, or end in one line, within a minute and a
                gigabyte over the file's size, and nothing is written
    numbers     a candidate whose learning rate is 10^3 or 10^30 leaves its neighbours bit for bit
                as they are, and is said to have diverged if its numbers are not finite; in float32
                and in bfloat16, and beside one with nothing to learn from
    haul        inner updates one after another: memory stays (2 %), and so does the time (10 %; the
                fastest of ten, as a multiple of other work, for hosts slow down); the base weights
                are the same

"tried" and "held" count tries, "failures" tell what went wrong, at most 20 of a part.
"""

import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import string
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import hypothesis
import numpy as np
import test_ranks
import torch
from conftest import (
    load_swapped,
    one_note,
    write_checkpoint,
    write_passages,
    write_tasks,
    write_tiny,
)
from hypothesis import strategies

import arc
import reward
import selfedit
from bench.cost import memory
from data.arc import load_tasks
from data.qa import load_passages
from inner import SFTConfig, inner_update
from lm.adapters import load_adapter, save_adapter
from lm.checkpoint import load_model
from lm.files import GOES_ON, check_output, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, command_line
from lm.log import Progress
from lm.memory import Memory
from lm.packing import Example
from lm.tokenizer import Tokenizer
from lora import Adapters, LoRAConfig
from sampler import generate
from selfedit import STYLES, WORKED

FLAWS = {"", "empty", "malformed", "endless", "repeats", "copied", "out of bounds", "over budget"}
FLAWS |= {"diverged", "too many steps", "too long"}
WORDS = 300
LORA = LoRAConfig(2, 4.0, ("q_proj", "down_proj"), 2, 4)
ROOM = 1 << 30  # bytes of memory that reading a file may take beyond its size
fork = multiprocessing.get_context("fork")  # a child begins with torch in memory

# -----------------------------------------------------------------------------
# runs in child processes

SMALL = "--max-new 6 --top-layers 2 --rank 2 --device cpu --dtype float32"
OUTER = f"--out run --samples 3 --rounds 2 --outer-rank 2 --select best --population 4 {SMALL}"
LADDER = f"--out run/l.json --work run --samples 2 --steps 2 --population 4 {SMALL}"
JOBS = {
    "outer round, passages": f"train_outer qa --data passages.json --steps 2 {OUTER}",
    "outer round, puzzles": f"train_outer arc --data arc.json {OUTER}",
    "ladder": f"eval_qa --data passages.json {LADDER}",
    "memory": f"learn study a.txt b.txt --memory run {SMALL}",
}


def play(job: str, folder: Path, home: Path, more: str) -> None:
    """In a child: one of JOBS, in `folder`, with the small files in `home`. What a random model
    writes is taken for a self-edit, or nothing would ever be imitated; answers are short."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("said", "w")
    name, *flags = [str(home / f) if (home / f).is_file() else f for f in f"{job} {more}".split()]
    selfedit.parse = one_note
    arc.parse_settings = lambda text, ended: (WORKED_ON_ARC, "")
    reward.ask = partial(reward.ask, max_new=4)
    script = importlib.import_module(name)
    script.ask = reward.ask
    sys.argv = [f"{name}.py", *flags, "--model", str(home / "tiny")]
    run_main(script.main, GOES_ON)


WORKED_ON_ARC = {"groups": ["use_basic_augmentations"], "every_token": True, "lr": 1e-3}
WORKED_ON_ARC |= {"epochs": 1}


def start(job: str, folder: Path, home: Path, more: str = ""):
    folder.mkdir(exist_ok=True)
    child = fork.Process(target=play, args=(JOBS[job], folder, home, more))
    child.start()
    return child


def finish(job: str, folder: Path, home: Path, more: str = "") -> str:
    """Run it to its end: "", or how it ended."""
    child = start(job, folder, home, more)
    child.join(300)
    child.kill()
    said = (folder / "said").read_text()[-300:]
    return "" if child.exitcode == 0 else f"{job}: ends with {child.exitcode}: {said}"


def written(folder: Path) -> dict:
    """What a run wrote, {path: bytes}; of JSON without the seconds it took."""
    found = {}
    for path in sorted((folder / "run").rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = data = path.read_bytes()
            if path.suffix in (".json", ".jsonl"):
                lines = data.splitlines() if path.suffix == ".jsonl" else [data]
                found[str(path.relative_to(folder))] = [without_time(json.loads(x)) for x in lines]
    return found


def without_time(value):
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k != "seconds"}
    return [without_time(v) for v in value] if isinstance(value, list) else value


def make_home(home: Path) -> None:
    """A tiny model, one of few words, and small files for JOBS."""
    write_tiny(home / "tiny")
    write_checkpoint(home / "few", "smollm2", vocab_size=WORDS)
    write_passages(home / "passages.json")
    write_tasks(home / "arc.json")
    for name in "ab":
        (home / f"{name}.txt").write_text(f"{name.upper()} fell. It was tall.")


def kill(home: Path, work: Path, count: int, rng):
    for n in range(count):
        job = list(JOBS)[n % len(JOBS)]
        alone, folder = work / f"alone {job}", work / f"kill-{n}"
        if not alone.is_dir():
            began = time.perf_counter()
            assert not (wrong := finish(job, alone, home)), wrong
            (alone / "took").write_text(str(time.perf_counter() - began))
        child = start(job, folder, home)
        after = rng.uniform(0, float((alone / "took").read_text()))
        child.join(after)
        child.kill()
        child.join()
        wrong = finish(job, folder, home) or (written(folder) != written(alone) and "other files")
        yield wrong and f"{job}, killed after {after:.2f} s: {wrong}"
        shutil.rmtree(folder)


def stop(home: Path, work: Path, count: int, rng):
    for n in range(count):
        job, number = list(JOBS)[n % len(JOBS)], (signal.SIGTERM, signal.SIGINT)[n // len(JOBS) % 2]
        folder = work / f"stop-{n}"
        child = start(job, folder, home)
        while child.is_alive() and not any((folder / "run").rglob("*")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)
        child.join(60)
        child.kill()
        said = (folder / "said").read_text().splitlines()
        in_time = child.exitcode == 0  # it had finished
        told = child.exitcode == 128 + number and said[-1:] == [f"interrupted{GOES_ON}"]
        wrong = finish(job, folder, home)
        wrong = wrong if told or in_time else f"{child.exitcode}, {said[-1:]}"
        yield wrong and f"{job}, {number.name}: {wrong}"
        shutil.rmtree(folder)


def pair(folder: Path, home: Path, after: float, rank: int) -> tuple[str, float]:
    """An outer round in two processes, one of which is killed so many seconds after they began, and
    torchrun starts both again. How it ended, "" if well; and for how long they were at work."""
    command = test_ranks.command(folder, home / "tiny", home / "four.json", 2, 1)
    with open(folder / "said", "w") as said:
        run = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
    try:
        until(lambda: len(children(run.pid)) == 2)
        workers = children(run.pid)
        began = time.perf_counter()
        until(lambda: time.perf_counter() > began + after or not children(run.pid))
        took, killed = time.perf_counter() - began, took_one(children(run.pid), workers[rank])
        if killed != (after < math.inf):
            return "it had ended before", took
        if code := run.wait(300):
            return f"ends with {code}: {(folder / 'said').read_text()[-300:]}", took
        return "", took
    except (TimeoutError, subprocess.TimeoutExpired):
        return "does not come back", math.inf
    finally:
        if run.poll() is None:  # torchrun ends its processes when it is asked to end
            run.terminate()
            run.wait(60)


def until(true, seconds: float = 300) -> None:
    """Wait for true(). Raises TimeoutError if it does not become so."""
    end = time.perf_counter() + seconds
    while not true():
        if time.perf_counter() > end:
            raise TimeoutError
        time.sleep(0.01)


def took_one(there: list[int], pid: int) -> bool:
    """Kill it, if it is there."""
    if pid in there:
        os.kill(pid, signal.SIGKILL)
    return pid in there


def children(pid: int) -> list[int]:
    """Of a process, by Linux' account of it."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ranks(home: Path, work: Path, count: int, rng):
    test_ranks.write_four(home / "four.json")
    wrong, took = pair(work / "alone", home, math.inf, 0)
    assert not wrong, wrong
    for n in range(count):
        # Not in the last tenth: then they may have ended.
        folder, after, rank = work / f"ranks-{n}", rng.uniform(0, 0.9 * took), int(rng.integers(2))
        wrong, _ = pair(folder, home, after, rank)
        wrong = wrong or ", ".join(test_ranks.unlike(work / "alone", folder))
        yield wrong and f"process {rank}, killed after {after:.2f} s: {wrong}"
        shutil.rmtree(folder)


def repeat(home: Path, work: Path, count: int, rng):
    job, found = "outer round, passages", []
    for n in range(count):
        wrong = finish(job, work / f"repeat-{n}", home)
        found.append(written(work / f"repeat-{n}"))
        yield wrong or ("" if found[n] == found[0] else "the same seed wrote something else")
    for size in (1, 3, 8):
        wrong = finish(job, work / f"sizes-{size}", home, f"--population {size}")
        chosen = written(work / f"sizes-{size}")
        for k in (1, 2):
            own, first = (
                of.get(f"run/round-{k}/candidates.jsonl", []) for of in (chosen, found[0])
            )
            same = [e["why"] for e in own] == [e["why"] for e in first]
            yield wrong or ("" if same else f"a population of {size} chooses others in round {k}")


# -----------------------------------------------------------------------------
# in this process


def examples(rng, n: int) -> list[list[Example]]:
    """Of n candidates, of unequal length."""
    found = []
    for _ in range(n):
        own = []
        for length in rng.integers(4, 60, rng.integers(1, 5)):
            ids, prompt = rng.integers(3, WORDS, length).tolist(), rng.integers(1, length)
            own.append(Example.reply(ids[:prompt], ids[prompt:]))
        found.append(own)
    return found


def order(home: Path, work: Path, count: int, rng):
    model, texts = load_swapped(home / "few"), examples(rng, 6)
    configs = [SFTConfig(lr=0.001 * (k + 1), steps=k + 2, row_len=64) for k in range(6)]
    prompts = [list(own[0].ids) for own in texts]

    def losses_of(of: list[int]) -> list[float]:
        adapters = Adapters.init(model, LORA, len(of), 0)
        own = [texts[i] for i in of], [configs[i] for i in of]
        return [outcome.loss for outcome in inner_update(model, adapters, *own, seed=0)]

    def sampled(of: list[int]) -> list[list[int]]:
        return generate(model, [prompts[i] for i in of], 12, [2], temperature=0.1, seed=5)

    everything = list(range(6))
    losses, samples = losses_of(everything), sampled(everything)
    for _ in range(count):
        of = rng.permutation(6)[: rng.integers(1, 7)].tolist()
        near = np.allclose(losses_of(of), [losses[i] for i in of], rtol=1e-4)
        alike = sampled(of) == [samples[i] for i in of]
        yield "" if near and alike else f"{of}: learns the same: {near}, writes the same: {alike}"


PIECES = ["1. Who fell?\n2. When?", "Question: Who?\nAnswer: Ada.", "A fell.\n\nSo B rose.", "{"]
PIECES += ["[" * 3000, '{"a":' * 3000, "1e999", "NaN", "-0", "9" * 400, "\ud83d", "\0", "\u2028"]
OPENED = []  # files, while a self-edit is read
sys.addaudithook(lambda event, args: OPENED.append(args[0]) if event == "open" else None)


def selfedits(home: Path, work: Path, count: int, rng):
    """Most texts have something sound in them: what is near to that goes further into the code."""
    known = strategies.sampled_from([json.dumps(settings) for *_, settings in WORKED] + PIECES)
    texts = strategies.lists(known | strategies.text(max_size=40), max_size=6).map("".join)
    texts |= strategies.builds(cut, known, texts, strategies.integers(0, 200))
    texts |= strategies.builds(str.__mul__, texts, strategies.integers(1, 30))
    tried, failed = [], []
    everything = list(hypothesis.HealthCheck)
    options = {"database": None, "deadline": None, "suppress_health_check": everything}

    @hypothesis.seed(int(rng.integers(1 << 31)))
    @hypothesis.settings(max_examples=count, **options)
    @hypothesis.given(texts, strategies.booleans())
    def read(text, ended):
        OPENED.clear()
        found, took = flaws(text, ended)
        if took > 0.1:  # is it the text, or did Python tidy up meanwhile?
            took = min(took, flaws(text, ended)[1])
        tried.append(text)
        wrong = [f"flaw {flaw!r}" for flaw in found if flaw not in FLAWS]
        wrong += [f"opened {name}" for name in OPENED] + [f"{took:.2f} s"] * (took > 0.1)
        if wrong:
            failed.append(f"{text!r:.80}: {wrong[0]}")

    def flaws(text, ended) -> tuple[list, float]:
        began, found = time.process_time(), []
        try:
            for style in STYLES:
                found.append(
                    selfedit.read_notes(text, ended, style, "It fell.", "It fell.", 1).flaw
                )
            found.append(selfedit.parse_settings(text, ended)[1])
            found.append(arc.parse_settings(text, ended)[1])
        except Exception as e:
            found.append(repr(e))
        return found, time.process_time() - began

    read()
    yield from failed
    yield from [""] * (len(tried) - len(failed))


def cut(text: str, by: str, at: int) -> str:
    """The text, with something else in it."""
    return text[:at] + by + text[at + len(by) :]


# -----------------------------------------------------------------------------
# files


def mutated(data: bytes, rng) -> bytes:
    """The bytes with a fault: some changed, cut off, doubled, taken out; or another number or word
    of JSON."""
    at, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 40))
    match rng.integers(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.bytes(n) + data[at + n :]
        case 2:
            return data[:at] + data[at + n :]
        case 3:
            return data[:at] + data[max(0, at - n) : at] * 2 + data[at:]
        case 4:
            words = [b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b"true", b"9" * 30]
            numbers = [i for i, c in enumerate(data[:5000]) if c in string.digits.encode()]
            i = int(rng.choice(numbers or [at]))
            return data[:i] + words[rng.integers(len(words))] + data[i + 1 :]
    names = [i for i, c in enumerate(data[:5000]) if c in b'"']
    i = int(rng.choice(names or [at]))
    return data[:i] + b'"../../../etc/passwd"' + data[i + 1 :]


def readers(home: Path, work: Path) -> dict:
    """{name: (folder or file that is damaged, how it is read)}."""
    model = load_model(home / "few", "cpu", "float32")
    adapters = Adapters.init(model, LORA, 1, seed=0)
    save_adapter(adapters, work / "adapter", "few")
    for job, folder in (("memory", "made"), ("outer round, passages", "made-outer")):
        assert not (wrong := finish(job, work / folder, home)), wrong
    shutil.copytree(home / "tiny", work / "words", ignore=shutil.ignore_patterns("*.safetensors"))
    return {
        "checkpoint": (home / "few", lambda path: load_model(path, "cpu", "float32")),
        "adapter": (work / "adapter", lambda path: load_adapter(model, path)),
        "tokenizer": (work / "words", lambda path: Tokenizer(path).encode("A fell.")),
        "memory": (work / "made" / "run", Memory),
        "run": (work / "made-outer" / "run", read_run),
        "passages": (home / "passages.json", load_passages),
        "puzzles": (home / "arc.json", load_tasks),
    }


def read_run(path: Path) -> None:
    report = importlib.import_module("report")
    sys.argv = ["report.py", str(path)]
    report.main()


def read_damaged(path: Path, read, told) -> None:
    """In a child: sends "", or what went wrong."""
    size = sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())
    most = memory("VmSize") + 8 * ROOM + size  # address space, of which less is used
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = memory("VmRSS")
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    wrong = ""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with contextlib.redirect_stderr(nowhere):
                read(path)
    except SystemExit as e:
        if not str(e).startswith("error: ") or "\n" in str(e):
            wrong = f"ends with {str(e)!r:.100}"
    except BaseException as e:
        wrong = f"{e!r:.200}"
    if (more := memory("VmHWM") - used) > ROOM + size:
        wrong = wrong or f"takes {more / 1e6:.0f} MB"
    after = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    changed = [p for p in after if after[p] != before.get(p) and p.name != "report.html"]
    told.send(wrong or (f"wrote {changed[0]}" if changed else ""))


def files(home: Path, work: Path, count: int, rng):
    kinds = readers(home, work)
    for n in range(count):
        kind = list(kinds)[n % len(kinds)]
        sound, read = kinds[kind]
        path = work / "damaged" / sound.name
        path.parent.mkdir(parents=True)
        (shutil.copytree if sound.is_dir() else shutil.copy)(sound, path)
        inside = sorted(p for p in [path, *path.rglob("*")] if p.is_file() and p.name != ".lock")
        file = inside[rng.integers(len(inside))]
        file.write_bytes(mutated(file.read_bytes(), rng))
        heard, told = fork.Pipe(duplex=False)
        child = fork.Process(target=read_damaged, args=(path, read, told))
        child.start()
        told.close()
        try:
            wrong = heard.recv() if heard.poll(60) else "takes more than a minute"
        except EOFError:
            child.join()
            wrong = f"dies with {child.exitcode}"
        child.kill()
        child.join()
        yield wrong and f"{kind}, {file.name}: {wrong}"
        shutil.rmtree(path.parent)


# -----------------------------------------------------------------------------
# numbers and long runs


def learnt(model, texts: list, rates: list[float]) -> tuple:
    """Adapters of candidates with these learning rates, and which of them diverged."""
    adapters = Adapters.init(model, LORA, len(texts), 0)
    configs = [SFTConfig(lr=rate, steps=4, row_len=64) for rate in rates]
    outcomes = inner_update(model, adapters, texts, configs, seed=0)
    return adapters.flat, [outcome.diverged for outcome in outcomes]


# What there is nothing to learn from: no sequence, no token that counts, none that is predicted.
ODD = [[], [Example((1, 2, 3), (False,) * 3)], [Example((5,), (True,))]]


def numbers(home: Path, work: Path, count: int, rng):
    models = [load_swapped(home / "few", dtype) for dtype in ("float32", "bfloat16")]
    sane = [1e-3] * 8
    for n in range(count):
        model, texts, it = models[n // 8 % 2], examples(rng, 8), n % 8
        texts[it - 1] = ODD[n % len(ODD)]
        exploding = [float(rng.choice([1e3, 1e30])) if k == it else 1e-3 for k in range(8)]
        (before, was), (after, diverged) = (learnt(model, texts, of) for of in (sane, exploding))
        others = [k for k in range(8) if k != it]
        same = torch.equal(before[others], after[others])
        said = diverged[it] or bool(after[it].isfinite().all())
        said &= all(diverged[k] == was[k] for k in others) and not diverged[it - 1]
        yield "" if same and said else f"neighbours the same: {same}, {diverged} diverged"


def haul(home: Path, work: Path, count: int, rng):
    """Each tenth of the updates is a try; the first one is what the others are held against."""
    model, texts = load_swapped(home / "few"), examples(rng, 4)

    square = torch.ones(48, 48)

    def yardstick() -> None:
        x = square
        for _ in range(400):
            x = torch.tanh(x @ square)

    def tenth() -> tuple[float, float, str]:
        took = []
        for _ in range(count // 10):
            began = time.perf_counter()
            learnt(model, texts, [1e-3] * 4)
            between = time.perf_counter()
            yardstick()
            took.append((between - began, time.perf_counter() - between))
        used = memory("VmRSS")
        update, other = np.quantile(took, 0.1, axis=0)
        weights = hashlib.sha256()
        for p in model.parameters():
            weights.update(p.detach().numpy().tobytes())
        return used, update / other, weights.hexdigest()

    tenth()  # what is allocated once
    used, seconds, weights = tenth()
    for _ in range(8):
        now = tenth()
        wrong = ["the base weights changed"] * (now[2] != weights)
        if now[0] > 1.02 * used:
            wrong.append(f"memory grew by {now[0] / used - 1:.1%}")
        if now[1] > 1.1 * seconds:
            wrong.append(f"an update takes {now[1] / seconds:.2f} times as long")
        yield ", ".join(wrong)


# -----------------------------------------------------------------------------

PARTS = {  # -> (function, how much of it)
    "kill": (kill, 52),
    "stop": (stop, 16),
    "ranks": (ranks, 20),
    "repeat": (repeat, 10),
    "order": (order, 100),
    "selfedits": (selfedits, 10_000),
    "files": (files, 2_000),
    "numbers": (numbers, 40),
    "haul": (haul, 2_000),
}


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts")
    add("--share", type=at_least(0.0), default=1.0, help="of the number of tries")
    add("--seed", type=at_least(0), default=0, help="of moments, faults and texts")
    add("--out", default="results/torture.json", help="result file")
    return parser.parse_args()


def torture(name: str, share: float, seed: int, home: Path, work: Path) -> dict:
    part, count = PARTS[name]
    work.mkdir()
    rng = np.random.default_rng(sub_seed(seed, list(PARTS).index(name)))
    count = max(1, round(share * count))
    progress, outcomes, began = Progress(name, count), [], time.perf_counter()
    for outcome in part(home, work, count, rng):
        outcomes.append(outcome)
        progress.step(len(outcomes) <= count)
    failures = [outcome for outcome in outcomes if outcome]
    row = {"part": name, "tried": len(outcomes), "held": len(outcomes) - len(failures)}
    row |= {"failures": failures[:20], "seconds": round(time.perf_counter() - began, 1)}
    print(f"{name}: {row['held']} of {row['tried']} held", *row["failures"][:3], sep="\n  ")
    return row


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    torch.set_num_threads(1)  # the models are tiny, and children are forked
    with TemporaryDirectory() as tmp:
        home = Path(tmp) / "home"
        home.mkdir()
        make_home(home)
        rows = [torture(n, args.share, args.seed, home, Path(tmp) / n) for n in args.only]
    write_json(args.out, {"command": command_line(), "seed": args.seed, "rows": rows})
    if any(row["failures"] for row in rows):
        raise SystemExit("error: not everything held; the result file has what did not")


if __name__ == "__main__":
    run_main(main)
