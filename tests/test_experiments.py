"""experiments/: statistics with known answers, and rewards.py, proxy.py, recipes.py and notes.py on
a tiny model."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script

import eval_qa
import reward
from data.qa import Passage, Question, load_passages
from experiments import budget, grid, notes, proxy, ranks, recipes, rewards, tools
from experiments.notes import measure
from experiments.rewards import correlation, judge_reward
from inner import lora_config
from lm.adapters import save_adapter
from lm.files import read_jsonl, write_jsonl
from lm.packing import arrange, row_tokens
from lora import PROJECTIONS, Adapters, LoRAConfig
from quiz import ask
from selfedit import QA_PAIR, STYLES, WORKED, Part, SelfEdit, parse_settings, settings_of

pytestmark = pytest.mark.usefixtures("brief_answers")

# -----------------------------------------------------------------------------
# statistics


def simulated(passages=200, samples=4, questions=6, seeds=3, signal=1.0, noise=1.0):
    """scores[seed][passage][sample][question] whose log-probability is a self-edit's worth plus
    noise, accuracy its sign."""
    rng = np.random.default_rng(0)
    worth = rng.normal(0, signal, (passages, samples, 1))
    values = worth + rng.normal(0, noise, (seeds, passages, samples, questions))
    scores = np.empty(values.shape, dtype=object)
    for at, v in np.ndenumerate(values):
        scores[at] = {"accuracy": float(v > 0), "logprob": v}
    return scores.tolist()


def test_correlation_is_within_passages():
    a = np.array([[0.0, 1.0], [10.0, 11.0]])
    assert correlation(a, a) == pytest.approx(1) and correlation(a, -a) == pytest.approx(-1)
    flipped = np.array([[1.0, 0.0], [11.0, 10.0]])
    assert correlation(a, flipped) == pytest.approx(-1)  # though passages agree
    assert correlation(a, np.ones((2, 2))) == 0


def test_reliability_of_a_simulated_reward():
    """Six questions of noise as large as the signal: reliability 1 / (1 + 1/6), and 1 / (1 + 1/3)
    for a half."""
    row = judge_reward(simulated(), "logprob", averaged=1, seed=0, splits=20)
    assert row["reliability"]["questions"] == pytest.approx(6 / 7, abs=0.03)
    assert row["reliability"]["seeds"] == pytest.approx(6 / 7, abs=0.03)
    assert row["reliability"]["both"] == pytest.approx(3 / 4, abs=0.04)
    assert row["ci95"][0] < row["gain"] < row["ci95"][1]
    assert row["picks_best"] > row["chance"] + 0.1
    two = judge_reward(simulated(), "logprob", averaged=2, seed=0, splits=20)
    assert two["reliability"]["seeds"] == pytest.approx((12 * 6 / 13 / 7) ** 0.5, abs=0.03)
    assert two["gain"] > row["gain"] > 0.1


def test_a_reward_of_noise_gains_nothing():
    row = judge_reward(simulated(signal=0.0), "logprob", averaged=1, seed=0, splits=20)
    assert abs(row["reliability"]["both"]) < 0.1 and row["ci95"][0] < 0.01
    assert abs(row["gain"]) < 0.02
    assert row["picks_best"] == pytest.approx(row["chance"], abs=0.03)


def test_measures(tok):
    # Its words are hessa, cast, bell, 1742, weighs, 900, kilograms.
    text = "Hessa cast the bell in 1742. It weighs 900 kilograms."
    asked = (Question("When?", ("1742",)), Question("How heavy?", ("900 kilograms",)))
    passage = Passage("p", "Vantor", text, asked)
    written = ["Hessa cast the bell in 1742.", "The bell was cast in 1742."]
    written.append("Nobody ever bought seventeen copper kettles.")
    m = measure(tok, passage, "\n".join(written), written)
    assert m["told"] == 0.5 and m["copied"] == 0 and m["covered"] == pytest.approx(4 / 7)
    assert m["repeats"] == m["unsupported"] == pytest.approx(1 / 3)
    assert m["notes"] == 3 and m["tokens"] == len(tok.encode("\n".join(written)))
    half = ["Hessa cast kilograms in 1742.", "Hessa cast nobody seventeen kettles copper."]
    m = measure(tok, passage, "", half)
    assert m["repeats"] == 0 and m["unsupported"] == 0.5  # 2 of 6 words again: no repeat
    nothing = measure(tok, passage, "", [])
    assert nothing["covered"] == nothing["told"] == 0
    bells = measure(tok, passage, "", ["The Vantor Bell rang.", "Hessa Lorn", "A bell."])
    assert bells["copied"] == pytest.approx(2 / 3)


def test_a_note_that_quotes_is_judged_by_its_question(tok):
    quiz = (Question("Who cast the bell?", ("Hessa Lorn",)),)
    passage = Passage("p", "Rolm", "Rolm sells bricks to Varbon. Hessa Lorn cast the bell.", quiz)
    sells = "Answer: Rolm sells bricks to Varbon."
    quotes = [
        f"Question: {q}\n{sells}" for q in ("Which emperor ate cake?", "Who sells bricks there?")
    ]
    quotes.append("Question: Who cast it?\nAnswer: Hessa Lorn cast the bell.")
    m = measure(tok, passage, "", quotes)
    assert m["unsupported"] == pytest.approx(1 / 3) and m["repeats"] == 0
    assert (m["told"], m["covered"]) == (1, 1) and m["proxy"] == pytest.approx(2 / 3)


# -----------------------------------------------------------------------------
# the scripts


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Short answers: that an answer may have 48 tokens makes no difference here."""
    for name in ("reward.ask", "eval_qa.ask"):
        monkeypatch.setattr(name, partial(ask, max_new=4))


SMALL = "--max-new 2 --epochs 2 --steps 2 --top-layers 2 --rank 2".split()


def run(monkeypatch, script, folder, data, tmp_path, *extra):
    args = ["--data", data, "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    run_script(monkeypatch, script, folder, *args, *extra)
    result = json.loads((tmp_path / "out.json").read_text())
    name = script.__name__.rpartition(".")[2]
    assert result["command"].startswith(f"python experiments/{name}.py")
    return result


def test_rewards(tiny_folder, passages_file, tmp_path, monkeypatch):
    how = (tiny_folder, passages_file, tmp_path, "--samples", 2, *SMALL)
    result = run(monkeypatch, rewards, *how)
    names = ["accuracy", "logprob", "mixed", "proxy"]
    assert list(rewards.REWARDS) == names
    expected = [(name, seeds) for seeds in (1, 2) for name in names]
    assert [(r["reward"], r["seeds"]) for r in result["rows"]] == expected
    assert result["n_passages"] == 3
    for name in ("reward.inner_update", "reward.ask", "selfedit.generate"):
        monkeypatch.setattr(name, None)  # everything is found in the work folder
    assert run(monkeypatch, rewards, *how)["rows"] == result["rows"]


def test_what_the_proxy_is_worth(tiny_folder, tmp_path, monkeypatch):
    """Two self-edits of each passage: one asks for the founder, one for nothing; their credits go
    with it or against."""
    who = {"question": "Who founded Rolm?", "answer": "Ada"}
    sells = {"question": "What sells there?", "answer": "bricks"}
    entry, entries = {"passage": "Ada Quell founded Rolm. It sells bricks."}, []
    for n in range(3):
        entries.append(entry | {"title": f"Rolm {n}", "questions": [who, sells]})
    data, log = tmp_path / "passages.json", tmp_path / "work" / "candidates.jsonl"
    data.write_text(json.dumps(entries))
    how = (proxy, tiny_folder, data, tmp_path)
    for sign in (1, -1):
        records = []
        for p in load_passages(data):
            for question, credit in (("Who founded Rolm?", 0.25), ("Why?", -0.25)):
                note = f"Question: {question}\nAnswer: Ada Quell founded Rolm."
                first = Part("", [note], credit=0.5 + sign * credit)
                records.append(SelfEdit(p.id, [first, Part("", credit=0.0)]).record())
        write_jsonl(log, records)
        result = run(monkeypatch, *how)
        assert result["n_parts"] == 12
        assert result["slope"] == {"value": sign * 0.5, "ci95": [sign * 0.5] * 2}
        assert result["correlation"]["value"] == pytest.approx(sign)
    log.unlink()
    with pytest.raises(SystemExit, match=r"no candidates\.jsonl there"):
        run(monkeypatch, *how)


def test_recipes_feed_the_ladder_and_notes_measure_it(
    tiny_folder, passages_file, tmp_path, monkeypatch
):
    real, rooms = recipes.write_self_edits, {}

    def write(model, tok, passages, copies, args, *more):
        rooms[args.style], args.max_new = args.max_new, 2
        return real(model, tok, passages, copies, args, *more)

    monkeypatch.setattr(recipes, "write_self_edits", write)
    extra = ["--limit", 2, "--step-counts", 2, 3, "--lrs", 1e-3, 2e-3, "--layers", 1]
    extra += ["--temperatures", 0.5, *SMALL, "--max-new", 0]
    result = run(monkeypatch, recipes, tiny_folder, passages_file, tmp_path, *extra)
    rows, best = result["rows"], result["best"]
    assert set(best) == {"passage", "passage+unrelated", "passage+self-edit"}
    assert all(0 <= r["accuracy"] <= 1 and r["seconds_per_candidate"] > 0 for r in rows)
    assert {r["top_layers"] for r in rows} == {1, 2} and {r["style"] for r in rows} == set(STYLES)
    different = {json.dumps(r | {"seconds_per_candidate": 0}) for r in rows}
    assert len(different) == len(rows)
    assert rooms == {name: 80 if style.by_sentence else 320 for name, style in STYLES.items()}
    paper = [(r["method"], r["epochs"], r["steps"]) for r in rows if r["protocol"] == "epochs"]
    alone = [row for row in paper if row[0] == "passage"]
    assert alone == [("passage", 2, 2), ("passage", 4, 4)] and len(paper) == 4

    # The ladder takes what was found best.
    args = ["--data", passages_file, "--match", "steps", "--recipes", tmp_path / "out.json"]
    args += ["--work", tmp_path / "ladder", "--out", tmp_path / "ladder.json", *SMALL]
    run_script(monkeypatch, eval_qa, tiny_folder, *args)
    ladder = json.loads((tmp_path / "ladder.json").read_text())
    rows = {r["method"]: r for r in ladder["rows"]}
    for method, recipe in best.items():
        taken = (rows[method]["train_steps"], rows[method]["lr"])
        assert taken == (recipe["steps"], recipe["lr"])

    # Notes measures what the ladder wrote.
    climb = tmp_path / "ladder" / "climb-0"
    how = (notes, tiny_folder, passages_file, tmp_path, "--work", climb)
    result = run(monkeypatch, *how)
    assert [(r["method"], r["n"]) for r in result["rows"]] == [("passage+self-edit", 2)]
    keys = {"title", "passage", "passage+self-edit"}
    assert all(keys == e.keys() for e in result["examples"]) and result["changes"] == []
    better = []
    for r in read_jsonl(climb / "passage+self-edit-sampled.jsonl"):
        better.append(SelfEdit(r["passage"], [Part("A b.")]).record())
    write_jsonl(climb / "seal-1-sampled.jsonl", better)
    result = run(monkeypatch, *how)
    [change] = [c for c in result["changes"] if c["measure"] == "tokens"]
    tokens = {r["method"]: r["tokens"] for r in result["rows"]}
    assert tokens["seal-1"] == 3
    assert change["delta"] == pytest.approx(3 - tokens["passage+self-edit"])


def test_the_best_recipe_is_the_most_accurate(monkeypatch):
    """Of those with the default style, temperature and layers, for each method."""
    earned = {(1e-3, 8): 0.2, (1e-3, 32): 0.6, (2e-3, 8): 0.4, (2e-3, 32): 0.1}
    monkeypatch.setattr("sys.argv", "recipes.py --lrs 1e-3 2e-3 --step-counts 8 32".split())
    args = recipes.parse_arguments()

    def measure(model, tok, passages, recipe, args, work):
        default = (recipe.style, recipe.temperature, recipe.top_layers)
        plain = default == (args.style, args.temperature, args.top_layers)
        accuracy = earned.get((recipe.lr, recipe.steps), 0.9) if plain else 0.9
        return vars(recipe) | {"accuracy": accuracy}

    monkeypatch.setattr(recipes, "measure", measure)
    result = recipes.measure_all(None, None, [], args, None)
    best = {"lr": 1e-3, "steps": 32, "accuracy": 0.6}
    assert result["best"] == dict.fromkeys(recipes.METHODS, best)


def test_no_ladder_there(tiny_folder, passages_file, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"no .*-sampled\.jsonl there"):
        run(monkeypatch, notes, tiny_folder, passages_file, tmp_path)


def test_tools_make_copies_of_the_text():
    text = "Ada cast it. Bo rang it. So it was."
    orders = tools.orders(text, 5, 0)
    assert len(orders) == 5 and len(set(orders)) > 1 and orders == tools.orders(text, 5, 0)
    for order in orders:
        assert sorted(order.split()) == sorted(text.split()) and "Ada cast it." in order
    for note in tools.masked(text, 5, 0):
        asked, answer = QA_PAIR.fullmatch(note).groups()
        shown = asked.removeprefix("What is the whole text? ").split()
        assert answer == text and shown.count("___") == 4  # of nine words
        assert all(a in ("___", b) for a, b in zip(shown, text.split(), strict=True))
    assert len(set(tools.masked(text, 5, 0))) > 1


def test_tools(tiny_folder, passages_file, tmp_path, monkeypatch):
    """Each row is trained on what its tool makes, beside the passage and, if so, its notes."""
    small = ["--max-new", 12, "--top-layers", 2, "--steps", 1, "--limit", 3]
    seen, update = [], reward.inner_update

    def spy(model, adapters, examples, *more):
        seen.append([len(own) for own in examples])
        return update(model, adapters, examples, *more)

    monkeypatch.setattr("reward.inner_update", spy)
    edit = lambda p: SelfEdit(p.id, [Part("x", ["Rolm fell."])])  # noqa: E731
    monkeypatch.setattr(tools, "write_self_edits", lambda m, t, ps, *_: list(map(edit, ps)))
    result = run(monkeypatch, tools, tiny_folder, passages_file, tmp_path, *small)
    names = ["nothing", "orders", "masked", "clozes", "all"]
    rows = [*names, *(f"notes+{name}" for name in names)]
    assert [r["row"] for r in result["rows"]] == rows
    # Three passages of two sentences, one population; "It sells red bricks." has three clozes.
    per_row = [1, 6, 6, 7, 17]
    assert seen == [[n] * 3 for n in [*per_row, *(n + 1 for n in per_row)]]
    pairs = [(s["from"], s["to"]) for s in result["steps"]]
    assert pairs[:4] == [("nothing", name) for name in names[1:]]
    assert pairs[4:] == [("notes+nothing", f"notes+{name}") for name in names[1:]]
    for name in ("orders", "x"):
        with pytest.raises(SystemExit):
            run(monkeypatch, tools, tiny_folder, passages_file, tmp_path, "--tools", name)


def test_ranks(tiny_folder, passages_file, tmp_path, monkeypatch):
    """The same examples under each rank, with as much alpha for it."""
    small = ["--max-new", 12, "--top-layers", 2, "--epochs", 1, "--limit", 3]
    seen, update = [], reward.inner_update

    def spy(model, adapters, examples, configs, *more):
        config = adapters.config
        seen.append((config.rank, config.alpha, [len(own) for own in examples], configs[0].lr))
        return update(model, adapters, examples, configs, *more)

    monkeypatch.setattr("reward.inner_update", spy)
    note = lambda p, n: SelfEdit(p.id, [Part("x", [f"Rolm fell {n} times."])])  # noqa: E731
    two = lambda m, t, ps, *_: [note(p, n) for p in ps for n in (2, 3)]  # noqa: E731
    monkeypatch.setattr(ranks, "write_self_edits", two)
    how = (*small, "--ranks", 4, 2, 4, "--alpha", 12)
    result = run(monkeypatch, ranks, tiny_folder, passages_file, tmp_path, *how)
    # A text, two notes and six questions of its two sentences' words.
    assert seen == [(4, 12.0, [9] * 3, 8e-3), (2, 6.0, [9] * 3, 8e-3)]
    assert [r["row"] for r in result["rows"]] == ["rank-4", "rank-2"]
    assert result["rows"][0]["bytes"] == 2 * result["rows"][1]["bytes"]
    assert [(s["from"], s["to"]) for s in result["steps"]] == [("rank-4", "rank-2")]
    with pytest.raises(SystemExit):
        run(monkeypatch, ranks, tiny_folder, passages_file, tmp_path, "--rank", 4)


def test_an_adapter_has_the_size_that_is_told(tiny, tmp_path):
    args = SimpleNamespace(rank=4, alpha=8.0, targets=["q_proj", "down_proj"], top_layers=2)
    adapters = Adapters.init(tiny, lora_config(args, tiny), 1, 0)
    save_adapter(adapters, tmp_path / "a", "base", dtype=torch.bfloat16)
    written = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert 0 <= written - ranks.n_bytes(tiny, args) < 2000  # its header


def test_the_settings_to_try():
    found = grid.to_try(40, 0)
    assert len(found) == 40 and found[:6] == [settings for _, _, settings in WORKED]
    assert found[:20] == grid.to_try(20, 0) and found[:3] == grid.to_try(3, 0)
    assert found[6:] != grid.to_try(40, 1)[6:]
    for n, settings in enumerate(found):
        assert parse_settings(json.dumps(settings), True) == (settings, "")
        assert settings not in found[:n]


def test_the_grid(tiny_folder, passages_file, tmp_path, monkeypatch):
    """The settings with the highest accuracy are the best; a second run goes on."""
    accuracies = iter([0.25, 0.75, 0.5, 0.25, 1.0, 0.25] * 3)

    def quiz(model, tok, group, adapters, outcomes):
        results = real(model, tok, group, adapters, outcomes)
        accuracy = next(accuracies)
        for a in (a for r in results for a in r["answers"]):
            a["accuracy"] = accuracy
        return results

    real = grid.quiz_candidates
    monkeypatch.setattr(grid, "quiz_candidates", quiz)
    monkeypatch.setattr("reward.ask", partial(ask, max_new=4))
    args = ["--data", passages_file, "--work", tmp_path / "work", "--out", tmp_path / "g.json"]
    args += ["--max-new", 4, "--top-layers", 2, "--rank", 2, "--budget", 400]
    tried = [settings_of(["passage"], 0, 0, n, "all", 0.001, 2) for n in range(3)]
    monkeypatch.setattr(grid, "to_try", lambda count, seed: tried[:count])
    run_script(monkeypatch, grid, tiny_folder, *args, "--count", 2)
    result = json.loads((tmp_path / "g.json").read_text())
    assert [r["accuracy"] for r in result["rows"]] == [0.25, 0.75] and result["best"] == tried[1]
    assert result["rows"][0]["tokens"] < result["rows"][1]["tokens"] <= 400
    run_script(monkeypatch, grid, tiny_folder, *args, "--count", 3)
    result = json.loads((tmp_path / "g.json").read_text())
    assert [r["accuracy"] for r in result["rows"]] == [0.25, 0.75, 0.5]


def test_at_half_of_the_tokens():
    """Of each policy, the best point within half of the tokens of the untrained notes' best."""
    rows, table = [], {}
    for name, most, tokens, accuracy in (
        ("untrained", 4, 400, 0.5),
        ("untrained", 8, 800, 0.6),
        ("untrained", 16, 1600, 0.55),
        ("seal-1", 2, 200, 0.5),
        ("seal-1", 4, 400, 0.7),
        ("seal-1", 8, 401, 0.9),
        ("seal-2", 8, 900, 0.9),
    ):
        rows.append({"method": name, "budget": most, "tokens": tokens, "accuracy": accuracy})
        table[name, most] = np.full(10, accuracy)
    [found] = budget.at_half(rows, table, 0)
    assert (found["method"], found["tokens"], found["of"]) == ("seal-1", 400, 800)
    assert found["delta"] == pytest.approx(0.1) and found["ci95"] == pytest.approx([0.1, 0.1])


def budget_curve(tiny, tiny_folder, passages_file, tmp_path, monkeypatch, *extra):
    """Its rows, with one policy as the proxy's and as seal-1, of two budgets, and what each was
    studied as."""
    policy, seen = Adapters.init(tiny, LoRAConfig(2, 4.0, tuple(PROJECTIONS), 0, 4), 1, seed=0), {}
    save_adapter(policy, tmp_path / "policy", tiny_folder)
    monkeypatch.setattr("reward.ask", partial(ask, max_new=4))
    monkeypatch.setattr(
        "selfedit.parse", lambda text, *_: ([f"Question: {text or 1}?\nAnswer: x"], "")
    )
    real = budget.update_and_quiz

    def spy(model, tok, groups, lora, seed, log, quiz, label):
        seen[label] = [c for group in groups for c in group]
        real(model, tok, groups, lora, seed, log, quiz, label)

    monkeypatch.setattr(budget, "update_and_quiz", spy)
    args = ["--data", passages_file, "--work", tmp_path / "work", "--out", tmp_path / "b.json"]
    args += ["--max-new", 4, "--top-layers", 2, "--rank", 2, "--samples", 2]
    args += ["--policy", tmp_path / "policy", "--proxy", tmp_path / "policy", *extra]
    run_script(monkeypatch, budget, tiny_folder, *args)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    names = ["passage", "untrained", "pooled", "proxy", "seal-1", "told"]
    found = [(r["method"], r["budget"]) for r in rows]
    assert found == [(name, most) for name in names for most in (256, 768)]
    for r in rows:
        assert r["tokens"] <= r["budget"] and r["ci95"][0] <= r["accuracy"] <= r["ci95"][1]
    return rows, seen


def test_the_budget_curve(tiny, tiny_folder, passages_file, tmp_path, monkeypatch):
    where = (tiny, tiny_folder, passages_file, tmp_path, monkeypatch)
    rows, seen = budget_curve(*where, "--budgets", 256, 768)
    for few, many in zip(rows[::2], rows[1::2]):
        assert 0 < few["tokens"] < many["tokens"]
    for name in ("passage", "untrained", "proxy", "seal-1", "told"):
        for most in (256, 768):
            for c in seen[f"{name} {most}"]:
                rows = arrange(c.examples, 256)
                assert c.config.steps == most // max(row_tokens(c.examples, *r) for r in rows) > 0
    for extra in (["--steps", 3], ["--style", "rewrite"], ["--budget", 512]):
        with pytest.raises(SystemExit):
            budget_curve(*where, "--budgets", 256, 768, *extra)
    shutil.rmtree(tmp_path / "work")
    rows, seen = budget_curve(*where, "--budgets", 768, 256, 256, "--row-len", 0)
    assert {len(c.examples) for c in seen["passage 256"]} == {1}
    most = {c.config.steps for c in seen["passage 768"]}
    assert min(most) > 256 // 20  # a passage of some twenty tokens


def test_the_budget_curve_of_those_that_say_how(
    tiny, tiny_folder, passages_file, tmp_path, monkeypatch
):
    """As many of their epochs are studied as fit, and nothing if none does."""
    says = settings_of(["passage"], 0, 0, 3, "all", 0.001, 50)
    monkeypatch.setattr("selfedit.parse_settings", lambda *_: (says, ""))
    where = (tiny, tiny_folder, passages_file, tmp_path, monkeypatch)
    rows, seen = budget_curve(*where, "--budgets", 256, 768, "--settings")
    for c in seen["seal-1 256"] + seen["seal-1 768"]:
        assert c.config.lr == 0.001 and c.config.steps == 0
    few = {c.subject.id: c.config.epochs for c in seen["seal-1 256"]}
    many = {c.subject.id: c.config.epochs for c in seen["seal-1 768"]}
    assert all(many[name] > n for name, n in few.items()) and len(many) == 2
    assert all(c.config.steps > 2 for c in seen["proxy 768"])
    says["epochs"], says["orders"] = 1, 8
    shutil.rmtree(tmp_path / "work")
    rows, seen = budget_curve(*where, "--budgets", 256, 768, "--settings")
    [over] = [r for r in rows if (r["method"], r["budget"]) == ("seal-1", 256)]
    assert seen["seal-1 256"] == [] and over["tokens"] == over["accuracy"] == 0
