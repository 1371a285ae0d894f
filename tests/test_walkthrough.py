"""docs/WALKTHROUGH.md is what experiments/walkthrough.py writes."""

import re

import pytest
from conftest import ROOT

from experiments import walkthrough

NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


@pytest.mark.slow
def test_the_walkthrough_is_what_the_code_does():
    """Losses are compared with a tolerance: processors round sums differently."""
    committed = (ROOT / "docs" / "WALKTHROUGH.md").read_text()
    written = walkthrough.build()
    assert NUMBER.sub("#", committed) == NUMBER.sub("#", written)
    both = list(zip(NUMBER.findall(committed), NUMBER.findall(written)))
    assert len(both) > 20 and all(abs(float(a) - float(b)) <= 0.05 for a, b in both)
