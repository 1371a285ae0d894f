"""A page of what a run did: its rounds, its ladder, the self-edits and what they earned.

    python report.py runs/demo                       # writes runs/demo/report.html
    python report.py runs/demo --out demo.html

It reads what train_outer.py wrote to the run folder, and what eval_qa.py --run or eval_arc.py --run
added to it; no model is loaded. The page is one file without scripts: open it in any browser.

    The run, Rounds    settings, and a line for each round
    The ladder         each row with its 95 % interval, and the step from the row above
    Held-out passages  notes before and after RL with what they earned, and every answer
    Held-out tasks     (ARC) demonstrations, truth, predictions, the settings asked for
    Training           the self-edits of the last round: what was reinforced, and why
"""

import re
from html import escape  # everything that passages and models say goes through it
from pathlib import Path

from data.arc import load_tasks
from data.qa import load_passages
from lm.files import read_json, read_jsonl, run_main, write_atomic
from lm.flags import Parser
from lm.intervals import written_steps
from lm.runs import read_settings

OPEN = 3  # passages, or tasks, of a section that are not folded away

# -----------------------------------------------------------------------------
# pieces: functions that return HTML


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%"


def mark(good: bool, text: str) -> str:
    """Green with a tick or red with a cross: never by colour alone."""
    return f'<span class="{"right" if good else "wrong"}">{"✓" if good else "✗"} {text}</span>'


def line(cells, tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n"


def folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n{body}</details>\n"


def first_open(items: list[str]) -> str:
    rest = folded(f"{len(items) - OPEN} more", "".join(items[OPEN:])) if items[OPEN:] else ""
    return "".join(items[:OPEN]) + rest


def group(title: str, earned: str, texts: list[str]) -> str:
    """Notes under what they are about, with what they earned."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts) or "<li>no note</li>"
    return f'<p class="about">{escape(title)} <b>{earned}</b></p><ul>{items}</ul>\n'


# -----------------------------------------------------------------------------
# the run

COLUMNS = {"round": "d", "total": "d", "kept": "d", "kept_parts": "d"}  # fields and their formats
COLUMNS |= {"reward_mean": ".3f", "reward_kept": ".3f", "accuracy_mean": ".3f", "notes_mean": ".1f"}
COLUMNS |= {"outer_loss": ".3f", "seconds": ".0f"}


def about(settings: dict) -> str:
    facts = ""
    for key in ("domain", "model", "seed", "samples", "reward", "select"):
        facts += f"<div><dt>{key}</dt><dd>{escape(str(settings[key]))}</dd></div>"
    every = "\n".join(f"{key} = {value}" for key, value in settings.items())
    return f"<dl>{facts}</dl>\n" + folded("All settings", f"<pre>{escape(every)}</pre>")


def rounds(metrics: list[dict]) -> str:
    body = ""
    for m in metrics:
        flaws = ", ".join(f"{n} {escape(flaw)}" for flaw, n in m["flaws"].items())
        body += line([*(number(m[key], form) for key, form in COLUMNS.items()), flaws or "none"])
    head = line([key.replace("_", " ") for key in (*COLUMNS, "flaws")], "th")
    box = '<div class="scroll" role="region" aria-label="Rounds" tabindex="0">'
    return f"{box}<table>{head}{body}</table></div>\n"


# -----------------------------------------------------------------------------
# the ladder


def ladder(result: dict) -> str:
    score, of = ("solved", "tasks") if "tasks" in result else ("quiz accuracy", "passages")
    deltas, others = written_steps(result["rows"], result["steps"])
    body = "".join(rung(r, deltas.get(r["method"], "")) for r in result["rows"])
    head = line(["row", "", score, "step from the row above, points"], "th")
    text = f"<p>{result[f'n_{of}']} held-out {of}. "
    text += "In brackets, and as a whisker: the 95&nbsp;% interval.</p>\n"
    text += f'<table class="ladder">{head}{body}</table>\n'
    gap = result.get("gap_closed") or {"share": None}
    if gap["share"] is not None:
        low, high = map(percent, gap["ci95"])
        text += f"<p>{escape(gap['by'])} goes {percent(gap['share'])} [{low}, {high}] of the way "
        text += "from passage to in-context.</p>\n"
    items = ""
    for (a, b), step in others.items():
        items += f"<li>{escape(a)} to {escape(b)}: {step.strip()}</li>"
    return text + (folded("Other steps, in points", f"<ul>{items}</ul>") if items else "")


def rung(r: dict, step: str) -> str:
    value, (low, high) = r["accuracy"] if "accuracy" in r else r["rate"], r["ci95"]
    kind = "seal" if r["method"].startswith("seal") else ""
    more = [f"{r['solved']:.1f} of {r['n']}"] if "solved" in r else []
    more += [f"{percent(r[key])} {key}" for key in ("sound", "copied") if key in r]
    bar = f'<i style="width:{100 * value:.2f}%"></i>'
    bar += f'<b style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></b>'
    return (
        f'<tr class="{kind}"><th>{escape(r["method"])}<small>{", ".join(more)}</small></th>'
        f'<td class="bar"><div>{bar}</div></td>'
        f"<td>{percent(value)} <small>[{100 * low:.1f}, {100 * high:.1f}]</small></td>"
        f"<td>{step.strip()}</td></tr>\n"
    )


# -----------------------------------------------------------------------------
# held-out passages


def first_records(records: list[dict], key: str) -> dict:
    """{id: {method: its first record}}."""
    found = {}
    for r in records:
        found.setdefault(r[key], {}).setdefault(r["method"], r)
    return found


def passages(records: list[dict]) -> str:
    found = first_records(records, "passage")
    text = "<p>✓ right, ✗ wrong. When the quiz is asked, the passage is not in the prompt. "
    text += "Of several self-edits on a passage the first is shown.</p>\n"
    return text + first_open([passage(by_method) for by_method in found.values()])


def passage(by_method: dict) -> str:
    seal = [m for m in by_method if m.startswith("seal-")][-1:]
    rows = ["base", "passage", "passage+self-edit", *seal]
    records = [by_method[m] for m in rows if m in by_method]
    columns = ""
    for title, names in (("Notes before RL", rows[2:3]), ("Notes after RL", seal)):
        columns += "".join(notes(title, by_method[m]) for m in names if m in by_method)
    return (
        f"<article><h3>{escape(records[0]['title'])}</h3>\n"
        f"<blockquote>{escape(records[0]['text'])}</blockquote>\n"
        f'<div class="columns">{columns}</div>\n{quiz(records)}</article>\n'
    )


def question_and_answer(note: str) -> tuple[str, str]:
    """Of a note of the style "questions", whose answer is a sentence; (note, "") of another one."""
    found = re.fullmatch(r"Question: (.*)\nAnswer: (.*)", note)
    return found.groups() if found else (note, "")


def notes(title: str, record: dict) -> str:
    """Questions stand under the sentence that answers them, with the accuracy of the quiz's
    questions about it; other notes with that of the whole quiz."""
    credits, asked = dict(record["sentences"]), [question_and_answer(n) for n in record["notes"]]
    others = [n for n, (_, answer) in zip(record["notes"], asked) if answer not in credits]
    questions = {}
    for question, answer in asked:
        questions.setdefault(answer, []).append(question)
    text = f"<section><h4>{title}</h4><p>{escape(record['method'])}: {len(asked)} notes</p>\n"
    for sentence, credit in credits.items() if len(others) < len(asked) else ():
        earned = "not asked" if credit is None else f"earned {percent(credit)}"
        text += group(sentence, earned, questions.get(sentence, []))
    if others:
        scores = [a["accuracy"] for a in record["answers"]]
        text += group("All together", f"earned {percent(sum(scores) / len(scores))}", others)
    return text + "</section>\n"


def quiz(records: list[dict]) -> str:
    head = ["question"]
    for r in records:
        right = [a["accuracy"] == 1 for a in r["answers"]]
        head.append(f"{escape(r['method'])}<small>{sum(right)} of {len(right)} right</small>")
    body = ""
    for answers in zip(*(r["answers"] for r in records)):
        accepted = escape(" / ".join(answers[0]["accepted"]))
        body += f"<tr><th>{escape(answers[0]['question'])}<small>accepted: {accepted}</small></th>"
        for r, a in zip(records, answers):
            given = escape(a["answer"].strip()) or "(nothing)"
            name = escape(r["method"][:40])
            body += f'<td data-row="{name}">{mark(a["accuracy"] == 1, given)}</td>'
        body += "</tr>\n"
    return f'<h4>Quiz</h4><table class="quiz">{line(head, "th")}{body}</table>\n'


# -----------------------------------------------------------------------------
# held-out ARC tasks

COLOURS = "000000 0074D9 FF4136 2ECC40 FFDC00 AAAAAA F012BE FF851B 7FDBFF 870C25".split()


def tasks(result: dict) -> str:
    found, data = first_records(result["tasks"], "id"), result["settings"]["data"]
    if not Path(data).exists():
        return f"<p>{escape(data)} is not there, so that the tasks cannot be shown.</p>\n"
    solved = {}  # (task, method) -> was each attempt right?
    for r in result["tasks"]:
        solved.setdefault((r["id"], r["method"]), []).append(r["solved"] == 1)
    items = []
    for task in load_tasks(data, ids=list(found)):
        text = f"<article><h3>Task {escape(task.id)}</h3>\n<h4>Demonstrations</h4>"
        text += pairs(task.train, "output") + "<h4>Test</h4>" + pairs(task.test, "truth")
        text += '<h4>Predictions</h4><div class="columns">'
        for method, r in found[task.id].items():
            text += attempt(r, len(task.test), solved[task.id, method])
        items.append(text + "</div></article>\n")
    return "<p>✓ solved, ✗ not solved, at the first attempt.</p>\n" + first_open(items)


def pairs(of_task: tuple, name: str) -> str:
    each = [f"<div>{grid(a, 'input')}{grid(b, name)}</div>" for a, b in of_task]
    return f'<div class="grids">{"".join(each)}</div>\n'


def attempt(r: dict, n_tests: int, solved: list[bool]) -> str:
    told = "solved" if r["solved"] == 1 else f"not solved, {percent(r['cells'])} of the cells right"
    told = mark(r["solved"] == 1, told)
    if len(solved) > 1:
        told += f"; {sum(solved)} of {len(solved)} attempts solve it"
    text = f'<section class="card"><h5>{escape(r["method"])}</h5><p>{told}</p><div class="grids">'
    for said in r["prediction"] or [r["flaw"]] * n_tests:
        said = said[:1000]  # the largest grid has 929
        rows = said.strip("\n").split("\n")
        is_grid = re.fullmatch(r"[0-9\n]+", said) and len(set(map(len, rows))) == 1
        told = escape(said) or "no prediction"
        text += grid(rows, "prediction") if is_grid else f"<p>{told}</p>"
    told = asked_for(r["config"] or {}, r["flaw"])
    return f"{text}</div><p><small>{told}</small></p></section>\n"


def asked_for(config: dict, flaw: str) -> str:
    """The settings of a self-edit on a puzzle, in words."""
    if not config:
        return f"no settings: {escape(flaw)}" if flaw else "nothing is trained"
    data = [g.removeprefix("use_").removesuffix("_augmentations") for g in config["groups"]]
    counted = "all tokens" if config["every_token"] else "output tokens"
    text = f"augmentations: {', '.join(data) or 'none'}; loss on {counted}; "
    text += f"learning rate {config['lr']:g}; epochs {config['epochs']}" + f"; {flaw}" * bool(flaw)
    return escape(text)


def grid(rows, name: str) -> str:
    """Coloured squares with thin lines between them, so that they can be counted."""
    high, wide, cells = len(rows), len(rows[0]), ""
    for y, row in enumerate(rows):
        for x, colour in enumerate(row):
            cells += f'<rect x="{x}" y="{y}" width="1" height="1" class="c{colour}"/>'
    box = f"-.05 -.05 {wide + 0.1:.1f} {high + 0.1:.1f}"
    side = max(10, min(20, 200 // max(high, wide)))
    return (
        f"<figure><figcaption>{name} {high}×{wide}</figcaption><svg role='img' "
        f"aria-label='{name}' viewBox='{box}' width='{side * wide}'>{cells}</svg></figure>"
    )


# -----------------------------------------------------------------------------
# training


def training(edits: list[dict], run: Path, known: dict) -> str:
    """Self-edits by passage; known = {id: Passage}, as far as the data file is there."""
    cards = {}
    for e in edits:
        if any(isinstance(part, str) for part in e["parts"]):
            raise SystemExit(f"error: {run} was written by an older version; train it anew")
        cards.setdefault(e["passage"], []).append(self_edit(e))
    items = []
    for name, of_passage in cards.items():
        title, text = (known[name].title, known[name].text) if name in known else (name, "")
        text = f"<p>{escape(text)}</p>\n" * bool(text)
        text = f"<article><h3>{escape(title)}</h3>\n{text}"
        items.append(f'{text}<div class="columns">{"".join(of_passage)}</div></article>\n')
    return first_open(items)


def self_edit(e: dict) -> str:
    kept = any(part["kept"] for part in e["parts"])
    text = f'<section class="card"><h4>Self-edit, reward {e["reward"]:.2f}</h4>'
    text += f"<p>{mark(kept, 'reinforced' if kept else 'not reinforced')}: {escape(e['why'])}</p>\n"
    if e["style"] == "settings":
        text += f"<p>{asked_for(e['config'], e['flaw'])}</p>\n"
    parts = [] if e["style"] == "settings" and e["config"] else e["parts"]
    parts = [part for part in parts if part["text"] or part["flaw"]]  # others were not asked for
    return text + "".join(map(part_of, parts)) + "</section>\n"


def part_of(part: dict) -> str:
    earned = mark(part["kept"], "reinforced" if part["kept"] else "not reinforced")
    earned += f", {escape(part['flaw'])}" if part["flaw"] else ""
    earned += ", no credit" if part["credit"] is None else f", credit {part['credit']:.2f}"
    closest, found = {q: max(values) for q, values in part["note_credits"].items()}, {}
    for question, sentence in map(question_and_answer, part["notes"]):
        told = f" ({closest[question]:.2f})" if question in closest else ""
        found.setdefault(sentence or "Notes", []).append(question + told)
    found = found or {"As sampled": [part["text"]]}
    return "".join(group(title, earned, texts) for title, texts in found.items())


# -----------------------------------------------------------------------------
# the page

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #22262b; --soft: #5d646d;
  --line: #dcdad5; --right: #17692f; --wrong: #b3261e; --bar: #0072b2; --seal: #d55e00;
  --link: #0b5a92 }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --card: #1f2226; --ink: #e4e6e9;
  --soft: #a2a9b2; --line: #383c42; --right: #6fcf87; --wrong: #ff9a91; --bar: #4aa3d8;
  --seal: #f08a3c; --link: #8cc4ee } }
* { box-sizing: border-box }
body { margin: auto; max-width: 72rem; padding: 0 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere }
h1 { font-size: 1.7rem } h2 { margin: 2.5rem 0 .5rem } h3 { margin: 0 }
h4 { margin: 1.2rem 0 .3rem } h5, .card h4 { font-size: 1rem; margin: 0 }
p, ul, dl { margin: .4rem 0 } ul { padding-left: 1.2rem } li, pre { white-space: pre-wrap }
p, li, blockquote { max-width: 44rem } blockquote { margin: .5rem 0 } dd, figure { margin: 0 }
small, dt, figcaption { font-size: .85rem; font-weight: normal; color: var(--soft) }
nav a { margin-right: 1rem } a, summary { color: var(--link) }
summary { cursor: pointer; padding: .3rem 0 }
article, .card { border: 1px solid var(--line); border-radius: 8px; padding: 1rem }
article { background: var(--card); margin: 1rem 0 }
.card { background: var(--page); padding: .8rem }
.columns { display: grid; gap: 1rem 1.5rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)) }
dl, .grids, .grids div { display: flex; flex-wrap: wrap; gap: .5rem 2rem }
.grids div { gap: .7rem }
.about { color: var(--soft); margin: .8rem 0 0 } .about + ul { margin: 0 }
.about b { color: var(--ink) } .right { color: var(--right) } .wrong { color: var(--wrong) }
table { border-collapse: collapse; width: 100% }
th, td { padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top }
tr:first-child th { vertical-align: bottom; font-size: .9rem } th small { display: block }
.scroll { overflow-x: auto } .scroll :is(th, td) { text-align: right; overflow-wrap: normal }
.scroll :is(th, td):last-child { text-align: left; padding-left: 1rem; min-width: 13rem }
.ladder td { white-space: nowrap } .bar { width: 40% }
.bar div { position: relative; height: 1.4rem; background: var(--line) }
.bar i { position: absolute; height: 100%; background: var(--bar) }
.seal .bar i { background: var(--seal) }
.bar b { position: absolute; top: .45rem; height: .5rem; border: solid var(--ink);
  border-width: 0 2px }
.bar b::after { content: ""; position: absolute; width: 100%; top: .2rem;
  border-top: 2px solid var(--ink) }
.quiz { table-layout: fixed } .quiz th:first-child { width: 32% }
svg { display: block; max-width: 100%; height: auto } rect { stroke: #777; stroke-width: .07 }
@media (max-width: 45rem) {
  :is(.ladder, .quiz) tr:first-child { display: none }
  :is(.ladder, .quiz) tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line) }
  :is(.ladder, .quiz) :is(th, td) { display: block; border: 0; padding: .1rem 0 }
  .bar, .quiz th:first-child { width: 100% }
  .ladder td:last-child:not(:empty)::before { content: "step " }
  .quiz td::before { content: attr(data-row) " "; color: var(--soft) } }
""" + "".join(f".c{n} {{ fill: #{colour} }}\n" for n, colour in enumerate(COLOURS))


def sections(run: Path):
    """(title, HTML), one after the other."""
    if not (run / "settings.json").is_file():
        raise SystemExit(f"error: {run} is no run folder: there is no settings.json")
    settings = read_settings(run)
    metrics = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    if not metrics:
        raise SystemExit(f"error: {run} has no finished round yet")
    yield "The run", made_of(run / "settings.json", about, settings)
    yield "Rounds", made_of(run / "metrics.jsonl", rounds, metrics)

    command = f"python eval_{settings['domain']}.py --run {run}"
    found = sorted(run.glob("ladder*.json"))  # --match both writes two
    for file in found:
        yield "The ladder", made_of(file, ladder, read_json(file))
    if not found:
        yield "The ladder", f"<p>Not there yet: <code>{escape(command)}</code> adds it.</p>\n"
    elif settings["domain"] == "arc":
        yield "Held-out tasks", made_of(file, tasks, read_json(file))
    elif (answers := run / "ladder/answers.jsonl").is_file():
        yield "Held-out passages", made_of(answers, passages, read_jsonl(answers))

    data, known = Path(str(settings.get("data"))), {}
    if settings["domain"] == "qa" and data.is_file():
        known = {p.id: p for p in load_passages(data)}
    file = run / f"round-{len(metrics)}/candidates.jsonl"
    yield f"Training, round {len(metrics)}", made_of(file, training, read_jsonl(file), run, known)


def made_of(path: Path, make, *args) -> str:
    """make(*args), which shows what stands in the file at `path`. Exits with one line that names it
    if a field is missing, or holds something else than it should."""
    try:
        return make(*args)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as e:
        why = f"{e} is missing" if isinstance(e, KeyError) else f"a field holds something else: {e}"
        raise SystemExit(f"error: {path}: {why}") from e


def page(run: Path) -> str:
    title, links, body = f"SEAL run {escape(run.resolve().name)}", "", ""
    for n, (name, text) in enumerate(sections(run)):
        links += f'<a href="#part-{n}">{name}</a> '
        body += f'<section id="part-{n}"><h2>{name}</h2>\n{text}</section>\n'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{title}</h1>\n<p>A language model writes self-edits, learns from them, "
        "and is rewarded for what it then knows.</p>\n"
        f"<nav>{links}</nav></header>\n<main>{body}</main></body></html>\n"
    )


def parse_arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("run", help="folder of a train_outer.py run")
    parser.add_argument("--out", help="the page; without it RUN/report.html")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out, text = Path(args.out or f"{args.run}/report.html"), page(Path(args.run))
    write_atomic(out, lambda p: p.write_text(text, encoding="utf-8", errors="replace"))
    print(f"{out} ({len(text) / 1000:.0f} kB)")


if __name__ == "__main__":
    run_main(main)
