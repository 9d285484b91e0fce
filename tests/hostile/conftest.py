"""Hostile inputs. `make hostile` tries all of them (HOSTILE=full) and prints a table; `make test` a reduced set.

A test takes the fixture `tally` and calls `tally.held(name, fault)` for every case: `fault` is empty or says what
went wrong. The test fails at its end if a case did."""
import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

FULL = os.environ.get('HOSTILE') == 'full'
TRIED, HELD = Counter(), Counter()


def snapshot(folder):
    "Relative path -> what is there: the kind, and the hash of a file's bytes."
    def what(p):
        if p.is_symlink(): return f'link to {os.readlink(p)}'
        if p.is_dir(): return 'folder'
        return hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else 'special'
    return {p.relative_to(folder).as_posix(): what(p) for p in sorted(Path(folder).rglob('*'))}


class Tally:
    "Counts cases of one group and keeps the faults."
    def __init__(self, group): self.group, self.faults = group, []

    def held(self, name, fault=''):
        TRIED[self.group] += 1
        HELD[self.group] += not fault
        if fault: self.faults.append(f'{name}: {fault}')


@pytest.fixture
def full():
    "Is this the full collection (`make hostile`)?"
    return FULL


@pytest.fixture
def snap(): return snapshot


@pytest.fixture
def tally(request):
    counts = Tally(f'{request.node.path.stem.removeprefix("test_hostile_")}: '
                   f'{request.node.originalname.removeprefix("test_").replace("_", " ")}')
    yield counts
    if counts.faults:
        pytest.fail(f'{len(counts.faults)} cases did not hold\n' + '\n'.join(counts.faults[:20]), pytrace=False)


def pytest_terminal_summary(terminalreporter):
    if not TRIED or not FULL: return
    terminalreporter.section('hostile inputs')
    width = max(map(len, TRIED))
    terminalreporter.write_line(f'{"":{width}} {"tried":>7} {"held":>7}')
    for group in TRIED: terminalreporter.write_line(f'{group:{width}} {TRIED[group]:>7} {HELD[group]:>7}')
    terminalreporter.write_line(f'{"all":{width}} {TRIED.total():>7} {HELD.total():>7}')
