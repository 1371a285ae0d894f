"""Speed, side by side: this project against transformers + peft, on the same machine, model and
work, in one run.

    python bench/speed.py                                  # everything: 25 minutes on two cores
    python bench/speed.py --only quiz sampling --out runs/bench.json
    python bench/speed.py --write-work                     # write data/bench_work.json anew: 16
                                                           passages x 4 real self-edits

Ours and the other take turns, A B A B ..., and each figure is the median over --repeats turns;
ratio = other / ours. The other side is in bench/baselines.py (needs requirements-dev.txt). Where
only a part of the work is timed and scaled, the row is marked "~" and its note says what. Rows
about training refuse to count if the two sides' losses are not alike. Rows with "the default
recipe" take the inner update's settings as given, inner-strict and inner-paper the paper's.

Candidates: the 8 self-edits with the most notes (more notes are more training sequences). Lengths
of generated text are forced, so that both sides generate the same number of tokens.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np
import torch

import reward
from bench import scaling
from bench.scaling import timed
from data.qa import load_passages
from inner import SFTConfig, inner_update, lora_config, plan_steps, sft_config
from lm.files import check_output, read_json, read_jsonl, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load
from lm.packing import arrange
from lora import PROJECTIONS, Adapters, LoRAConfig
from quiz import ANSWER_LEN, quiz_items
from reward import Candidate, passage_candidate
from sampler import generate
from selfedit import edit_prompts, policy_example, settle, write_self_edits

WORK = "data/bench_work.json"
OURS, BRIEF = 16, 4  # steps that are timed of each side where the whole takes too long


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    add = parser.add_argument_group("bench").add_argument
    add(
        "--only",
        nargs="+",
        default=list(PARTS),
        choices=PARTS,
        help="parts to run; of --out, the others' rows are kept",
    )
    add("--repeats", type=at_least(1), default=3, help="turns of each side")
    add("--out", default="results/bench.json", help="result file, written after every part")
    add("--write-work", action="store_true", help=f"sample the self-edits of {WORK} anew, and stop")
    parser.set_defaults(device="cpu")
    args = settle(parser.parse_args())
    if args.device != "cpu":
        parser.error(
            "this compares on the CPU; for a GPU, both sides would have to be timed with "
            "synchronisation"
        )
    if not args.steps:
        parser.error("this needs --steps of at least 1: some rows time a part of the steps")
    return args


# -----------------------------------------------------------------------------
# the work


class Bench:
    """What the parts share: both models, the fixed passages and self-edits, the rows measured so
    far."""

    def __init__(self, args):
        self.args, self.rows, self.mfu = args, [], {}
        self.kept = []  # rows that --only leaves as they were
        self.model, self.tok = load(args)
        self.fast = lora_config(args, self.model), sft_config(args)
        self.passages = load_passages(WORK)
        by_id = {p.id: p for p in self.passages}
        edits = read_json(WORK)["self_edits"]
        self.candidates = [self.candidate(by_id[e["passage"]], e["notes"]) for e in edits]
        most = sorted(range(len(edits)), key=lambda i: -len(edits[i]["notes"]))[:8]
        self.longest = [self.candidates[i] for i in most]
        self.prompts = []
        for p in self.passages:
            self.prompts.append(edit_prompts(self.tok, args.style, p.title, p.text, args.shots))
        try:
            from bench.baselines import Baseline
        except ImportError as e:
            raise SystemExit(
                f"error: {e}; the other side needs: pip install -r requirements-dev.txt"
            ) from e
        self.other = Baseline(args.model, self.model.dtype)

    def candidate(self, passage, notes) -> Candidate:
        return passage_candidate(self.tok, 0, passage, notes, self.fast[1])

    def fresh(self, config: LoRAConfig, n: int) -> Adapters:
        return Adapters.init(self.model, config, n, self.args.seed)

    def train(self, candidates, lora, sft):
        """Ours: all candidates as one population."""
        adapters = self.last = self.fresh(lora, len(candidates))
        examples, configs = [c.examples for c in candidates], [sft] * len(candidates)
        return inner_update(self.model, adapters, examples, configs, self.args.seed)

    def batches(self, examples, sft) -> list:
        """The sequences of each step, in the order in which inner_update takes them."""
        rows = []
        for row, _ in arrange(examples, sft.row_len):
            rows.append([examples[i] for i in row])
        steps = []
        for step in plan_steps(len(rows), sft, self.args.seed):
            steps.append([e for r in step for e in rows[r]])
        return steps

    def train_other(self, candidates, lora, sft, steps: int = 0) -> list:
        """The other: one candidate after another, the same sequences in each step. Returns each
        one's losses.

        `steps`: take only the first so many.
        """
        one = self.fresh(lora, 1)
        return [
            self.other.train(one, self.batches(c.examples, sft), sft, steps) for c in candidates
        ]

    def padded(self, sft, steps: int = 0) -> int:
        """Tokens that the other side reads in the 8 candidates' first `steps` steps, or in all:
        each batch is padded."""
        total = 0
        for c in self.longest:
            for batch in self.batches(c.examples, sft)[: steps or None]:
                total += len(batch) * max(len(e.ids) for e in batch)
        return total

    def other_time(self, run, part: float = 1.0, setups: float = 1.0) -> float:
        """Seconds of run(), of which the loop is timed `part` times as long, and the set-up counted
        `setups` times."""
        before = self.other.setup
        seconds = timed(run)
        setup = self.other.setup - before
        return (seconds - setup) * part + setup * setups

    def versus(self, work, ours, name, other, note="", part=1.0, other_part=1.0, setups=1.0):
        """Time both in turns, and keep the row. Where only a part of the work is timed, its seconds
        are scaled."""
        seconds = [[], []]
        for _ in range(self.args.repeats):
            seconds[0].append(timed(ours) * part)
            seconds[1].append(self.other_time(other, other_part, setups))
        a, b = map(statistics.median, seconds)
        row = {
            "work": work,
            "ours_s": a,
            "other": name,
            "other_s": b,
            "ratio": b / a,
            "note": note,
            "turns": seconds,
        }
        self.add(row | {"scaled": other_part != 1, "ours_scaled": part != 1})

    def keep_others(self, head: dict) -> tuple[list, list, float]:
        """With --only: the rows of other parts that stand in --out, the commands that measured it,
        and the minutes that they took. Exits with one line if that was in another way."""
        if set(self.args.only) == set(PARTS) or not Path(self.args.out).is_file():
            return [], [], 0.0
        before = read_json(self.args.out)
        for key, value in head.items():
            if before[key] != value:
                raise SystemExit(
                    f"error: {self.args.out} was measured with {key} {before[key]}, not {value}; "
                    "give another --out"
                )
        self.mfu = before["mfu"]
        kept = [row for row in before["rows"] if part_of(row) not in self.args.only]
        return kept, before.get("commands", [before.get("command")]), before["minutes"]

    def add(self, row: dict) -> None:
        self.rows.append(row)
        seconds = f"{row['ours_s']:8.2f} s {row['other_s']:9.2f} s"
        print(f"{row['work']:<16} {seconds} {row['ratio']:7.2f}  {row['other']}", flush=True)


def part_of(row: dict) -> str:
    """The part that measured a row: "quiz" of "quiz-merged"."""
    return next(part for part in PARTS if row["work"].startswith(part))


def write_work(args) -> None:
    """The first 16 train passages, four self-edits each: those that the first round of
    train_outer.py samples by default."""
    model, tok = load(args)
    passages = load_passages("data/passages.json", "train", 0, 16)
    edits = write_self_edits(model, tok, passages, 4, args, sub_seed(args.seed, 1, 0))
    entries = {p["id"]: p for p in read_json("data/passages.json")["passages"]}
    about = "The work of bench/speed.py: passages out of passages.json, and self-edits that "
    about += "SmolLM2-135M-Instruct wrote of them."
    content = {"about": about, "command": "python bench/speed.py --write-work"}
    content["passages"] = [entries[p.id] for p in passages]
    content["self_edits"] = []
    for e in edits:
        texts, targets = [p.text for p in e.parts], [p.target for p in e.parts]
        content["self_edits"].append(
            {"passage": e.passage, "parts": texts, "mended": targets, "notes": e.notes}
        )
    write_json(WORK, content)


# -----------------------------------------------------------------------------
# the inner update


def strict(b: Bench) -> tuple[LoRAConfig, SFTConfig]:
    """The paper's recipe."""
    lora = LoRAConfig(32, 64.0, ("q_proj", "v_proj"), 0, b.model.config.n_layer)
    return lora, SFTConfig(lr=1e-3, epochs=10, row_len=0)


def inner_strict(b: Bench) -> None:
    lora, full = strict(b)
    brief = replace(full, steps=OURS)
    part, other_part = (b.padded(full) / b.padded(brief, n) for n in (OURS, BRIEF))
    note = (
        f"8 candidates, the paper's recipe; timed: ours {OURS} steps of each, the other {BRIEF}, "
    )
    note += "and scaled by tokens"
    compare_training(
        b, "inner-strict", lora, brief, note, steps=BRIEF, part=part, other_part=other_part
    )


def inner_fast(b: Bench) -> None:
    """The default recipe. The other side's steps are ours: the sequences of a packed row are one
    padded batch."""
    lora, sft = b.fast
    steps = min(BRIEF, sft.steps)
    note = "8 candidates, the default recipe; the other: the same LoRA and the same steps, "
    note += "a padded batch each; "
    note += f"{steps} of its {sft.steps} steps timed, and scaled by tokens"
    part = b.padded(sft) / b.padded(sft, steps)
    compare_training(b, "inner-fast", lora, sft, note, steps=steps, other_part=part)


def compare_training(b, work, lora, sft, note, steps: int = 0, **scale) -> None:
    """Time the same training on both sides, the other only `steps` steps of it, and refuse if their
    losses are not alike."""
    ours, theirs = [], []
    b.versus(
        work,
        lambda: ours.append(b.train(b.longest, lora, sft)),
        "peft, tuned loop",
        lambda: theirs.append(b.train_other(b.longest, lora, sft, steps)),
        note,
        **scale,
    )
    gap = []
    for outcome, losses in zip(ours[0], theirs[0]):
        pairs = zip(outcome.losses[: steps or None], losses, strict=True)
        gap += [abs(x - y) for x, y in pairs]
    b.rows[-1]["loss_gap"] = {"mean": float(np.mean(gap)), "max": max(gap), "steps": len(gap)}
    if np.mean(gap) > 0.05:  # nats; the losses themselves run from about 6 to 2
        raise SystemExit(
            f"error: the two sides do not train alike, their losses differ by {np.mean(gap):.3f} "
            "on average"
        )


def inner_paper(b: Bench) -> None:
    lora, sft = strict(b)
    examples = [c.examples for c in b.longest]
    total = sum(sft.total_steps(len(own)) for own in examples)
    brief = replace(sft, steps=OURS)
    b.versus(
        "inner-paper",
        lambda: b.train(b.longest, lora, brief),
        "peft, Trainer, padded to 2048",
        lambda: b.other.trainer_steps(b.fresh(lora, 1), examples[0], sft, 1),
        f"as inner-strict; timed: ours {OURS} steps of each, the other 1 step of all {total}, and "
        "scaled",
        part=b.padded(sft) / b.padded(brief),
        other_part=total,
        setups=8,
    )


# -----------------------------------------------------------------------------
# generation


def quiz(b: Bench) -> None:
    """Five questions under each of 8 adapters, three ways on the other side: a batch of 5 under one
    adapter after another, each adapter merged first, and all 40 questions in one batch of mixed
    adapters."""
    b.train(b.longest, b.fast[0], replace(b.fast[1], steps=1))
    adapters, items = b.last, []
    for n, c in enumerate(b.longest):
        items += quiz_items(b.tok, c.subject, n)[:5]
    prompts, owner = [list(i.prompt) for i in items], [i.owner for i in items]
    theirs = b.other.attach(adapters).eval()

    def one_by_one(merge: bool):
        for n in range(8):
            theirs.set_adapter(str(n))
            theirs.merge_adapter() if merge else None
            b.other.generate(prompts[5 * n : 5 * n + 5], 32, theirs)
            theirs.unmerge_adapter() if merge else None

    def mixed():
        b.other.generate(prompts, 32, theirs, adapter_names=[str(o) for o in owner])

    def ours():
        generate(b.model, prompts, 32, (), adapters=adapters, owner=owner)

    note = "8 adapters, 5 questions each, 32 tokens"
    b.versus("quiz", ours, "generate, adapter by adapter", lambda: one_by_one(False), note)
    b.versus("quiz-merged", ours, "generate, each adapter merged", lambda: one_by_one(True), note)
    b.versus("quiz-mixed", ours, "generate, adapter_names", mixed, note)
    theirs.unload()


def sampling(b: Bench) -> None:
    options = {"copies": 4, "temperature": b.args.temperature, "top_p": b.args.top_p}
    prompts, note = [own[0] for own in b.prompts], "16 prompts x 4, 128 tokens each"
    ours = lambda: generate(b.model, prompts, 128, (), seed=b.args.seed, **options)  # noqa: E731
    other = lambda: b.other.generate(prompts, 128, **options)  # noqa: E731
    b.versus("sampling", ours, "generate, num_return_sequences", other, note)


def outer(b: Bench) -> None:
    """One outer round of 16 passages x 4: ours of two passages, whole; the other side's parts on a
    share of the work, added up. Both are scaled to all of it."""
    find = lambda: [row for row in [*b.kept, *b.rows] if row["work"] == "sampling"]  # noqa: E731
    if not find():
        sampling(b)
    [sampled], args = find(), b.args
    lora, sft = b.fast
    everything = LoRAConfig(64, 128.0, tuple(PROJECTIONS), 0, b.model.config.n_layer)
    outer_sft = SFTConfig(lr=5e-4, epochs=2, row_len=1024)  # train_outer.py's defaults
    command = [sys.executable, "train_outer.py", "qa", "--samples", "4", "--select", "best"]
    command += ["--rounds", "1", "--data", WORK, "--split", "", "--limit", "2", "--device", "cpu"]
    command += ["--model", args.model, "--dtype", str(b.model.dtype)[6:], "--seed", str(args.seed)]
    # The other side trains on the recorded self-edits, ours on what it has just sampled alike.
    part, brief, share = b.candidates[::16], replace(sft, steps=2), sft.steps / 2
    examples = []
    for prompts, edit in zip(b.prompts, read_json(WORK)["self_edits"][::4]):  # each passage's first
        pairs = [pair for pair in zip(prompts, edit["mended"]) if pair[1]]
        examples += [policy_example(b.tok, *pair) for pair in pairs]
    steps, requests = b.batches(examples, outer_sft), sum(map(len, b.prompts)) / len(b.prompts)

    def ours() -> float:
        """The seconds of one round, as it counts them: a new process has to load the model."""
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([*command, "--out", out], check=True, capture_output=True)
            return read_jsonl(Path(out) / "metrics.jsonl")[0]["seconds"]

    def other() -> dict:
        scale = 64 / len(part)
        spent = {"sample": sampled["other_s"] * requests * args.max_new / 128}
        spent["update"] = b.other_time(lambda: b.train_other(part, lora, brief), share) * scale
        model = b.other.attach(b.fresh(lora, 1)).eval()
        ends, quizzes = [*b.tok.end_ids, *b.tok.newline_ids], []
        for c in part:
            quizzes.append([list(i.prompt) for i in quiz_items(b.tok, c.subject)])

        def ask():
            for prompts in quizzes:
                b.other.generate(prompts, ANSWER_LEN, model, ends=ends)

        spent["quiz"] = timed(ask) * scale
        model.unload()
        run = lambda: b.other.train(b.fresh(everything, 1), steps, outer_sft, steps=2)  # noqa: E731
        return spent | {"reinforce": b.other_time(run, len(steps) / min(2, len(steps)))}

    turns = [(8 * ours(), other()) for _ in range(b.args.repeats)]
    a = statistics.median(t[0] for t in turns)
    o = statistics.median(sum(t[1].values()) for t in turns)
    note = (
        "16 passages x 4, --select best; timed: ours 2 passages; the other: sampling from its row, "
    )
    note += f"{len(part)} of 64 candidates x 2 steps, 2 of {len(steps)} outer steps; and scaled"
    row = {
        "work": "round",
        "ours_s": a,
        "other": "transformers + peft",
        "other_s": o,
        "ratio": o / a,
    }
    b.add(row | {"note": note, "turns": turns, "scaled": True, "ours_scaled": True})


OURS_TO_FIRST_TOKEN = """
from lm.flags import Parser, add_model_flags, load
from sampler import generate
parser = Parser()
add_model_flags(parser)
args = ["--model", {model!r}, "--device", "cpu", "--dtype", "{dtype}"]
model, tok = load(parser.parse_args(args))
generate(model, [tok.encode("The bell was cast in")], 1, ())
"""
OTHER_TO_FIRST_TOKEN = """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.{dtype})
tok = transformers.AutoTokenizer.from_pretrained({model!r})
ids = tok("The bell was cast in", return_tensors="pt")
model.generate(**ids, max_new_tokens=1, do_sample=False)
"""
# VmHWM and not getrusage(), whose maximum a child begins with at what its parent has. 0 where there
# is no /proc.
PEAK = """
from pathlib import Path
status = Path("/proc/self/status")
kilobytes = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
print("peak", int(kilobytes) // 1024)
"""


def startup(b: Bench) -> None:
    """A new process, from the start of Python to the first token; and its peak memory."""
    peaks = {}

    def run(code):
        program = code.format(model=b.args.model, dtype=str(b.model.dtype)[6:]) + PEAK
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        peaks[code] = int(done.stdout.split("peak")[1])

    ours, other = lambda: run(OURS_TO_FIRST_TOKEN), lambda: run(OTHER_TO_FIRST_TOKEN)
    b.versus("load", ours, "transformers", other, "a process from its start to the first token")
    b.rows[-1] |= {
        "peak_mb": peaks[OURS_TO_FIRST_TOKEN],
        "other_peak_mb": peaks[OTHER_TO_FIRST_TOKEN],
    }


# -----------------------------------------------------------------------------

PARTS = {
    "load": startup,
    "inner-strict": inner_strict,
    "inner-paper": inner_paper,
    "inner-fast": inner_fast,
    "quiz": quiz,
    "sampling": sampling,
    "round": outer,
    "population": scaling.population,
    "sequence": scaling.sequence,
    "kernels": scaling.kernels,
    "mfu": scaling.utilization,
    "compile": scaling.compiled,
}


def main() -> None:
    args = parse_arguments()
    if args.write_work:
        return write_work(args)
    check_output(args.out)
    start, b = time.perf_counter(), Bench(args)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}"
    head = {
        "seed": args.seed,
        "machine": machine,
        "torch": torch.__version__,
        "dtype": str(b.model.dtype),
    }
    head["repeats"] = args.repeats
    b.kept, commands, minutes = b.keep_others(head)
    print(f"{'work':<16} {'ours':>10} {'other':>11} {'ratio':>7}  other side", flush=True)
    for name in (part for part in PARTS if part in args.only):
        PARTS[name](b)
        result = {"commands": [*commands, "python " + " ".join(sys.argv)]} | head
        result["minutes"] = minutes + (time.perf_counter() - start) / 60
        rows = sorted(b.kept + b.rows, key=lambda row: list(PARTS).index(part_of(row)))
        write_json(args.out, result | {"rows": rows, "mfu": b.mfu})
    print("\n".join(["", *scaling.table(rows)]))


if __name__ == "__main__":
    run_main(main)
