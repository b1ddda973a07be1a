"A few of the kills of `make torture` (tests/torture.py), on one command."
import mmap
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import torture
from torture import Maker, kills, shared_memory


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='processes are found by /proc')
def test_a_command_that_is_killed_thrice_ends_as_if_undisturbed():
    with tempfile.TemporaryDirectory() as root:         # a short path: sockets lie below it, of at most 107 characters
        assert kills(Maker(Path(root)), ['calibrate'], 3, seed=1) == []


@pytest.mark.skipif(not Path('/dev/shm').is_dir(), reason='there is no /dev/shm')
def test_shared_memory_that_is_left_behind_is_a_fault(tmp_path, monkeypatch):
    segment = Path('/dev/shm') / f'draem_nb-test-{os.getpid()}'
    def torment(job, seconds, rng, most, counts) -> list[str]:          # three kills that leave a segment
        counts[job.name, 'SIGKILL'] += 3
        segment.write_bytes(bytes(4096))
        return []
    monkeypatch.setattr(torture, 'torment', torment)
    monkeypatch.setattr(torture.Job, 'start', lambda job: SimpleNamespace(wait=lambda: 0))
    (tmp_path / 'x').mkdir()
    maker = SimpleNamespace(job=lambda name: torture.Job(name, tmp_path / name, [], []))
    try:
        assert kills(maker, ['x'], 3, seed=1) == [f"shared memory was left behind: ['{segment.name}']"]
        with open(segment, 'r+b') as file, mmap.mmap(file.fileno(), 4096): assert segment.name not in shared_memory()
    finally: segment.unlink(missing_ok=True)
