"""Command lines that would destroy something: every command that writes, with every kind of bad name for it.

A case runs in a folder of its own with a copy of the same files. It holds if it ends with exit code 2 and one line and
nothing in the folder has changed, or with 0 and only the files that it was told to write are others."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foundir_v2 import cli, fetch

PROGRAM = sys.executable, '-m', 'foundir_v2.cli'
ENVIRONMENT = os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parents[2])}
LONG = 'x' * 300
SIMULATE = ['mixture', 'simulate', 'curves.json', '--policy', 'fixed', '--seeds', '1', '--updates', '2']


def pixels(seed, side=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    "Inputs of all commands, and files of somebody else's under every suffix."
    from foundir_v2.mixlaw import spread_mixtures
    root = tmp_path_factory.mktemp('template')
    for i, name in enumerate(('in/a.png', 'in/b.jpg', 'in/d/x.png', 'other/d/x.png', 'g/a.png', 'one.png')):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels(i).save(root / name)
    pixels(9).save(root / 'good.gif')
    for name in ('in/a.txt', 'in/b.txt', 'in/d/x.txt'): (root / name).write_text('a caption\n')
    runs = enumerate(spread_mixtures(['a', 'b', 'c'], 12))
    rows = [f'{i},{t},{w[t]},{28 - m * np.exp(-2 * w[t])}' for i, w in runs for t, m in zip('abc', (2, 4, 8))]
    (root / 'runs.csv').write_text('\n'.join(['run,task,weight,score', *rows]) + '\n')
    (root / 'log.csv').write_text('step,task,weight,score\n0,a,0.5,20\n0,b,0.5,30\n10,a,0.6,21\n10,b,0.4,30\n')
    (root / 'train.yaml').write_text('stage: 0\nmanifest: no.parquet\n')
    (root / 'mine').mkdir()
    for suffix in ('.png', '.csv', '.json', '.jsonl', '.svg'):
        for name in ('foreign', 'protected'): (root / f'mine/{name}{suffix}').write_text('years of work\n')
        (root / f'mine/protected{suffix}').chmod(0o444)
    assert cli.main(['mixture', 'fit', str(root / 'runs.csv'), str(root / 'law.json')]) == 0
    assert cli.main([*SIMULATE[:2], *SIMULATE[3:], '--save-curves', str(root / 'curves.json')]) == 0
    return root


@pytest.fixture(scope='module', autouse=True)
def loaded_once():
    "The shipped model, loaded once for all cases."
    import foundir_v2.loading as loading
    load, kept = loading.load_pipeline, {}
    def once(name, **options): return kept.setdefault(str((name, options)), load(name, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, 'load_pipeline', once)
        yield


@pytest.fixture
def place(template, tmp_path_factory, monkeypatch):
    "Make a fresh copy and go there."
    made = []
    def fresh():
        if made: shutil.rmtree(made.pop(), ignore_errors=True)
        made.append(tmp_path_factory.mktemp('case') / 'here')
        shutil.copytree(template, made[0], symlinks=True)
        monkeypatch.chdir(made[0])
        return made[0]
    yield fresh
    monkeypatch.undo()


def spoken(err):
    "Lines on stderr, without progress bars."
    lines = [line.rpartition('\r')[2] for line in err.splitlines()]
    return [line for line in lines if line.strip() and '%|' not in line]


def attempt(argv, capsys):
    "Exit code, lines on stderr, fault."
    capsys.readouterr()
    try: code = cli.main([str(a) for a in argv])
    except SystemExit as e: return e.code, [], 'the command line itself was refused'
    except BaseException as e: return None, [], f'{type(e).__name__}: {e}'
    return code, spoken(capsys.readouterr().err), ''


def judge(before, after, result, may_change=lambda name: False, may_fail=True, must_fail=False):
    "What is wrong about a case, or nothing."
    code, lines, fault = result
    changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    if fault: return fault
    if code == 2 and not may_fail: return f'refused: {lines}'
    if code == 2 and (len(lines) != 1 or not lines[0].startswith('foundir-v2: ')): return f'{len(lines)} lines: {lines}'
    if code == 2: return f'refused, but changed {changed[:3]}' if changed else ''
    if code != 0 or must_fail: return f'exit code {code}'
    wrong = [name for name in changed if not may_change(name)]
    return f'changed {wrong[:3]}' if wrong else ''


# ---------------------------------------------------------------- files

FILES = {  # what writes one file: its words, an input of it, the suffix of what it writes
    'restore': (['restore', 'in/a.png', '{}', '--device', 'cpu'], 'in/a.png', '.png'),
    'restore --log': (['restore', 'in/a.png', 'fresh.png', '--device', 'cpu', '--log', '{}'], 'in/a.png', '.jsonl'),
    'degrade': (['degrade', 'in/a.png', '{}', '--task', 'low_light'], 'in/a.png', '.png'),
    'clean --csv': (['clean', 'in', '--csv', '{}'], 'in/a.png', '.csv'),
    'evaluate --csv': (['evaluate', 'identity', '--manifest', 'log.csv', '--csv', '{}'], 'log.csv', '.csv'),
    'update': (['mixture', 'update', '{}', 'a=20', 'b=30', '--step', '20', '--alpha', '1'], None, '.csv'),
    'fit': (['mixture', 'fit', 'runs.csv', '{}'], 'runs.csv', '.json'),
    'recommend --csv': (['mixture', 'recommend', 'law.json', '--csv', '{}'], 'law.json', '.csv'),
    'plot': (['mixture', 'plot', 'log.csv', '{}'], 'log.csv', '.svg'),
    'replay': (['mixture', 'replay', 'log.csv', '{}'], 'log.csv', '.csv'),
    'simulate --csv': ([*SIMULATE, '--csv', '{}'], 'curves.json', '.csv'),
    'simulate --picture': ([*SIMULATE, '--picture', '{}'], 'curves.json', '.png'),
    'simulate --save-curves': ([*SIMULATE, '--save-curves', '{}'], 'curves.json', '.json'),
}


def link(name, to, hard=False):
    if not hard: os.symlink(to, name)
    elif to: os.link(to, name)
    return name


NAMES = {  # what the file to write is called, made on the spot; (input, suffix) -> name
    'empty': lambda i, s: '',
    'null': lambda i, s: '/dev/null',
    'full': lambda i, s: '/dev/full',
    'proc': lambda i, s: f'/proc/x{s}',
    'sys': lambda i, s: f'/sys/kernel/x{s}',
    'folder': lambda i, s: 'mine',
    'here': lambda i, s: '.',
    'above': lambda i, s: '..',
    'root': lambda i, s: '/',
    'slash': lambda i, s: f'new{s}/',
    'folder with suffix': lambda i, s: os.mkdir(f'd{s}') or f'd{s}',
    'below a file': lambda i, s: f'mine/foreign.csv/x{s}',
    'below an input': lambda i, s: f'{i or "log.csv"}/x{s}',
    'long': lambda i, s: LONG + s,
    'long folder': lambda i, s: f'{LONG}/x{s}',
    'pipe': lambda i, s: os.mkfifo(f'p{s}') or f'p{s}',
    'loop': lambda i, s: link(f'l{s}', f'l{s}'),
    'link to nothing': lambda i, s: link(f'l{s}', 'gone'),
    'link to a folder': lambda i, s: link(f'l{s}', 'mine'),
    'foreign': lambda i, s: f'mine/foreign{s}',
    'protected': lambda i, s: f'mine/protected{s}',
    'link to foreign': lambda i, s: link(f'l{s}', f'mine/foreign{s}'),
    'twin of foreign': lambda i, s: link(f'l{s}', f'mine/foreign{s}', hard=True),
    'foreign by detour': lambda i, s: f'in/../mine/./foreign{s}',
    'input': lambda i, s: i,
    'input by detour': lambda i, s: i and f'mine/../{i}',
    'input in full': lambda i, s: i and os.path.abspath(i),
    'link to the input': lambda i, s: i and link(f'l{s}', i),
    'twin of the input': lambda i, s: i and link(f'l{s}', i, hard=True),
    'input in a linked folder': lambda i, s: i and f'{link("lf", os.path.dirname(i) or ".")}/{os.path.basename(i)}',
    'new': lambda i, s: f'new/漢字/x{s}',
    'long but legal': lambda i, s: '漢' * 80 + s,
}
HARMLESS = ('new', 'long but legal')
REPLACED = ('foreign', 'protected', 'link to foreign', 'twin of foreign', 'foreign by detour')  # with --force
# a single result goes there
INTO = ('folder', 'here', 'above', 'root', 'slash', 'folder with suffix', 'link to a folder')
ALWAYS = ('empty', 'null', 'foreign', 'input', 'twin of the input', 'new')  # in the reduced set, too


def test_names_of_files(place, tally, snap, capsys, full):
    cases = list(itertools.product(FILES, NAMES, (False, True)))
    for n, (command, name, force) in enumerate(cases):
        words, source, suffix = FILES[command]
        if command == 'update' and force or command in ('restore', 'degrade') and name in INTO: continue
        if not (full or n % 13 == 0 or command in ('restore', 'fit') and name in ALWAYS): continue
        here = place()
        target = NAMES[name](source, suffix)
        if target is None: continue
        argv = [w.format(target) if w == '{}' else w for w in words] + ['--force'] * force
        before = snap(here)
        result = attempt(argv, capsys)
        ours = Path('fresh.png' if command.endswith('--log') else target)
        logged = command.endswith('--log')
        may_change = lambda name: name == ours.as_posix() or Path(name) in ours.parents or logged and name == target
        allowed = name in HARMLESS or force and name in REPLACED and not logged
        works = allowed and not command.startswith('evaluate')  # its manifest is none
        if name == 'new': may_change = lambda name, also=may_change: also(name) or name.startswith('new')
        if name == 'foreign by detour': may_change = lambda name, suffix=suffix: name == f'mine/foreign{suffix}'
        fault = judge(before, snap(here), result, may_change, may_fail=not works, must_fail=not allowed)
        tally.held(f'{command}, {name}{", --force" * force}', fault)


# ---------------------------------------------------------------- folders

FOLDERS = {
    'restore into': ['restore', 'in', '{}', '--device', 'cpu'],
    'degrade into': ['degrade', 'in', '{}', '--task', 'low_light'],
    'caption into': ['caption', 'in', '{}', '--captioner', 'sidecar'],
    'data fetch': ['data', 'fetch', '--data-dir', '{}', '--cache-dir', 'wheels'],
    'data fetch, cache': ['data', 'fetch', '--data-dir', 'photographs', '--cache-dir', '{}'],
    'restore, captions': ['restore', 'in/a.png', 'fresh.png', '--device', 'cpu', '--caption-cache', '{}'],
    'caption, cache': ['caption', 'in', 'fresh', '--captioner', 'sidecar', '--cache-dir', '{}'],
    'train': ['train', '--config', 'train.yaml', '--set', 'output={}'],
    'train, checkpoints': ['train', '--config', 'train.yaml', '--set', 'checkpoints={}'],
}
NO_FOLDERS = {
    'empty': lambda: '',
    'null': lambda: '/dev/null',
    'a photograph': lambda: 'one.png',
    'an input': lambda: 'in/a.png',
    'below a photograph': lambda: 'one.png/x',
    'below an input': lambda: 'in/a.png/deep/er',
    'link to a photograph': lambda: link('lp', 'one.png'),
    'link to nothing': lambda: link('lp', 'gone'),
    'loop': lambda: link('lp', 'lp'),
    'long': lambda: LONG,
    'pipe': lambda: os.mkfifo('p') or 'p',
}
OTHERS = {
    'unwritable': lambda: '/proc/x',
    'the input': lambda: 'in',
    'link to the input': lambda: link('lp', 'in'),
    'full of others': lambda: shutil.copytree('in', 'out') and 'out',
    'link to others': lambda: shutil.copytree('in', 'out') and link('lp', 'out'),
    'everything': lambda: '.',
}


def test_names_of_folders(place, tally, snap, capsys, full, monkeypatch):
    import foundir_v2.fetch as fetch
    two = [p for p in fetch.PHOTOS if p.package == 'scikit-image'][:2]  # installed: no network
    monkeypatch.setattr(fetch.fetch, '__defaults__', ('data', None, two, fetch.WHEELS))
    for n, (command, name, force) in enumerate(itertools.product(FOLDERS, {**NO_FOLDERS, **OTHERS}, (False, True))):
        words = FOLDERS[command]
        if force and words[0] in ('data', 'train') or not (full or n % 9 == 0): continue
        here = place()
        target = {**NO_FOLDERS, **OTHERS}[name]()
        quoted = json.dumps(target) if words[0] == 'train' else target
        argv = [w.replace('{}', quoted) for w in words] + ['--force'] * force
        before = snap(here)
        result = attempt(argv, capsys)
        may_change = lambda name: name not in before or force and name.startswith('out/')
        must_fail = name in NO_FOLDERS or words[0] == 'train'
        tally.held(f'{command}, {name}{", --force" * force}',
                   judge(before, snap(here), result, may_change, must_fail=must_fail))


# ---------------------------------------------------------------- several files at once

def two_sources(here): shutil.copy('one.png', 'in/d/one.png')


def earlier(here):
    "Results of ours: one edited, one cut short, one as it was."
    assert cli.main(['restore', 'in', 'out', '--device', 'cpu']) == 0
    pixels(7).save('out/a.png')
    Path('out/b.jpg').write_bytes(Path('out/b.jpg').read_bytes()[:300])


def cut_short(here):
    earlier(here)
    Path('out/a.png').unlink()


def emptied(here):
    earlier(here)
    Path('out/a.png').write_bytes(b'')


def text_in_place(here):
    earlier(here)
    Path('out/a.png').write_text('my notes, under an odd name')


def foreign_log(here):
    os.mkdir('out')
    Path('out/restore.jsonl').write_text('{"my": "log"}\n')


def forged(here):
    "A log that claims a file without its hash."
    os.mkdir('out')
    pixels(7).save('out/a.png')
    claims = ('{"output": "a.png", "key": "k", "made": {"a.png": "00"}}', '{"output": "b.jpg", "made": [1]}',
              '{"output": []}', '{"output": "a.png", "made": {"a.png": 3}}')
    Path('out/restore.jsonl').write_text('\n'.join(claims) + '\n')


def compared(here): pixels(7).save('in/a.compare.png')
def twins(here): shutil.copy('in/a.png', 'in/a.jpg')
def large_and_small(here): shutil.copy('in/a.png', 'in/A.png')
def linked_out(here): os.symlink('in', 'out')
def data_of_mine(here): shutil.copytree('in', 'data')
def my_table(here): os.mkdir('data'); Path('data/SOURCES.csv').write_text('mine\n')
def model(here): shutil.copytree(Path(cli.__file__).parent / 'assets/tiny', 'model')


nothing = lambda here: None
WEIGHTS = ('.cache', '.cache/fetched', '.cache/fetched/SOURCES.csv', '.cache/fetched/weights',  # of metrics: data stays
           *(f'.cache/fetched/{w.file}' for w in fetch.WEIGHTS))

SPECIAL = [  # what is there besides, the command line, whether it must fail (None: it may), what may change
    (nothing, 'restore other in/d in', True, ()),
    (nothing, 'restore other in/d in --force', True, ()),
    (nothing, 'restore good.gif g/', None, ('g/good.png',)),
    (lambda here: os.rename('good.gif', 'g/a.gif'), 'restore g/a.gif g/', True, ()),
    (lambda here: os.rename('good.gif', 'g/a.gif'), 'restore g/a.gif g', True, ()),
    (lambda here: os.rename('good.gif', 'g/a.gif'), 'restore g new', True, ()),
    (compared, 'restore good.gif in/new.png --compare', False, ('in/new.png', 'in/new.compare.png')),
    (compared, 'restore good.gif in/a.png --compare', True, ()),
    (compared, 'restore in/b.jpg in/a.png --compare --force', False, ('in/a.png', 'in/a.compare.png')),
    (compared, 'restore in new --compare', True, ()),
    (nothing, 'restore good.gif o.png --log o.png', True, ()),
    (nothing, 'restore one.png o.png --log one.png', True, ()),
    (nothing, 'restore one.png o.png --log mine/foreign.jsonl --force', True, ()),
    (nothing, 'restore one.png o.png --log o.png/log.jsonl', True, ()),
    (nothing, 'restore one.png o.png --compare --log o.compare.png', True, ()),
    (nothing, 'restore in new --log new/a.png', True, ()),
    (nothing, 'restore "" out', True, ()),
    (nothing, 'restore one.png "" out', True, ()),
    (nothing, 'restore "" ""', True, ()),
    (nothing, 'restore in ""', True, ()),
    (nothing, 'restore one.png o.png --model ""', True, ()),
    (nothing, 'restore one.png o.png --caption sidecar --caption-cache ""', True, ()),
    (nothing, 'restore in in', True, ()),
    (nothing, 'restore in in --force', True, ()),
    (nothing, 'restore in/* .', None, ('a.png', 'b.jpg', 'restore.jsonl')),
    (nothing, 'restore in one.png', True, ()),
    (nothing, 'restore in g --skip-existing', False, ('g/b.jpg', 'g/d', 'g/d/x.png', 'g/restore.jsonl')),
    (nothing, 'restore in g', True, ()),
    (nothing, 'restore in g --force', False, ('g/a.png', 'g/b.jpg', 'g/d', 'g/d/x.png', 'g/restore.jsonl')),
    (nothing, 'restore in/a.png in/b.jpg in/d in', True, ()),
    (nothing, 'restore in other new', True, ()),
    (two_sources, 'restore in/d one.png new', True, ()),
    (twins, 'restore in/a.png in/a.jpg new', False, ('new', 'new/a.png', 'new/a.jpg', 'new/restore.jsonl')),
    (twins, 'caption in new --captioner none', True, ()),
    (large_and_small, 'restore in new', False,
     ('new', 'new/a.png', 'new/A.png', 'new/b.jpg', 'new/d', 'new/d/x.png', 'new/restore.jsonl')),
    (linked_out, 'restore in out', True, ()),
    (linked_out, 'restore in out --force', True, ()),
    (linked_out, 'degrade in/a.png out/a.png --task haze --force', True, ()),
    (earlier, 'restore in out', True, ()),
    (earlier, 'restore in out --skip-existing', False, ()),
    (earlier, 'restore in out --force', False, ('out/a.png', 'out/b.jpg', 'out/d/x.png', 'out/restore.jsonl')),
    (cut_short, 'restore in out', False, ('out/a.png', 'out/b.jpg', 'out/restore.jsonl')),
    (emptied, 'restore in out', False, ('out/a.png', 'out/b.jpg', 'out/restore.jsonl')),
    (text_in_place, 'restore in out', True, ()),
    (foreign_log, 'restore in out', True, ()),
    (foreign_log, 'restore in out --force', True, ()),
    (forged, 'restore in out', True, ()),
    (model, 'restore one.png model/unet/config.json --model model --force', True, ()),
    (model, 'restore one.png o.png --model model --log model/unet/config.json', True, ()),
    (nothing, 'degrade other in/d --task haze', False, ('in/d/d', 'in/d/d/x.png')),
    (nothing, 'degrade in/d in/d --task haze --force', True, ()),
    (nothing, 'degrade "" out --task haze', True, ()),
    (nothing, 'degrade one.png in/a.png --task haze', True, ()),
    (nothing, 'clean . --csv one.png', True, ()),
    (nothing, 'clean . --csv one.png --force', True, ()),
    (nothing, 'clean "" --csv new.csv', True, ()),
    (nothing, 'caption in in --captioner sidecar', True, ()),
    (nothing, 'caption in in --captioner sidecar --force', True, ()),
    (nothing, 'caption in in --captioner none', True, ()),
    (nothing, 'caption in in --captioner none --skip-existing', False, ()),
    (nothing, 'caption in in --captioner none --force', False, ('in/a.txt', 'in/b.txt', 'in/d/x.txt')),
    (nothing, 'caption one.png "" --captioner none', True, ()),
    (nothing, 'mixture fit runs.csv runs.csv', True, ()),
    (nothing, 'mixture fit runs.csv runs.csv --force', True, ()),
    (nothing, 'mixture recommend law.json --csv law.json --force', True, ()),
    (nothing, 'mixture replay log.csv log.csv --force', True, ()),
    (nothing, 'mixture plot log.csv log.csv --force', True, ()),
    (nothing, 'mixture update one.png a=1 b=2 --step 1 --alpha 1', True, ()),
    (nothing, 'mixture update runs.csv a=1 b=2 --step 1 --alpha 1', True, ()),
    (nothing, 'mixture update log.csv a=20 b=30 --step 20 --alpha 1', False, ('log.csv',)),
    (nothing, 'mixture simulate --policy fixed --seeds 1 --updates 2 --csv t.csv --picture t.csv', True, ()),
    (nothing, 'mixture simulate --policy fixed --seeds 1 --updates 2 --csv t --save-curves t/c.json', True, ()),
    (nothing, 'mixture simulate --policy fixed --seeds 1 --updates 2 --csv t.csv --picture t.txt', True, ()),
    (nothing, 'mixture simulate --policy fixed --seeds 1 --updates 2 --csv t.csv --picture mine/foreign.png', True, ()),
    (nothing, 'mixture simulate curves.json --policy fixed --seeds 1 --updates 2 --save-curves curves.json --force',
     True, ()),
    (data_of_mine, 'data fetch', None, WEIGHTS),
    (my_table, 'data fetch', True, ()),
    (nothing, 'data fetch --data-dir one.png', True, ()),
    (nothing, 'data fetch --data-dir in', None, WEIGHTS),
    (nothing, 'data fetch --data-dir .', None, WEIGHTS),
    (nothing, 'train --config train.yaml --set output=train.yaml', True, ()),
    (nothing, 'train --config train.yaml --set output=.', True, ()),
    (nothing, 'train --config ""', True, ()),
    (nothing, 'train --config train.yaml --set output=x checkpoints=x', True, ()),
]


LIMITS = [  # numbers that no machine can follow
    'restore one.png o.png --upscale 1000', 'restore one.png o.png --upscale inf',
    'restore one.png o.png --upscale nan', 'restore one.png o.png --steps 1000000000',
    'restore one.png o.png --seed 18446744073709551616',
    'restore one.png o.png --seed -1', 'restore one.png o.png --memory-limit inf',
    'restore one.png o.png --memory-limit 1e308', 'restore one.png o.png --memory-limit -8',
    'restore one.png o.png --tile-batch 1000000000', 'restore one.png o.png --tile-size 1000000000',
    'restore one.png o.png --guidance 1e308', 'restore one.png o.png --max-pixels ' + '9' * 5000,
    'degrade one.png o.png --task haze --seed 18446744073709551616',
    'mixture simulate curves.json --csv t.csv --interval 1e308',
    'mixture simulate curves.json --csv t.csv --interval 0',
    'mixture simulate curves.json --csv t.csv --updates 1000000000',
    'mixture simulate curves.json --csv t.csv --seeds 1000000000',
    'mixture simulate curves.json --csv t.csv --images 1000000000',
    'mixture simulate curves.json --csv t.csv --samples-per-step inf',
    'mixture replay log.csv s.csv --stretch inf', 'mixture replay log.csv s.csv --stretch 1e308',
    'mixture recommend law.json --csv r.csv --floor 1e308', 'mixture recommend law.json --csv r.csv --floor nan',
    'mixture update log.csv a=20 b=30 --step 20 --alpha inf',
    'mixture update log.csv a=20 b=30 --alpha 1 --step ' + '9' * 5000,
    'mixture update log.csv a=20 b=30 --step 20 --alpha 1 --max-step inf',
    'evaluate identity --manifest log.csv --items 1000000000', 'evaluate identity --manifest log.csv --size 1000000000']


@pytest.mark.parametrize('line', LIMITS, ids=lambda line: line[:60])
def test_numbers_out_of_bounds(place, tally, snap, capsys, line):
    here = place()
    before = snap(here)
    code, lines, fault = attempt(line.split(), capsys)
    if lines and len(lines[0]) > 500: fault = f'a line of {len(lines[0])} characters'
    tally.held(line[:80], fault or judge(before, snap(here), (code, lines, fault), must_fail=True))


def test_command_lines(place, tally, snap, capsys, full):
    import shlex
    for n, (prepare, line, must_fail, changes) in enumerate(SPECIAL):
        if not (full or must_fail or n % 3 == 0): continue
        here = place()
        prepare(here)
        before = snap(here)
        words = shlex.split(line) + ['--device', 'cpu'] * line.startswith('restore')
        result = attempt(words, capsys)
        if not result[0] and not result[2]: result = result[0], [], ''  # what it says when it has worked is its own
        fault = judge(before, snap(here), result, lambda name: name in changes, must_fail is not False,
                      must_fail is True)
        tally.held(f'{prepare.__name__}: {line}', fault)


# ---------------------------------------------------------------- the disk, the hub, Ctrl-C

@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / 'disk'
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', folder], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no small disk can be mounted here: {done.stderr.strip()}')
    yield folder
    subprocess.run(['umount', folder], check=True)


FILLING = ['restore big {}/out', 'restore big {}/out --compare', 'degrade big {}/out --task haze',
           'caption many {}/out --captioner none', 'restore big/0.jpg {}/one.jpg', 'restore big/0.jpg {}/one.png',
           'restore big/0.jpg {}/one.webp', 'restore big/0.jpg {}/one.png --bits 16', 'clean big --csv {}/t.csv',
           'mixture replay log.csv {}/s.csv', 'mixture fit runs.csv {}/law.json', 'mixture plot log.csv {}/log.svg',
           'mixture plot log.csv {}/log.png']


def test_a_full_disk(place, tally, small_disk, capsys, full):
    "One line that names a file of the disk, the loop ends, and what is there is whole."
    for n, line in enumerate(FILLING):
        if not (full or n in (0, 4)): continue
        place()
        for folder, side in (('big', 96), ('many', 8)):
            os.mkdir(folder)
            for i in range(12 if side == 96 else 200): pixels(i, side).save(f'{folder}/{i}.jpg', quality=95)
        free = 40 if 'big {}/out' in line else 0
        space = shutil.disk_usage(small_disk).free - 1024 * free
        (small_disk / 'ballast').write_bytes(bytes(space))
        result = attempt(line.format(small_disk).split() + ['--device', 'cpu'] * line.startswith('restore'), capsys)
        code, lines, fault = result
        told = len(lines) == 1 and str(small_disk) in lines[0] and 'no space left' in lines[0]
        if not fault and (code != 2 or not told): fault = f'exit code {code}: {lines}'
        left = [p for p in small_disk.rglob('*') if p.is_file() and p.name != 'ballast']
        for p in left:
            if p.suffix in ('.jpg', '.png', '.webp'): Image.open(p).load()
            half = p.suffix == '.txt' and p.read_text() != '\n'
            if p.name.startswith('.') or p.suffix not in ('.jpg', '.txt', '.jsonl') or half:
                fault = fault or f'left {p.name}'
        tally.held(line, fault)
        for p in small_disk.iterdir(): shutil.rmtree(p) if p.is_dir() else p.unlink()


@pytest.mark.parametrize('words', [
    'restore in/a.png o.png --model nobody/none', 'restore in out --caption vlm:nobody/none',
    'caption in out --captioner vlm:nobody/none', 'restore in out --model nobody/none --memory-limit 8'])
def test_a_hub_out_of_reach(place, tally, snap, words, full):
    if not full and '--caption ' not in words: pytest.skip('in make hostile')
    here = place()
    before = snap(here)
    env = ENVIRONMENT | {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(here.parent / 'hub')}
    done = subprocess.run([*PROGRAM, *words.split()], capture_output=True, text=True, env=env, timeout=300)
    result = done.returncode, spoken(done.stderr), ''
    tally.held(words, judge(before, snap(here), result, must_fail=True))


@pytest.mark.parametrize('words, at', [
    ('restore many out --device cpu', 'out/restore.jsonl'),
    ('degrade many out --task haze', 'out'),
    ('clean many', None),
    ('mixture simulate --seeds 5000', None)])
def test_ctrl_c(place, tally, words, at, full):
    if not full and not words.startswith('restore'): pytest.skip('in make hostile')
    here = place()
    os.mkdir('many')
    for i in range(150 if at else 2000): pixels(i, 64).save(f'many/{i}.png')  # far more than three seconds of work
    run = subprocess.Popen([*PROGRAM, *words.split()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           start_new_session=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while at and not Path(at).exists() and run.poll() is None and time.monotonic() < deadline: time.sleep(0.05)
    if not at: time.sleep(3)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=120)
    left = [p.name for p in here.rglob('.foundir*')]
    held = run.returncode == 130 and 'Traceback' not in err and not left
    tally.held(words, '' if held else f'exit code {run.returncode}, left {left}: {err[-300:]}')
