"""A planted fault whose text is gone from the library is noticed at once, not at the next `make mutants`."""

import pytest
from mutants import FAULTS, ROOT


@pytest.mark.parametrize('name', FAULTS)
def test_the_text_of_a_fault_stands_once_in_its_module(name):
    module, text, other, file, _ = FAULTS[name]
    assert (ROOT / 'draem_nb' / f'{module}.py').read_text().count(text) == 1 and text != other
    assert (ROOT / 'tests' / f'{file}.py').exists()
