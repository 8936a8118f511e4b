"""README.md's table of what is fused says what runs: each cell, on a tiny model beside plain PEFT."""

import itertools

import pytest
import transformers
from supported import COLUMNS, README, ROWS, cell_of, read, table
from test_sharding import CELLS

pytestmark = [
    pytest.mark.usefixtures("one_thread", "compiling"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT's forward, which is what some cells say
]


@pytest.mark.one_case_in(3)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_a_cell(row, column):
    if "experts" in row and transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 says nothing of the layout of experts")
    assert read(README.read_text())[row, column] == cell_of(row, column), "run python tests/supported.py"


def test_every_cell_is_seen_by_a_test():
    seen = {*itertools.product(ROWS, COLUMNS), *CELLS}
    cells = read(README.read_text())
    assert {place for place, cell in cells.items() if cell} == seen
    assert read(f"<!-- supported -->\n{table(cells)}\n<!-- /supported -->") == cells
