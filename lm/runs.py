"""Run folders: settings, finished rounds, and the policies that a ladder finds there."""

import json
from pathlib import Path

from lm.files import digest, read_json, read_jsonl, write_json, write_jsonl


def open_run(folder, settings: dict) -> Path:
    """Make the run folder, or check that it was made with the same settings, so that a run is only
    ever resumed as what it was. Exits with one line that names the first setting that differs."""
    folder = Path(folder)
    settings = json.loads(json.dumps(settings, default=str))
    if (folder / "settings.json").is_file():
        before = read_json(folder / "settings.json")
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise SystemExit(
                    f"error: {folder} was started with {key} = {before.get(key)!r}, now it is "
                    f"{settings.get(key)!r}; "
                    "use the same settings to resume it, or another folder (--out, --work)"
                )
    else:
        write_json(folder / "settings.json", settings)
    return folder


class Rounds:
    """The rounds of a run folder: round-K/ each, and a line of metrics.jsonl for every one that is
    finished.

    for k, folder in rounds.remaining():
        rounds.finish({"round": k, ...})
    """

    def __init__(self, folder, total: int):
        self.path, self.total = Path(folder), total
        self.metrics = (
            read_jsonl(self.path / "metrics.jsonl")
            if (self.path / "metrics.jsonl").is_file()
            else []
        )

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
        shown = [
            f"{key} {v:.3f}" if isinstance(v, float) else f"{key} {v}" for key, v in metrics.items()
        ]
        print("  ".join(shown), flush=True)


def add_ladder_flags(parser, domain: str, out: str) -> None:
    """Which policies a ladder has a row for, and where it writes; see set_outputs()."""
    add = parser.add_argument_group("policies and files").add_argument
    about = f"folder of a train_outer.py {domain} run: adds a row for each round's policy"
    add("--run", help=about)
    about = "adapter folders to use as seal-1, seal-2, ..."
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
    return args


def find_policies(args, domain: str) -> dict:
    """{"seal-K": adapter folder} of --run and --policy. Exits if --run has no finished round, or
    was of another domain or to write otherwise."""
    found = {}
    if args.run:
        for file in Path(args.run).glob("round-*/policy/adapter_config.json"):
            found[int(file.parent.parent.name.removeprefix("round-"))] = file.parent
        if not found:
            raise SystemExit(f"error: --run {args.run}: no finished round (round-K/policy) there")
        before = read_json(Path(args.run) / "settings.json")
        if "domain" not in before:
            raise SystemExit(f"error: {args.run} was written by an older version; train it anew")
        if before["domain"] != domain:
            raise SystemExit(
                f"error: {args.run} was trained with train_outer.py {before['domain']}"
            )
        for key in ("style", "shots", "learner"):
            if key in before and before[key] != getattr(args, key):
                raise SystemExit(
                    f"error: {args.run} was trained with --{key} {before[key]}; give this script "
                    "the same"
                )
    policies = {f"seal-{k}": found[k] for k in sorted(found)}
    start = max(found, default=0) + 1
    return policies | {f"seal-{k}": Path(folder) for k, folder in enumerate(args.policy, start)}


def policy_digests(policies: dict) -> dict:
    """What a resumed run must find unchanged."""
    return {name: digest(folder / "adapter_model.safetensors") for name, folder in policies.items()}
