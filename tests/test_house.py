"""The house: which rooms there are, that imports only go down, and how the code reads."""

import ast
import re
import sys

import pytest
from conftest import ROOT
from mutants import check_list

# From the ground up. A file imports files that stand before it, and none behind it.
FLOORS = [
    "lm/ranks.py",
    "model.py lora.py",
    "lm/files.py lm/log.py lm/runs.py lm/intervals.py lm/template.py lm/tokenizer.py",
    "lm/packing.py lm/kernels.py lm/grid.py",
    "lm/checkpoint.py lm/adapters.py lm/flags.py lm/memory.py",
    "data/text.py data/qa.py data/documents.py data/arc.py data/prepare.py",
    "seal.py",
    "inner.py lm/outer.py sampler.py selfedit.py quiz.py reward.py arc.py",
    "train_outer.py eval_qa.py eval_arc.py learn.py report.py",
    "experiments/rewards.py experiments/proxy.py experiments/recipes.py experiments/notes.py",
    "experiments/warm.py experiments/chosen.py experiments/figures.py experiments/walkthrough.py",
    "experiments/exercises.py experiments/own_texts.py experiments/noise.py",
    "experiments/tools.py experiments/grid.py experiments/budget.py experiments/ship.py",
    "experiments/credits.py experiments/ranks.py experiments/router.py experiments/distill.py",
    "experiments/stream.py experiments/choice.py experiments/many.py experiments/shown.py",
    "experiments/outer.py",
    "bench/baselines.py bench/scaling.py bench/speed.py bench/gpu.py bench/cost.py",
    "bench/memory.py",
]
ORDER = " ".join(FLOORS).split()
SCRIPTS = {"train_outer", "eval_qa", "eval_arc", "learn", "report", "seal"}


def sources():
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("*.py")) + sorted(
        str(p.relative_to(ROOT))
        for folder in ("lm", "data", "experiments", "bench")
        for p in (ROOT / folder).glob("*.py")
    )


def imported(path: str) -> set:
    """The project's files that a file imports, and the names of the packages that it imports."""
    files, packages = set(), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            file = name.replace(".", "/") + ".py"
            if file in ORDER:
                files.add(file)
            else:
                packages.add(name.split(".")[0])
    return files, packages


def test_these_are_the_rooms():
    assert sorted(ORDER) == sorted(sources())
    top = [path for path in ORDER if "/" not in path]
    assert len(top) <= 14
    assert {"model.py", "lora.py", "selfedit.py", "train_outer.py", "eval_arc.py"} <= set(top)


@pytest.mark.parametrize("path", sources())
def test_imports_go_down(path):
    files, packages = imported(path)
    above = [f for f in files if ORDER.index(f) >= ORDER.index(path) and f != path]
    assert not above, f"{path} imports {above}, which stands above it"
    scripts = {f.removesuffix(".py") for f in files} & SCRIPTS
    assert not scripts, f"{path} imports the script {scripts}"
    own = {"lm", "data", "experiments", "bench", *(p.removesuffix(".py") for p in ORDER)}
    allowed = {"torch", "numpy", "tiktoken", "safetensors", *own, *sys.stdlib_module_names}
    allowed |= {"matplotlib"} if path == "experiments/figures.py" else set()
    allowed |= {"transformers", "peft"} if path == "bench/baselines.py" else set()
    allowed |= {"gguf"} if path == "data/prepare.py" else set()
    assert packages <= allowed


SCRIPTS_BELOW = [p for p in ORDER if p.startswith("experiments/")]
SCRIPTS_BELOW += ["bench/speed.py", "data/prepare.py"]


@pytest.mark.parametrize("path", SCRIPTS_BELOW)
def test_a_script_in_a_folder_finds_the_house(path):
    """`python experiments/x.py` has only experiments/ to import from, until it adds the root."""
    before, found, _ = (ROOT / path).read_text().partition("\nsys.path.insert(")
    names = "|".join({p.removesuffix(".py").split("/")[0] for p in ORDER})
    assert found and not re.search(rf"^(?:import|from) (?:{names})\b", before, re.MULTILINE)


def test_the_model_is_a_textbooks():
    source = (ROOT / "model.py").read_text()
    assert "autograd.Function" not in source
    kernels = [p for p in sources() if "swap_in" in (ROOT / p).read_text()]
    # One call; the others measure what it is worth, or show the code as it runs.
    beside = ["bench/cost.py", "experiments/walkthrough.py"]
    assert sorted(kernels) == sorted([*beside, "lm/flags.py", "lm/kernels.py"])


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("path", sources())
def test_no_comprehension_in_a_comprehension(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, COMPREHENSIONS):
            inside = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS) and n is not node]
            assert not inside, f"{path}:{node.lineno}"


def test_every_fault_can_be_put_into_its_file():
    check_list()


def lines_of(*paths) -> int:
    return sum(len((ROOT / path).read_text().splitlines()) for path in paths)


def test_a_step_is_read_in_an_evening():
    """From the loop to the loss and its gradient: the lesson's files, and the engine's."""
    assert lines_of("seal.py", "model.py", "lora.py") <= 800
    engine = "train_outer.py inner.py lm/packing.py lora.py model.py lm/kernels.py"
    assert lines_of(*engine.split()) <= 1600


def test_columns():
    for path in [*sources(), *(f"tests/{p.name}" for p in (ROOT / "tests").glob("*.py"))]:
        for n, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path}:{n}"


def test_nothing_is_pickled_or_evaluated():
    for path in sources():
        source = (ROOT / path).read_text()
        assert not re.search(
            r"torch\.load\(|import pickle|(?<![\w.])eval\(|(?<![\w.])exec\(", source
        )
