"""Files that somebody else wrote, or damaged: parameters, models, logs, tables, wheels.

Each is refused at the command line in one line of bounded length, or read without harm."""
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foundir_v2 import cli, runner, train

ROOT = Path(__file__).resolve().parents[2]
PARAMS = (ROOT / 'params.yaml').read_text(encoding='utf-8')
DEEP, DIGITS, LATIN = '[' * 100_000, '9' * 5000, b'\xff\xfe\xe9'


def lol(levels=11):
    "YAML that would be 10^levels values, were its aliases written out."
    return 'a0: &a0 [x]\n' + ''.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]\n' for i in range(1, levels))


def put(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(capsys, main, *argv, lines=1):
    "What is wrong about a command that is to be refused, or nothing."
    capsys.readouterr()
    try: code = main([str(a) for a in argv])
    except BaseException as e: return f'{type(e).__name__}: {str(e)[:200]}'
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and '%|' not in line]
    if code != 2: return f'exit code {code}: {said[-1:]}'
    if len(said) != lines: return f'{len(said)} lines: {said[:3]}'
    return f'{len(said[0])} characters' if len(said[0]) > 1600 else ''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('one.png', 'in/a.png', 'in/b.png'):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(name)
    return tmp_path


# ---------------------------------------------------------------- parameters

CROP = '\n  crop: 128'
FILES = {'deep': 'model: ' + '[' * 900, 'deep blocks': ''.join(' ' * i + 'a:\n' for i in range(900)),
         'digits': PARAMS.replace(CROP, f'\n  crop: {DIGITS}'), 'tag': PARAMS.replace(CROP, '\n  crop: !!int ore'),
         'bomb': lol() + PARAMS, 'bomb inside': PARAMS.replace(CROP, f'\n  crop: {lol().splitlines()[0][4:]}'),
         'cycle': 'a: &a [*a]\n', 'not UTF-8': LATIN, 'zeros': bytes(1000), 'brackets': 'a: ' + DEEP[:9000],
         'code': PARAMS.replace(CROP, '\n  crop: !!python/object/apply:os.mkdir ["planted"]')}


@pytest.mark.parametrize('name', FILES)
def test_parameters(here, tally, capsys, name):
    path = put(here / 'params.yaml', FILES[name])
    stage = '--config', path, '--stage', 1
    tally.held(f'{name}, foundir-v2 train', refusal(capsys, cli.main, 'train', *stage))
    tally.held(f'{name}, foundir_v2.train', refusal(capsys, train.main, *stage))
    ingest = ROOT / 'nbs/pipeline/ingest.ipynb', here / 'out.ipynb', 'ingest'
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        tally.held(f'{name}, runner', refusal(capsys, runner.main, *ingest, '--params', path))
    assert not Path('planted').exists()


SETTINGS = ['weight_decay=-1', 'adam_betas=[1, 1]', 'adam_eps=-1', 'lq_norm_groups=-1', 'batch_size=1000000000',
            'num_workers=1000000', 'moe_layers=1000000', 'seed=18446744073709551616', f'crop={DIGITS}',
            'crop=!!int ore', f'crop={DEEP[:9000]}', 'crop=&a [*a]', f'crop={"x" * 10**6}', f'{"x" * 10**6}=1',
            f'moe_experts=[{"x" * 10**5}]', f'manifest={"x" * 10**5}', 'manifest="a\\0b"', 'output="a\\0b"',
            'checkpoints="a\\0b"', f'base={"x" * 10**5}']


@pytest.mark.parametrize('setting', SETTINGS, ids=lambda s: s[:30])
def test_settings(here, tally, capsys, setting):
    argv = 'train', '--config', ROOT / 'params.yaml', '--stage', 1, '--set', setting
    tally.held(setting[:30], refusal(capsys, cli.main, *argv))


def notebook(source):
    cell = dict(id='a', cell_type='code', metadata=dict(tags=['parameters']), outputs=[], execution_count=None,
                source=source)
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[cell]))


@pytest.mark.parametrize('content', [DEEP, 'null', LATIN, '{}', notebook('a = ' + '(' * 5000), notebook('a = \0')],
                         ids=['deep', 'null', 'not UTF-8', 'empty', 'brackets', 'zero'])
def test_notebooks_of_stages(here, tally, capsys, monkeypatch, content):
    path = put(here / 'stage.ipynb', content)
    monkeypatch.chdir(ROOT)
    tally.held('runner', refusal(capsys, runner.main, path, here / 'out.ipynb', 'ingest'))


# ---------------------------------------------------------------- models

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A restorer's folder, and a whole pipeline."
    from foundir_v2.inference import Recipe
    from foundir_v2.loading import load_pipeline, save_restorer
    root, pipe = tmp_path_factory.mktemp('models'), load_pipeline('tiny', device='cpu')
    save_restorer(pipe.unet, root / 'restorer', Recipe())
    pipe.save_pretrained(root / 'pipeline')
    return root


PARTS = {'restorer': ('pipeline.json', 'unet/config.json'),
         'pipeline': ('model_index.json', 'unet/config.json', 'vae/config.json', 'text_encoder/config.json',
                      'scheduler/scheduler_config.json', 'tokenizer/tokenizer_config.json',
                      'tokenizer/tokenizer.json')}
CONTENTS = {'deep': DEEP, 'null': 'null', 'not UTF-8': LATIN, 'digits': f'{{"base": {DIGITS}}}', 'list': '[]',
            'deep object': '{"a":' * 100_000, 'nothing': ''}


def test_configurations_of_models(here, models, tally, capsys, full):
    for kind, names in PARTS.items():
        for name in names:
            for content, text in CONTENTS.items():
                light = content == 'deep' and '/' not in name or content == 'null' and kind == 'restorer'
                if not (full or light): continue
                shutil.copytree(models / kind, 'model', dirs_exist_ok=True)
                put(f'model/{name}', text)
                argv = 'restore', 'one.png', 'out.png', '--model', 'model', '--device', 'cpu'
                tally.held(f'{kind}, {name}, {content}', refusal(capsys, cli.main, *argv))


@pytest.mark.parametrize('recipe', [
    '{"base": 3}', '{"base": null}', '{"base": ["a"]}', '{"base": ""}', '{"base": "a\\u0000b"}', '{"base": NaN}',
    f'{{"base": "{"x" * 10**5}"}}', f'{{"{"x" * 10**5}": 1}}', f'{{"default_start": {"[" * 200 + "]" * 200}}}',
    '{"default_num_inference_steps": 1e400}'], ids=lambda recipe: recipe[:30])
def test_recipes(here, models, tally, capsys, recipe):
    shutil.copytree(models / 'restorer', 'model')
    put('model/pipeline.json', recipe)
    tally.held(recipe[:30], refusal(capsys, cli.main, 'restore', 'one.png', 'out.png', '--model', 'model'))


@pytest.mark.parametrize('named', [
    dict(_class_name=['evil', 'Evil']), dict(unet=['evil', 'Evil']), dict(vae=['evil', 'PatchAutoencoderKL']),
    dict(extra=['os', 'system']), dict(unet=3)], ids=str)
def test_code_in_a_model_is_never_run(here, models, tally, capsys, named, full):
    if not full and 'extra' in named: pytest.skip('in make hostile')
    shutil.copytree(models / 'pipeline', 'model')
    index = json.loads(Path('model/model_index.json').read_text())
    put('model/model_index.json', json.dumps(index | named))
    code = f'open({str(here / "planted")!r}, "w")\nclass Evil: pass\nPatchAutoencoderKL = Evil\n'
    for folder in ('.', 'unet', 'vae'): put(f'model/{folder}/evil.py', code)
    fault = refusal(capsys, cli.main, 'restore', 'one.png', 'out.png', '--model', 'model', '--device', 'cpu')
    tally.held(str(named), 'its code was run' if Path('planted').exists() else fault)


# ---------------------------------------------------------------- logs, tables, captions

RECORD = '{"kind": "mixture", "step": 1e999, "weights": {"a": 1}, "scores": {"a": 2}}'
READERS = {  # a command, and the file that it reads
    'report': ('report x.json', 'x.json'), 'curves': ('mixture simulate x.json', 'x.json'),
    'law': ('mixture recommend x.json', 'x.json'), 'log': ('mixture simulate x.jsonl', 'x.jsonl'),
    'plot': ('mixture plot x.csv p.png', 'x.csv'), 'fit': ('mixture fit x.csv l.json', 'x.csv'),
    'captions': ('caption one.png texts --captioner csv:x.csv', 'x.csv')}


def test_small_files(here, tally, capsys):
    other = {'long': f'"{"x" * 10**6}"', 'numbers': '{"categories": 3, "mean": 4}', 'overflow': RECORD,
             'lists': f'{{"categories": {{"a": {"[" * 900 + "]" * 900}}}, "mean": {{}}}}'}
    for reader, (line, name) in READERS.items():
        for content, text in (CONTENTS | other).items():
            put(name, text if isinstance(text, bytes) else text + '\n{}\n' * (reader == 'log'))
            tally.held(f'{reader}, {content}', refusal(capsys, cli.main, *line.split()))


def test_texts_that_are_none(here, tally, capsys):
    put('in/a.txt', LATIN)
    tally.held('a sidecar', refusal(capsys, cli.main, 'caption', 'in/a.png', 'texts', '--captioner', 'sidecar'))
    restore = 'restore', 'in/a.png', 'out.png'
    tally.held('restore --caption', refusal(capsys, cli.main, *restore, '--caption', 'sidecar'))
    tally.held('--prompt', refusal(capsys, cli.main, *restore, '--prompt', '\udcff'))


@pytest.mark.parametrize('argv', [
    ['X'], ['restore', '--X'], ['restore', 'X', 'o.png'], ['restore', 'X*', 'o.png'],
    ['degrade', 'a', 'b', '--task', 'X'],
    ['evaluate', 'X'], ['evaluate', 'bicubic', '--metrics', 'X'], ['clean', 'in', '--limit', 'X'], ['report', 'X'],
    ['mixture', 'simulate', '--policy', 'X'], ['mixture', 'simulate', '--policy', f'des:alpha={DEEP[:20_000]}'],
    ['restore', 'one.png', 'o.png', '--model', 'X'], ['restore', 'one.png', 'o.png', '--device', 'X']],
    ids=lambda argv: ' '.join(argv)[:50])
def test_long_words(here, tally, capsys, argv):
    tally.held(' '.join(argv)[:50], refusal(capsys, cli.main, *(a.replace('X', 'x' * 10**5) for a in argv)))


# ---------------------------------------------------------------- manifests and wheels

def spoilt(manifest):
    "Manifests with holes and other kinds of values."
    for column in ('photo', 'path', 'split', 'width', 'height', 'verdict'):
        for rows in (slice(0, 1), slice(None)):
            bad = manifest.astype(object)
            bad.iloc[rows, bad.columns.get_loc(column)] = None
            yield f'{column} null in {"all" if rows.stop is None else "one"}', bad
    yield 'path 3', manifest.assign(path=3)
    yield 'width a', manifest.assign(width='a')
    yield 'path with a zero', manifest.assign(path='a\0b')
    yield 'long path', manifest.assign(path='x' * 10**5)
    yield 'another file', manifest.assign(path='/etc/passwd')
    yield 'long split', manifest.assign(split='x' * 10**4)
    yield 'empty', manifest[:0]


def test_manifests(here, bench, tally, capsys):
    evaluate = ['evaluate', 'bicubic', '--manifest', 'm.parquet', '--split', 'reference', '--task', 'haze',
                '--items', 1, '--size', 32, '--metrics', 'psnr']
    for name, bad in spoilt(pd.read_parquet(bench / 'manifest.parquet')):
        bad.to_parquet('m.parquet')
        tally.held(name, refusal(capsys, cli.main, *evaluate))
    for name, content in dict(deep=DEEP, nothing='', magic=b'PAR1' + bytes(100) + b'PAR1').items():
        put('m.parquet', content)
        tally.held(name, refusal(capsys, cli.main, *evaluate))


def zipped(content, encrypted=False):
    from foundir_v2.fetch import PHOTOS
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
        for photo in PHOTOS:
            if photo.package == 'thumbor': z.writestr(photo.member, content)
    data = file.getvalue()
    for head, flags in ((b'PK\x01\x02', 8), (b'PK\x03\x04', 6)) if encrypted else ():
        parts = data.split(head)
        data = parts[0] + b''.join(head + p[:flags - 4] + bytes([p[flags - 4] | 1]) + p[flags - 3:] for p in parts[1:])
    return data


@pytest.mark.parametrize('wheel', ['text', 'nothing', 'others', 'encrypted', 'bomb', 'folder'])
def test_wheels(here, tally, capsys, monkeypatch, wheel):
    import foundir_v2.fetch as fetch
    photos = [p for p in fetch.PHOTOS if p.package == 'thumbor']
    monkeypatch.setattr(fetch.fetch, '__defaults__', ('data', None, photos, fetch.WHEELS))
    monkeypatch.setattr(fetch, '_from_installed', lambda *_: None)
    path = Path(f'cache/{fetch.WHEELS["thumbor"].package}-{fetch.WHEELS["thumbor"].version}-py3-none-any.whl')
    content = dict(text='no zip', nothing='', others=zipped(b'x'), encrypted=zipped(b'x', True),
                   bomb=zipped(bytes(fetch.LARGEST + 1)) if wheel == 'bomb' else b'')
    path.mkdir(parents=True) if wheel == 'folder' else put(path, content[wheel])
    tally.held(wheel, refusal(capsys, cli.main, 'data', 'fetch', '--data-dir', 'data', '--cache-dir', 'cache'))


# ---------------------------------------------------------------- the edge

@pytest.mark.parametrize('error', [MemoryError(), RecursionError('maximum recursion depth exceeded'),
                                   OSError('x' * 10**6)], ids=lambda e: type(e).__name__)
def test_the_edge_of_every_command_line(here, tally, capsys, monkeypatch, error):
    def fail(*_, **__): raise error
    for module, name in ((cli, 'restore_batch'), (train, 'read_config'), (runner, 'run_stage')):
        monkeypatch.setattr(module, name, fail)
    tally.held('foundir-v2', refusal(capsys, cli.main, 'restore', 'one.png', 'out.png'))
    tally.held('foundir_v2.train', refusal(capsys, train.main, '--config', 'x.yaml'))
    tally.held('runner', refusal(capsys, runner.main, 'a.ipynb', 'b.ipynb'))
