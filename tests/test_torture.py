"A few of the kills of `make torture` (tests/torture.py), on one command."
import tempfile
from pathlib import Path

import pytest

from torture import Maker, kills


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='processes are found by /proc')
def test_a_command_that_is_killed_thrice_ends_as_if_undisturbed():
    with tempfile.TemporaryDirectory() as root:         # a short path: sockets lie below it, of at most 107 characters
        assert kills(Maker(Path(root)), ['calibrate'], 3, seed=1) == []
