"""Run folders: settings, finished rounds, and the policies that a ladder finds there."""

import fcntl
import json
import re
from pathlib import Path

import numpy as np

from lm.files import (
    check_output,
    digest,
    fingerprint,
    read_json,
    read_jsonl,
    warn,
    write_json,
    write_jsonl,
)
from lm.ranks import RANK, agree

POLICY = "policy.json"  # of a shipped policy: its base, and how it was trained
LOCKS = []  # of the run folders that this process works in, held until it ends
ROOT = Path(__file__).resolve().parent.parent
CODE = ("*.py", "lm/*.py", "data/*.py", "experiments/*.py")
SPEED = ("population", "compile", "device", "shard")  # settings that change how fast a run is
# Not in older runs, which were like this.
LATER = {"student": "", "agents": 1, "exchange": "all"}


def open_run(folder, settings: dict, model=None, student=None) -> Path:
    """Make the run folder, or check that it was made with the same settings, dtype, and weights of
    the model and of a student that is another one, so that a run is only ever resumed as what it
    was; SPEED may differ, and a ladder's "policies" may come and go, but not change. Exits with one
    line that names the first setting that differs, or if another process works in the folder. A
    note says if the code has changed since, or had already before.
    """
    folder = Path(folder)
    check_output(folder, folder=True)
    settings = json.loads(json.dumps(settings, default=str)) | {"code": [code_of(ROOT)]}
    if model is not None:
        settings |= {"dtype": str(model.dtype), "weights": weights_of(model)}
    if student not in (None, model):
        settings["student_weights"] = weights_of(student)
    if not RANK:
        lock(folder)
    agree(settings)  # the others wait for the one that has the lock
    if (folder / "settings.json").is_file():
        before = read_json(folder / "settings.json")
        before = {key: LATER[key] for key in LATER if key in settings} | before
        known, now = before.get("policies"), settings.get("policies")
        if isinstance(known, dict) and isinstance(now, dict):
            if all(known[name] == now[name] for name in known.keys() & now.keys()):
                before["policies"] = settings["policies"] = known | now
        settings["code"] = list(dict.fromkeys(before.get("code", [""]) + settings["code"]))
        if len(settings["code"]) > 1:
            warn(f"{folder} was not made by today's code alone: its results may be mixed")
        for key in sorted((before.keys() | settings.keys()) - {"code", *SPEED}):
            if before.get(key) != settings.get(key):
                raise SystemExit(
                    f"error: {folder} was started with {key} = {before.get(key)!r}, now it is "
                    f"{settings.get(key)!r}; "
                    "use the same settings to resume it, or another folder (--out, --work)"
                )
    write_json(folder / "settings.json", settings)
    return folder


def code_of(root: Path) -> str:
    """A fingerprint of the source files."""
    files = sorted(path for pattern in CODE for path in root.glob(pattern))
    return fingerprint(b"".join(path.read_bytes() for path in files))


def weights_of(model) -> str:
    """A fingerprint of the first 256 numbers of each weight, of which training changes some; the
    same for float32 and bfloat16."""
    # Of a weight that is shared out (--shard) a process has some rows; one is whole at a time.
    each = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    some = [p.detach().flatten()[:256].bfloat16().float().cpu() for p in each]
    return fingerprint(np.concatenate(some).tobytes())


def lock(folder: Path) -> None:
    """Keep the folder to this process until it ends, however it does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(folder / ".lock", "a"))
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise SystemExit(f"error: another process is at work in {folder}") from e
    except OSError as e:
        raise SystemExit(f"error: cannot write {folder}: {e.strerror}") from e


def read_settings(run, *fields) -> dict:
    """The settings of a train_outer.py run. Exits with one line if one of the fields that are
    needed is not among them."""
    path = Path(run) / "settings.json"
    return settings_in(path, read_json(path), *fields)


def settings_in(path: Path, settings: dict, *fields) -> dict:
    """These settings, which stand in a file. Exits with one line if a field is missing there."""
    if "domain" not in settings:
        raise SystemExit(f"error: {path.parent} was written by an older version; train it anew")
    for field in fields:
        if field not in settings:
            raise SystemExit(f"error: {path}: field {field!r} is missing")
    return settings


class Rounds:
    """The rounds of a run folder: round-K/ each, and a line of metrics.jsonl for every one that is
    finished.

    for k, folder in rounds.remaining():
        rounds.finish({"round": k, ...})

    Exits with one line if metrics.jsonl has other rounds than 1, 2, ...
    """

    def __init__(self, folder, total: int):
        self.path, self.total, file = Path(folder), total, Path(folder) / "metrics.jsonl"
        self.metrics = read_jsonl(file, resume=True) if file.is_file() else []
        for k, metrics in enumerate(self.metrics, 1):
            if metrics.get("round") != k:
                raise SystemExit(f"error: {file} line {k} is not of round {k}")
            for key in SOUND.keys() & metrics.keys():
                if not isinstance(metrics[key], (int, float)) or abs(metrics[key]) > 1e9:
                    raise SystemExit(f"error: {file} line {k}: {key} is {metrics[key]!r:.40}")

    @property
    def done(self) -> int:
        return len(self.metrics)

    def folder(self, k: int) -> Path:
        return self.path / f"round-{k}"

    def remaining(self):
        """(k, folder) of each round that is not finished: a killed run skips the others."""
        while self.done < self.total:
            k = self.done + 1
            yield k, self.folder(k)
            assert self.done == k, "the round was not finished"

    def finish(self, metrics: dict) -> None:
        self.metrics.append(metrics)
        write_jsonl(self.path / "metrics.jsonl", self.metrics)
        shown = []
        for key, v in metrics.items():
            each = v if isinstance(v, list) else [v]
            values = [f"{x:.3f}" if isinstance(x, float) else str(x) for x in each]
            shown.append(f"{key} {' '.join(values)}")
        print("  ".join(shown), flush=True)
        if lost := collapse(self.metrics):
            warn(f"round {metrics['round']}: {', '.join(lost)}: self-edits degenerate")


# Metrics where nothing was counted.
SOUND = {"repeats": 0.0, "endless": 0.0, "distinct": 1.0, "notes_mean": 0.0}


def collapse(metrics: list[dict]) -> list[str]:
    """Signs, in words, that the self-edits of the last of these rounds have lost their variety:
    half of the texts repeat themselves, or have come to know no end, or there are half as many
    notes, or half as many unlike texts, as in the first round."""
    first, last, signs = SOUND | metrics[0], SOUND | metrics[-1], []
    if last["repeats"] > 0.5:
        signs.append(f"{100 * last['repeats']:.0f} % of the texts say the same twice")
    if last["endless"] > max(0.5, first["endless"]):
        signs.append(f"{100 * last['endless']:.0f} % of the texts do not end")
    if last["distinct"] < first["distinct"] / 2:
        now, then = (100 * m["distinct"] for m in (last, first))
        signs.append(f"{now:.0f} % of the texts on a passage are unlike, of {then:.0f} % at first")
    if last["notes_mean"] < first["notes_mean"] / 2:
        signs.append(f"{last['notes_mean']:.1f} notes, of {first['notes_mean']:.1f} at first")
    return signs


def add_ladder_flags(parser, domain: str, out: str) -> None:
    """Which policies a ladder has a row for, and where it writes; see set_outputs()."""
    add = parser.add_argument_group("policies and files").add_argument
    about = f"folder of a train_outer.py {domain} run: adds a row for each round's policy"
    add("--run", help=about)
    about = "adapter folders: seal-1, seal-2, ..., or seal-K for one that was shipped after round K"
    add("--policy", nargs="+", default=[], metavar="FOLDER", help=about)
    add("--out", help=f"result file; without it RUN/ladder.json, or {out}")
    about = "folder for progress, to resume a killed run; without it RUN/ladder or runs/eval-NAME"
    add("--work", help=about)


def set_outputs(args, out: str):
    """Fill in --out and --work of a ladder: beside a run's other files if there is one (and no
    --out), else `out`."""
    beside = args.run and not args.out
    args.out = args.out or (f"{args.run}/ladder.json" if args.run else out)
    stem = Path(args.out).stem
    args.work = args.work or (f"{args.run}/ladder" if beside else f"runs/eval-{stem}")
    check_output(args.out)
    check_output(args.work, folder=True)
    return args


def find_policies(args, domain: str) -> dict:
    """{"seal-K": adapter folder} of --run and --policy, after "proxy" if there is a --proxy. A
    shipped policy is named after its round, others in their order. Exits if --run has no finished
    round, or was of another domain or to write otherwise."""
    found, proxy = {}, getattr(args, "proxy", None)
    if args.run:
        for file in sorted(Path(args.run).glob("round-*/policy/adapter_config.json")):
            k = file.parent.parent.name.removeprefix("round-")
            if re.fullmatch("[1-9][0-9]*", k):
                found[int(k)] = file.parent
                if others := sorted(file.parent.parent.glob("policy-*")):
                    told = f"seal-{k} is the first agent's policy"
                    warn(f"{told}; for others there is --policy {others[0]}")
            else:
                warn(f"{file.parent} is left out: round-{k} is not the name of a round")
        if not found:
            raise SystemExit(f"error: --run {args.run}: no finished round (round-K/policy) there")
    for where, before in trained_as(args):
        if before["domain"] != domain:
            raise SystemExit(f"error: {where} was trained with train_outer.py {before['domain']}")
        for key in ("style", "shots", "learner"):
            if key in before and before[key] != getattr(args, key):
                raise SystemExit(
                    f"error: {where} was trained with --{key} {before[key]}; give this script "
                    "the same"
                )
        refuse_other_settings(where, before, args)
        say_what_differs(where, before, args)
    policies = {"proxy": Path(proxy)} if proxy else {}
    for folder in args.policy:
        k = round_of(folder)
        found[max(found, default=0) + 1 if k is None or k in found else k] = Path(folder)
    return policies | {f"seal-{k}": found[k] for k in sorted(found)}


def round_of(folder) -> int | None:
    """The round that a shipped policy is from; None for an adapter that does not say."""
    file = Path(folder) / POLICY
    named = str(read_json(file).get("round")) if file.is_file() else ""
    round_k = re.fullmatch("round-([1-9][0-9]*)", named)
    return int(round_k[1]) if round_k else None


def trained_as(args, *fields, proxy: bool = False) -> list[tuple]:
    """(folder, settings) of the --run, and of each --policy (and the --proxy) that was shipped or
    stands in its run's folder; an adapter from elsewhere does not say. Exits with one line if one
    of the fields that are needed is not among them."""
    found = [(args.run, read_settings(args.run, *fields))] if args.run else []
    more = [args.proxy] if proxy and getattr(args, "proxy", None) else []
    for folder in [*args.policy, *more]:
        round_k = Path(folder).resolve().parent
        if (file := Path(folder) / POLICY).is_file():
            settings = read_json(file).get("settings", {})
            found.append((folder, settings_in(file, settings, *fields)))
        elif re.fullmatch("round-[1-9][0-9]*", round_k.name):
            found.append((folder, read_settings(round_k.parent, *fields)))
    return found


def refuse_other_settings(where, before: dict, args) -> None:
    """Exit with one line if a run's self-edits say how they are studied and the ladder's do not, or
    the other way round, or within another budget."""
    said, says = before.get("settings", False), getattr(args, "settings", False)
    how = f"with{'' if said else 'out'} --settings"
    if said and says and before["budget"] != args.budget:
        how = f"with --budget {before['budget']}"
    elif said == says:
        return
    raise SystemExit(f"error: {where} was trained {how}; give this script the same")


def say_what_differs(where, before: dict, args) -> None:
    """A note if the run's self-edits were rewarded for another inner update than the ladder's."""
    if before.get("reward") == "proxy":
        return  # for none
    names = "model student rank alpha targets top_layers augmented row_len".split()
    names += [] if before.get("settings") else ["lr", "steps", "epochs"]
    now = {name: value for name, value in vars(args).items() if name in names}
    before, other = LATER | before, []
    for k in now:
        if before.get(k, now[k]) != now[k]:
            other.append(f"--{k.replace('_', '-')} {before[k] or 'none'}")
    if other:
        warn(f"{where} was trained with {', '.join(other)}, other than this ladder")


def policy_digests(policies: dict) -> dict:
    """What a resumed run must find unchanged."""
    found = {}
    for name, folder in policies.items():
        found[name] = digest(folder / "adapter_model.safetensors")
        found[f"{name} config"] = digest(folder / "adapter_config.json")  # not in older runs
    return found
