"""What does a memory of many documents cost: bytes, and seconds to the first word of an answer?

    python bench/memory.py --documents 50           # -> results/memory.json: two minutes

learn.py studies one passage of --data, with its own settings. The memory's other documents are the
next passages under copies of that adapter: neither bytes nor seconds depend on what was learnt.
"bytes": all files of the memory. Then learn.py is asked the quizzes' questions, one of each
document, --repeats of them. "first_word": seconds to that of an answer, all and their median:
    chat       from the question's line; the model, the memory and an answer before it are there
    command    from the start of `learn.py ask QUESTION`: Python, torch and the model are loaded
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

from data.qa import Passage, load_passages
from lm.files import check_output, run_main, write_json
from lm.flags import Parser, add_model_flags, at_least, command_line
from lm.memory import ABOUT, Memory

LEARN = [sys.executable, str(Path(__file__).resolve().parent.parent / "learn.py")]


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser, trains=False)
    add = parser.add_argument_group("bench").add_argument
    add("--data", default="data/passages.json", help="passages with questions")
    add("--documents", type=at_least(1), default=50, help="documents in the memory")
    add("--repeats", type=at_least(1), default=10, help="questions that are timed, each way")
    about = "other settings of learn.py study, as rank=16"
    add("--study", nargs="*", default=[], metavar="NAME=VALUE", help=about)
    add("--out", default="results/memory.json", help="result file")
    return parser.parse_args()


def learn(action: str, *arguments, memory: Path, args) -> list[str]:
    """The command of an action of learn.py."""
    model = ["--model", args.model, "--device", args.device, "--dtype", args.dtype]
    return [*LEARN, action, *map(str, arguments), "--memory", str(memory), *model]


def fill(memory: Path, passages: list[Passage], args) -> None:
    """A memory of these passages, of which the first one is studied."""
    text = memory.with_suffix(".txt")
    text.write_text(passages[0].text, encoding="utf-8")
    flags = [f"--{setting}" for setting in args.study]
    if subprocess.run(learn("study", text, *flags, memory=memory, args=args)).returncode:
        raise SystemExit("error: learn.py study failed")
    [(name, known)] = Memory(memory).documents.items()
    for p in passages[1:]:
        part = known.passages[0] | {"title": p.title, "text": p.text}
        document = replace(known, name=p.id, title=p.title, passages=[part])
        shutil.copytree(memory / name, memory / p.id)
        write_json(memory / p.id / ABOUT, asdict(document))


def first_word(process, start: float) -> float:
    """Seconds from `start` until the process says something. The rest of the line is read."""
    said = process.stdout.read(1)
    seconds = time.perf_counter() - start
    if not said:
        raise SystemExit("error: learn.py ended without an answer")
    process.stdout.readline()
    return seconds


def chat(questions: list[str], memory: Path, args) -> list[float]:
    """Seconds to the first word of each answer but the first, in one chat."""
    asked, seconds = learn("ask", memory=memory, args=args), []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(asked, **pipes) as process:
        for question in questions:
            start = time.perf_counter()
            process.stdin.write(f"{question}\n".encode())
            seconds.append(first_word(process, start))
    return seconds[1:]


def command(question: str, memory: Path, args) -> float:
    start = time.perf_counter()
    asked = learn("ask", question, memory=memory, args=args)
    with subprocess.Popen(asked, stdout=subprocess.PIPE, bufsize=0) as process:
        return first_word(process, start)


def timed(seconds: list[float]) -> dict:
    all_of_them = [round(s, 3) for s in seconds]
    return {"median": round(statistics.median(seconds), 3), "seconds": all_of_them}


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, "", 0, args.documents)
    if len(passages) < args.documents:
        raise SystemExit(f"error: --documents {args.documents}: {args.data} has {len(passages)}")
    with tempfile.TemporaryDirectory() as folder:
        memory = Path(folder) / "memory"
        fill(memory, passages, args)
        files = [p for p in memory.rglob("*") if p.is_file()]
        result = {"documents": len(passages), "bytes": sum(p.stat().st_size for p in files)}
        asked = [p.questions[0].question for p in passages]
        asked = [asked[n % len(asked)] for n in range(args.repeats + 1)]
        first = {"chat": timed(chat(asked, memory, args))}
        first["command"] = timed([command(q, memory, args) for q in asked[1:]])
        result["first_word"] = first
    head = {"command": command_line(), "model": args.model, "dtype": args.dtype}
    write_json(args.out, head | {"settings": vars(args)} | result)
    told = ", ".join(f"{name} {found['median']:.2f} s" for name, found in first.items())
    print(f"{len(passages)} documents: {result['bytes'] / 1e6:.1f} MB; to the first word: {told}")


if __name__ == "__main__":
    run_main(main)
