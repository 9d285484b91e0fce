"""Damaged checkpoints, planted code, and kills: no step is lost that was saved, no wrong weight is trained on,
nothing that lies there runs."""
import contextlib
import io
import itertools
import os
import pickle
import random
import shutil
import sys

import pytest
import torch
from small_training import config, kill_in_a_checkpoint, lines_of, start, start_two

from foundir_v2 import train as tr
from foundir_v2.checkpoint import SEAL, Checkpoints, seal
from foundir_v2.core import FoundIRError
from foundir_v2.learner import Learner, make_accelerator

FILES = (SEAL, 'ema.safetensors', 'log.jsonl', 'model.safetensors', 'optimizer.bin', 'random_states_0.pkl',
         'scheduler.bin', 'state.json')


class Died(Exception): pass


class Run:
    """A run of 6 steps that died after its checkpoint of step 4 (the one of step 2 is there as well), and its result
    if it hadn't."""
    def __init__(self, bench, folder):
        self.config, self.kept = config(bench, folder, steps=6, update_every=4), folder / 'kept'
        self.want = (tr.train(self.config).output / SEAL).read_bytes()
        shutil.rmtree(self.config.output)
        class Dying(Checkpoints):
            def save(self, accelerator, step, *state):
                super().save(accelerator, step, *state)
                if step == 4: raise Died
        tr.Checkpoints = Dying
        try: tr.train(self.config)
        except Died: pass
        finally: tr.Checkpoints = Checkpoints
        self.folder = tr.run_folder(self.config)
        os.replace(self.folder, self.kept)
        self.learner = Learner(self.config, make_accelerator(self.config))

    def again(self):
        "The newest of fresh checkpoints."
        for old in (self.folder, self.config.output): shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(self.kept, self.folder)
        return self.folder / 'step-000000004'

    def resume(self, whole):
        """What is said, and the step that training goes on from; None if it is refused.
        `whole`: train to the end and compare the result."""
        said, step = io.StringIO(), None
        with contextlib.redirect_stderr(said):
            try:
                if whole: step = tr.train(self.config).resumed_from
                else: step = Checkpoints(self.folder).restore(self.learner.accelerator, self.learner.ema).step
            except FoundIRError as e: print('checkpoint refused:', e, file=sys.stderr)
        if whole and step is not None and (tr.Path(self.config.output) / SEAL).read_bytes() != self.want:
            return said.getvalue(), 'another result'
        return '\n'.join(line for line in said.getvalue().splitlines() if 'checkpoint' in line), step


@pytest.fixture(scope='module')
def run(bench, tmp_path_factory): return Run(bench, tmp_path_factory.mktemp('run'))


def flip(path, draw, low=0., high=1.):
    data = bytearray(path.read_bytes())
    data[min(int(draw.uniform(low, high) * len(data)), len(data) - 1)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def as_folder(path): path.unlink(); path.mkdir(); (path / 'x').touch()


HARMS = {'a bit at the start': lambda p, d: flip(p, d, 0, .001),
         'a bit in the middle': flip,
         'a bit at the end': lambda p, d: flip(p, d, .999, 1),
         'cut in half': lambda p, d: os.truncate(p, p.stat().st_size // 2),
         'one byte short': lambda p, d: os.truncate(p, p.stat().st_size - 1),
         'empty': lambda p, d: os.truncate(p, 0),
         'zeros': lambda p, d: p.write_bytes(bytes(p.stat().st_size)),
         'noise': lambda p, d: p.write_bytes(d.randbytes(p.stat().st_size)),
         'removed': lambda p, d: p.unlink(),
         'one byte more': lambda p, d: p.write_bytes(p.read_bytes() + b' '),
         'of another step': lambda p, d: shutil.copyfile(p.parents[1] / 'step-000000002' / p.name, p),
         'a folder': lambda p, d: as_folder(p)}
SAME = {('random_states_0.pkl', 'of another step')}  # nothing draws from them, so both steps have the same


def harmed(run, snap, name, harm, whole):
    "What went wrong with one damaged checkpoint; empty if nothing did."
    newest = run.again()
    harm(newest)
    damaged = snap(newest)
    said, step = run.resume(whole)
    if step != 2: return f'went on from {step}: {said}'
    if said.count('\n') or 'checkpoint of step 4 is damaged (' not in said or 'going on from step 2' not in said:
        return f'said {said!r}'
    if not whole and snap(run.folder / 'damaged-1-step-000000004') != damaged:
        return 'the damaged checkpoint was not kept'
    return ''


def test_one_damaged_file(run, snap, tally, full):
    for k, (file, (harm, work)) in enumerate(itertools.product(FILES, HARMS.items())):
        if (file, harm) in SAME: continue
        tally.held(f'{file}, {harm}', harmed(run, snap, file, lambda newest: work(newest / file, random.Random(k)),
                                             whole=k % 48 == 30 or full and k % 4 == 2))


def test_other_damage(run, snap, tally, full):
    def with_older(newest): shutil.rmtree(newest); shutil.copytree(newest.with_name('step-000000002'), newest)
    harms = {
        'a file too many': lambda n: (n / 'notes.txt').touch(),
        'a folder too many': lambda n: (n / 'more').mkdir() or (n / 'more/notes.txt').touch(),
        'an older one under its name': with_older,
        'empty': lambda n: [p.unlink() for p in n.iterdir()],
        'two files swapped': lambda n: (n / 'ema.safetensors').rename(n / 'x')
            and (n / 'model.safetensors').rename(n / 'ema.safetensors') and (n / 'x').rename(n / 'model.safetensors'),
        'a dangling link': lambda n: (n / 'state.json').unlink() or (n / 'state.json').symlink_to('nowhere'),
        'a pipe': lambda n: (n / 'state.json').unlink() or os.mkfifo(n / 'state.json'),
        'sealed as another step': lambda n: seal(n, 'foundir_v2 checkpoint, step 5 of ' + n.parent.name),
        'sealed by somebody': lambda n: seal(n, 'mine')}
    for name, harm in harms.items(): tally.held(name, harmed(run, snap, name, harm, whole=full))


def test_all_checkpoints_damaged(run, snap, tally, full):
    "One line, and nothing is touched."
    harms = itertools.product(FILES if full else FILES[:1], ('a bit in the middle', 'removed', 'zeros'))
    for k, (file, harm) in enumerate(harms):
        newest = run.again()
        for step in (newest, newest.with_name('step-000000002')): HARMS[harm](step / file, random.Random(k))
        before = snap(run.folder)
        said, step = run.resume(whole=True)
        fault = ('' if step is None and said.count('\n') == 0 and 'is sound' in said and 'step-000000002: ' in said
                 else f'{step}: {said!r}')
        tally.held(f'{file}, {harm}',
                   fault or ('' if snap(run.folder) == before and not tr.Path(run.config.output).exists()
                             else 'files were changed'))


def test_names_that_are_not_ours(run, snap, tally, full):
    for name in ('step-abc', 'step-', 'step--00000004', 'step-4', 'step-00000000x',
                 'step-\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669', 'step-000000009.old', '.partial-x',
                 'damaged-1-step-000000004', 'log.jsonl.bak'):
        newest = run.again()
        (newest.parent / name).mkdir(); (newest.parent / name / 'x').touch()
        said, step = run.resume(whole=False)
        tally.held(name,
                   '' if (said, step) == ('', 4) and (newest.parent / name / 'x').exists() else f'{step}: {said!r}')


class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


PLANTED = ('custom_checkpoint_0.pkl', 'custom_checkpoint_1.pkl', 'optimizer.bin', 'optimizer_1.bin', 'scheduler.bin',
           'scheduler_1.bin', 'random_states_0.pkl', 'random_states_1.pkl', 'scaler.pt', 'sampler.bin',
           'dl_state_dict.bin', 'pytorch_model.bin', 'model.bin', 'model.safetensors', 'ema.safetensors', 'ema.pkl',
           'state.json', 'state.pkl', 'log.jsonl', SEAL, 'pytorch_model_fsdp_0/.metadata')


def plant(path, payload, kind):
    path.parent.mkdir(exist_ok=True)
    if kind == 'pickle': path.write_bytes(pickle.dumps(payload))
    else:
        with open(path, 'wb') as f:
            torch.save({'state': payload, 'param_groups': payload}, f, _use_new_zipfile_serialization=kind == 'torch')


@pytest.mark.parametrize('sealed', [False, True], ids=['found', 'sealed'])
def test_planted_pickles(run, tally, full, tmp_path, sealed):
    "As found beside our files, and with a new seal, as somebody would plant them who can write there."
    for name, kind in itertools.product(PLANTED, ('pickle', 'torch', 'old torch') if full else ('torch',)):
        newest, mark = run.again(), tmp_path / 'it ran'
        # what is read when this is missing
        if name in ('pytorch_model.bin', 'model.bin'): (newest / 'model.safetensors').unlink()
        plant(newest / name, Payload(mark), kind)
        if sealed and name != SEAL: seal(newest, Checkpoints(run.folder).title(4))
        said, step = run.resume(whole=full and kind == 'torch')
        ran = mark.exists()
        if ran: mark.rmdir()
        tally.held(f'{name}, {kind}',
                   'it ran' if ran else '' if step in (None, 2, 4) and said.count('\n') == 0 else f'{step}: {said!r}')


def test_planted_pickles_elsewhere(bench, run, tally, tmp_path):
    "In the run's folder, beside it, and where the stage before left its weights."
    stage = tmp_path / 'stage'
    result = tr.train(config(bench, tmp_path, steps=1, output=str(stage)))
    for name in ('diffusion_pytorch_model.bin', 'pytorch_model.bin', 'diffusion_pytorch_model.safetensors'):
        for p in (stage / 'unet').glob('*model*'): p.unlink()
        plant(stage / 'unet' / name, Payload(tmp_path / 'it ran'), 'torch')
        try: tr.train(config(bench, tmp_path, stage=2, steps=1, init=str(result.output))); fault = 'trained'
        except Exception: fault = ''
        tally.held(f'init, {name}', 'it ran' if (tmp_path / 'it ran').exists() else fault)
    for where in (run.folder / 'log.jsonl', run.folder / 'custom_checkpoint_0.pkl',
                  run.folder.with_name(f'.{run.folder.name}.owner'), run.folder.with_name(f'.{run.folder.name}.lock')):
        run.again()
        plant(where, Payload(tmp_path / 'it ran'), 'pickle')
        said, step = run.resume(whole=True)
        tally.held(
            f'{where.name[-20:]}',
            'it ran' if (tmp_path / 'it ran').exists() else '' if step == 4 and not said else f'{step}: {said!r}')


def test_kill_and_resume(bench, run, tally, full, tmp_path):
    """Killed once or twice, at a line of our code or while a checkpoint is written, then run to the end: the result
    has the same bytes."""
    def one(seed):
        folder = tmp_path / str(seed); folder.mkdir()
        return config(bench, folder, steps=6, update_every=4)
    draw, lines, killed = random.Random(11), lines_of(one(0)), 0
    for seed in range(1, 25) if full else (2, 3):
        c = one(seed)
        for n in range(draw.randrange(1, 3) if full else 1):
            if seed % 3 == 0: killed += kill_in_a_checkpoint(c, seed + 100 * n)
            else:
                process = start(c, line=draw.randrange(1, lines)); process.join()
                killed += process.exitcode == -9
        last = start(c); last.join()
        left = [p.name for p in (*tr.Path(c.output).parent.iterdir(), *tr.Path(c.checkpoints).iterdir())
                if '.partial' in p.name or p.name.endswith('.done')
                or 'stage' in p.name and not p.name.endswith('.times.csv')]  # times stay beside a run
        tally.held(f'run {seed}', f'exit {last.exitcode}' if last.exitcode else 'another result'
                       if (tr.Path(c.output) / SEAL).read_bytes() != run.want else f'left {left}' if left else '')
    assert killed >= (24 if full else 2), f'only {killed} kills'


def test_kill_and_resume_two_processes(bench, tally, full, tmp_path):
    """One of two processes is killed at a line of our code, and the other with it, as a launcher does; then both run
    to the end: the result has the same bytes. For more than two, sums of gradients might be added in another order."""
    def one(seed):
        folder = tmp_path / str(seed); folder.mkdir()
        return config(bench, folder, steps=6, update_every=4)
    draw = random.Random(12)
    lines = [lines_of(one(f'victim {victim}'), start_two, victim=victim) for victim in range(2)]
    want = (tmp_path / 'victim 0/out' / SEAL).read_bytes()
    for seed in range(1, 21 if full else 3):
        c, victim = one(seed), seed % 2
        processes = start_two(c, victim=victim, line=draw.randrange(1, lines[victim]))
        processes[victim].join()
        processes[1 - victim].kill(); processes[1 - victim].join()
        died, last = processes[victim].exitcode, start_two(c)
        for process in last: process.join()
        codes = [process.exitcode for process in last]
        left = [p.name for p in (*tr.Path(c.output).parent.iterdir(), *tr.Path(c.checkpoints).iterdir())
                if '.partial' in p.name or p.name.endswith('.done')
                or 'stage' in p.name and not p.name.endswith('.times.csv')]  # times stay beside a run
        tally.held(f'run {seed}', f'exits {died}, then {codes}' if (died, codes) != (-9, [0, 0])
                   else 'another result' if (tr.Path(c.output) / SEAL).read_bytes() != want
                   else f'left {left}' if left else '')
