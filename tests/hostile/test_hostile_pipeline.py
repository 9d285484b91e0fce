"""A training stage that is killed within `dvc repro`: the next `dvc repro` goes on, ends with the same result, and
nothing has to be cleaned by hand. In full only: it runs the pipeline's first stages in a copy of the repository."""
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from foundir_v2.checkpoint import SEAL
from foundir_v2.config import load_yaml

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


class Copy:
    "The repository with the parameters of the smoke run, and a stage 0 of some more steps."
    def __init__(self, folder, processes, fsdp):
        self.folder, self.environment = folder, os.environ | dict(
            PATH=f'{folder / ".venv/bin"}{os.pathsep}{os.environ["PATH"]}', PYTHONPATH=str(folder))
        ours = subprocess.check_output(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, text=True)
        for name in filter(lambda name: (ROOT / name).is_file(), ours.splitlines()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        shutil.copytree(ROOT / 'data', folder / 'data')
        (folder / '.venv').symlink_to(Path(sys.prefix).resolve())
        who = ['-c', 'user.name=copy', '-c', 'user.email=copy@localhost', '-c', 'commit.gpgsign=false']
        for command in (['git', 'init', '-q', '.'], ['git', 'add', '-A'], ['git', *who, 'commit', '-q', '-m', 'a copy'],
                        [sys.executable, '.ci/profile.py', 'smoke'], ['dvc', 'commit', '-q', 'data.dvc']):
            subprocess.run(command, cwd=folder, env=self.environment, check=True, stdin=subprocess.DEVNULL)
        params = folder / 'params.yaml'
        text = params.read_text()
        for name, old, new in (('processes', 1, processes), ('fsdp', 'false', fsdp), ('optimizer', 'muon', 'adamw')):
            assert text.count(f'\n  {name}: {old}  #') == 1
            text = text.replace(f'\n  {name}: {old}  #', f'\n  {name}: {new}  #')
        head, own = text.split('train_stage0:\n')
        own = own.replace(f'steps: {load_yaml(params)["train_stage0"]["steps"]}', f'steps: {STEPS}', 1)
        params.write_text(f'{head}train_stage0:\n{own}')

    def repro(self, *options):
        return subprocess.Popen(['dvc', 'repro', *options, 'train_stage0'], cwd=self.folder, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def result(self): return (self.folder / 'artifacts/train_stage0' / SEAL).read_bytes()

    def logged(self): return sum(p.read_text().count('"kind": "step"') for p in self.runs('log.jsonl'))

    def runs(self, pattern): return list((self.folder / '.checkpoints').glob(f'stage0-*/{pattern}'))


def wait(process, ready):
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline and not ready(): time.sleep(.002)
    assert process.poll() is None, process.stdout.read()[-2000:]


@pytest.mark.parametrize('processes, fsdp', [(1, 'false'), (2, 'false'), (2, 'true')])
def test_killed_within_dvc_repro(tally, full, tmp_path, processes, fsdp):
    "dvc alone, whose children end by themselves, or everybody; at a step, or while a checkpoint is written."
    if not full: pytest.skip('minutes: HOSTILE=full')
    copy, draw = Copy(tmp_path, processes, fsdp), random.Random(13)
    first = copy.repro()
    said = first.communicate()[0]
    assert first.returncode == 0, said[-3000:]
    want, alone = copy.result(), ['--single-item', '--no-run-cache', '--force']  # else DVC takes the result it has
    for k, victim in enumerate(('everybody', 'dvc', 'everybody', 'dvc')):
        process, at = copy.repro(*alone), draw.randrange(3, STEPS - 2)
        wait(process, lambda: copy.logged() >= at)
        if k >= 2: wait(process, lambda: copy.runs('.partial-*'))
        family = psutil.Process(process.pid).children(recursive=True)
        for one in (psutil.Process(process.pid), *(family if victim == 'everybody' else ())): one.kill()
        process.wait()
        again = copy.repro(*alone)
        said = again.communicate()[0]
        left = [p.name for p in (*(copy.folder / 'artifacts').iterdir(), *(copy.folder / '.checkpoints').iterdir())
                if '.partial' in p.name or p.name.startswith('stage') and not p.name.endswith('.times.csv')]
        tally.held(f'{victim} at step {at}, processes: {processes}, fsdp: {fsdp}', said[-1500:] if again.returncode else
                   'another result' if copy.result() != want else f'left {left}' if left else '')
        assert not psutil.wait_procs(family, timeout=30)[1], 'the children outlive dvc'
