"The command line: exit codes, one-line errors, folders, and nothing lost."
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foundir_v2 import batch, cli, cli_mixture
from foundir_v2.pictures import as_float, load_pixels, save_picture
from foundir_v2.targets import is_broken

ROOT = Path(__file__).resolve().parents[1]


def picture(path, size=(16, 12), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


@dataclass
class Resolved:
    "Stands in for the pipeline's settings."
    upscale: float
    given: dict


class Enlarge:
    "Stands in for the pipeline: enlarges, adds noise from the generator, records its calls."
    calls = []
    config = dict(default_num_inference_steps=4, default_tile_size=64)

    def set_progress_bar_config(self, **kw): pass

    def __call__(self, image, generator, output_type, upscale=1, **options):
        self.calls.append(options)
        big = torch.nn.functional.interpolate(as_float(image)[None], scale_factor=upscale, mode='nearest')[0]
        return type('Output', (), dict(images=[(big + 0.1 * torch.rand(big.shape, generator=generator)).clamp(0, 1)]))


@pytest.fixture
def enlarge(monkeypatch):
    import foundir_v2.loading, foundir_v2.pipeline
    loaded = []
    monkeypatch.setattr(
        foundir_v2.loading, 'load_pipeline',
        lambda name, device, dtype, **more: loaded.append((name, device, dtype, *more.values())) or Enlarge())
    monkeypatch.setattr(foundir_v2.pipeline, 'resolve_settings',
                        lambda pipe, upscale, **given: Resolved(upscale, given))
    monkeypatch.setattr(Enlarge, 'calls', [])
    return loaded


def run(*argv):
    return cli.main([str(a) for a in argv])


@pytest.mark.parametrize('argv', [
    [], ['restore'], ['degrade'], ['data'], ['data', 'fetch'], ['data', 'shards'],
    ['clean'], ['report'], ['caption'], ['train'],
    ['evaluate'], ['benchmark'], ['mixture'], ['mixture', 'update'], ['mixture', 'show'], ['mixture', 'simulate'],
    ['mixture', 'fit'], ['mixture', 'recommend'], ['mixture', 'plot'], ['mixture', 'replay']], ids=' '.join)
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as done: cli.main([*argv, '--help'])
    assert done.value.code == 0 and 'usage: foundir-v2' in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = ('import sys\nfrom foundir_v2 import cli\ntry: cli.main(["restore", "--help"])\nexcept SystemExit: pass\n'
            'print(sorted({"torch", "numpy", "diffusers", "PIL", "pandas"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith('[]'), done.stdout + done.stderr


def test_every_command_of_the_parser_is_tested_for_help():
    choices = next(a for a in cli.parser()._actions if getattr(a, 'choices', None)).choices
    assert set(choices) >= {'restore', 'degrade', 'data', 'clean', 'caption', 'train', 'evaluate', 'report', 'mixture'}


def test_restore_a_file(tmp_path, enlarge):
    src, out = picture(tmp_path / 'a.jpg'), tmp_path / 'new' / 'b.png'
    assert run('restore', src, out, '--upscale', 2, '--steps', 3, '--seed', 5) == 0
    assert Image.open(out).size == (32, 24) and enlarge == [('tiny', None, None)]
    assert Enlarge.calls == [dict(num_inference_steps=3)]
    first = out.read_bytes()
    # who made it is written nowhere
    assert run('restore', src, out, '--upscale', 2, '--seed', 6) == 2 and out.read_bytes() == first
    assert run('restore', src, out, '--upscale', 2, '--seed', 5, '--force') == 0 and out.read_bytes() == first
    assert run('restore', src, out, '--upscale', 2, '--seed', 6, '--force') == 0 and out.read_bytes() != first


def test_a_file_gives_the_same_alone_and_in_a_folder(tmp_path, enlarge):
    for name in ('a.png', 'b.png', 'deep/c.png'): picture(tmp_path / 'in' / name)
    assert run('restore', tmp_path / 'in', tmp_path / 'out') == 0
    assert run('restore', tmp_path / 'in' / 'b.png', tmp_path / 'b.png') == 0
    assert (tmp_path / 'out' / 'b.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
    assert (tmp_path / 'out' / 'deep' / 'c.png').exists() and len(enlarge) == 2


def test_one_bad_file_does_not_stop_the_others(tmp_path, enlarge, capsys):
    for name in ('a.png', 'c.png'): picture(tmp_path / 'in' / name)
    (tmp_path / 'in' / 'b.png').write_bytes((tmp_path / 'in' / 'a.png').read_bytes()[:100])
    (tmp_path / 'in' / 'd.png').touch()
    assert run('restore', tmp_path / 'in', tmp_path / 'out') == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('foundir-v2:')]
    assert len(lines) == 3 and 'b.png' in lines[0] and 'd.png' in lines[1] and '2 of 4 files failed' in lines[2]
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['a.png', 'c.png', 'restore.jsonl']
    assert [r['output'] for r in records(tmp_path / 'out')] == ['a.png', 'c.png']


def test_what_a_folder_holds_already(tmp_path, enlarge, capsys):
    "Ours: whole ones are kept, spoilt ones made again, edited ones left. Others': left."
    for name in ('a.png', 'b.jpg', 'c.png', 'd.webp', 'e.png'): picture(tmp_path / 'in' / name, (64, 48))
    command, out = ('restore', tmp_path / 'in', tmp_path / 'out', '--compare'), tmp_path / 'out'
    assert run(*command) == 0 and len(Enlarge.calls) == 5
    for name in ('a.png', 'b.jpg', 'd.webp', 'c.compare.png'): (out / name).write_bytes((out / name).read_bytes()[:-40])
    first = (out / 'e.png').read_bytes()
    assert run(*command) == 0 and len(Enlarge.calls) == 9 and '1 of 5 are done' in capsys.readouterr().err
    assert not any(is_broken(p) for p in out.iterdir()) and (out / 'e.png').read_bytes() == first
    picture(out / 'a.png', (32, 32))
    for name in ('c.png', 'a.png'):
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        assert run(*command) == 2 and len(Enlarge.calls) == 9 and 'a.png was changed after' in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(*command, '--skip-existing') == 0 and len(Enlarge.calls) == 9
    (out / 'restore.jsonl').unlink()
    capsys.readouterr()
    assert run(*command) == 2 and '(and 9 more)' in capsys.readouterr().err
    assert run(*command, '--force') == 0 and len(Enlarge.calls) == 14 and len(records(out)) == 5


def test_a_run_killed_between_line_and_file_goes_on(tmp_path, enlarge, monkeypatch):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'in' / name)
    import foundir_v2.core
    replace, command = foundir_v2.core.os.replace, ('restore', tmp_path / 'in', tmp_path / 'out')
    def killed(source, target):
        if Path(target).name == 'b.png': raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(foundir_v2.core.os, 'replace', killed)
    assert run(*command) == 130 and [r['output'] for r in records(tmp_path / 'out')] == ['a.png', 'b.png']
    assert not (tmp_path / 'out/b.png').exists()
    monkeypatch.setattr(foundir_v2.core.os, 'replace', replace)
    assert run(*command) == 0 and len(Enlarge.calls) == 3 and (tmp_path / 'out/b.png').exists()


def test_a_full_disk_ends_the_batch(tmp_path, enlarge, monkeypatch, capsys):
    import errno
    for i in range(5): picture(tmp_path / 'in' / f'{i}.png')
    def no_room(self, data): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', no_room)
    assert run('restore', tmp_path / 'in', tmp_path / 'out') == 2 and len(Enlarge.calls) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('foundir-v2:')]
    assert len(lines) == 1 and '0.png' in lines[0] and 'no space left' in lines[0]
    assert [p.name for p in (tmp_path / 'out').iterdir()] == []


def test_skip_existing_goes_on(tmp_path, enlarge):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'in' / name)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'a.png').write_text('done before')
    assert run('restore', tmp_path / 'in', tmp_path / 'out', '--skip-existing') == 0
    assert (tmp_path / 'out' / 'a.png').read_text() == 'done before' and len(Enlarge.calls) == 1


def records(folder):
    return [json.loads(line) for line in (folder / 'restore.jsonl').read_text().splitlines()]


def test_an_interrupted_folder_goes_on(tmp_path, enlarge, monkeypatch, capsys):
    for name in ('a.png', 'b.jpg', 'deep/c.png'): picture(tmp_path / 'in' / name)
    command = ('restore', tmp_path / 'in', tmp_path / 'out', '--steps', 3, '--seed', 7)
    real, made = batch.restore_file, []
    def interrupted(pipe, source, *rest):
        if len(made) == 1: raise KeyboardInterrupt
        made.append(source.name)
        real(pipe, source, *rest)
    monkeypatch.setattr(batch, 'restore_file', interrupted)
    assert run(*command) == 130 and made == ['a.png']
    with open(tmp_path / 'out/restore.jsonl', 'a') as f: f.write('{"output": "b.jpg", "key"')  # and cut short
    monkeypatch.setattr(batch, 'restore_file',
                        lambda pipe, source, *rest: made.append(source.name) or real(pipe, source, *rest))
    for again, expected in ((command, ['a.png', 'b.jpg', 'c.png']), (command, ['a.png', 'b.jpg', 'c.png'])):
        assert run(*again) == 0 and made == expected
    # the model isn't even loaded when nothing is to be done
    assert '3 of 3 are done' in capsys.readouterr().err and len(enlarge) == 2
    made.clear()
    assert run(*command, '--force') == 0 and len(made) == 3  # forced
    assert run(*command[:-1], 8) == 0 and len(made) == 6  # another seed
    picture(tmp_path / 'in/b.jpg', (20, 20))
    (tmp_path / 'out/a.png').unlink()
    assert run(*command[:-1], 8) == 0 and sorted(made[6:]) == ['a.png', 'b.jpg']  # another input, a lost result


def test_a_line_per_picture(tmp_path, enlarge):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'in' / name)
    assert run('restore', tmp_path / 'in', tmp_path / 'out', '--steps', 3, '--seed', 5, '--prompt', 'a cat') == 0
    first, second = records(tmp_path / 'out')
    assert (first['output'], first['input'], first['seed'], first['prompt'], first['model']) == (
        'a.png', str(tmp_path / 'in/a.png'), 5, 'a cat', 'tiny')
    # two pictures of the same bytes
    assert first['settings']['given'] == dict(num_inference_steps=3) and 0 <= first['seconds'] < 60
    assert first['peak_memory'] > 2**20 and first['key'] == second['key']
    assert run('restore', tmp_path / 'in/a.png', tmp_path / 'one.png', '--log', tmp_path / 'logs/my.jsonl') == 0
    assert json.loads((tmp_path / 'logs/my.jsonl').read_text())['output'] == '../one.png'
    assert not (tmp_path / 'restore.jsonl').exists()


def test_globs_and_several_inputs(tmp_path, enlarge, capsys):
    for name in ('a.png', 'b.jpg', 'deep/c.png', 'deep/er/d.png'): picture(tmp_path / 'in' / name)
    (tmp_path / 'in/notes.txt').touch()
    tree = lambda folder: sorted(p.relative_to(folder).as_posix()
                                 for p in folder.rglob('*') if p.is_file() and p.suffix != '.jsonl')
    for i, (inputs, expected) in enumerate([
        ((tmp_path / 'in/**/*.png',), ['a.png', 'deep/c.png', 'deep/er/d.png']),
        ((tmp_path / 'in/*',), ['a.png', 'b.jpg']),
        ((tmp_path / 'in/a.png', tmp_path / 'in/b.jpg', tmp_path / 'in/deep', tmp_path / 'in/*.jpg'),
         ['a.png', 'b.jpg', 'c.png', 'er/d.png'])]):
        assert run('restore', *inputs, tmp_path / f'out{i}') == 0 and tree(tmp_path / f'out{i}') == expected
    assert run('restore', tmp_path / 'in/**/*.png', tmp_path / 'in/new') == 0
    assert run('restore', tmp_path / 'in/**/*.png', tmp_path / 'in/new', '--force') == 0
    assert tree(tmp_path / 'in/new') == ['a.png', 'deep/c.png', 'deep/er/d.png']  # results are no inputs
    picture(tmp_path / 'in/odd[1].png')
    assert run('restore', tmp_path / 'in/odd[1].png', tmp_path / 'odd.png') == 0  # a file by that name comes first
    capsys.readouterr()
    for inputs in ((tmp_path / 'in/*.gif',), (tmp_path / 'in/a.png', tmp_path / 'in/nothing.png'),
                   (tmp_path / 'in', picture(tmp_path / 'other/a.png'))):
        assert run('restore', *inputs, tmp_path / 'out9') == 2 and capsys.readouterr().err.count('\n') == 1


def test_before_and_after(tmp_path, enlarge):
    picture(tmp_path / 'a.jpg')
    assert run('restore', tmp_path / 'a.jpg', tmp_path / 'b.png', '--upscale', 2, '--compare') == 0
    strip = load_pixels(tmp_path / 'b.compare.png')
    assert strip.shape == (3, 24, 32 + 8 + 32) and torch.equal(strip[..., 40:], load_pixels(tmp_path / 'b.png'))
    assert (strip[..., 32:40] == 255).all()
    mine = picture(tmp_path / 'in/a.compare.png').read_bytes()
    picture(tmp_path / 'in/b.png')
    assert run('restore', tmp_path / 'a.jpg', tmp_path / 'in/a.png', '--compare') == 2
    assert (tmp_path / 'in/a.compare.png').read_bytes() == mine and not (tmp_path / 'in/a.png').exists()
    picture(tmp_path / 'in/a.png')
    assert run('restore', tmp_path / 'in', tmp_path / 'out', '--compare') == 2 and not (tmp_path / 'out').exists()


def test_sixteen_bits_stay(tmp_path, enlarge, capsys):
    wide = torch.linspace(0.4, 0.41, 12 * 16).view(1, 12, 16).expand(3, -1, -1)
    save_picture(wide, tmp_path / 'a.png', alpha=wide[:1], bits=16)
    Image.fromarray((wide[0].numpy() * 65535).astype(np.uint16)).save(tmp_path / 'grey.png')
    for name in ('a', 'grey'):
        assert run('restore', tmp_path / f'{name}.png', tmp_path / f'{name}16.png') == 0
        assert load_pixels(tmp_path / f'{name}16.png', background=None).dtype == torch.uint16
        assert run('restore', tmp_path / f'{name}.png', tmp_path / f'{name}8.png', '--bits', 8) == 0
        assert load_pixels(tmp_path / f'{name}8.png', background=None).dtype == torch.uint8
        assert run('restore', tmp_path / f'{name}.png', tmp_path / f'{name}.jpg') == 0
    picture(tmp_path / 'b.jpg')
    assert run('restore', tmp_path / 'b.jpg', tmp_path / 'out.png', '--bits', 16) == 0
    assert load_pixels(tmp_path / 'out.png').dtype == torch.uint16
    capsys.readouterr()
    assert run('restore', tmp_path / 'b.jpg', tmp_path / 'c.jpg', '--bits', 16) == 2
    assert '16 bits' in capsys.readouterr().err


def test_presets_and_what_overrules_them(tmp_path, enlarge):
    src = picture(tmp_path / 'a.png')
    assert run('restore', src, tmp_path / 'b.png', '--preset', 'paper', '--guidance', 2, '--tile-overlap', 0.25) == 0
    assert Enlarge.calls[-1] == dict(num_inference_steps=20, guidance_scale=2.0, start='lq', tile_size=1024,
                                     tile_overlap=0.25)
    assert run('restore', src, tmp_path / 'b.png', '--force', '--preset', 'fast') == 0
    assert Enlarge.calls[-1] == dict(num_inference_steps=4, guidance_scale=1.0, tile_overlap=0.125)
    assert run('restore', src, tmp_path / 'b.png', '--force', '--preset', 'low-memory', '--device', 'cpu') == 0
    assert Enlarge.calls[-1] == dict(tile_size=64, tile_batch=1, vae_tile_size=64)
    assert enlarge[-1] == ('tiny', 'cpu', 'auto', 'none')
    assert run('restore', src, tmp_path / 'b.png', '--force', '--preset', 'low-memory', '--device', 'cpu', '--dtype',
               'float32') == 0
    assert enlarge[-1][2] == 'float32'


def test_captions_come_before_the_model(tmp_path, enlarge, capsys):
    for name in ('a.png', 'b.png', 'c.png'): picture(tmp_path / 'in' / name)
    (tmp_path / 'in/a.txt').write_text('a red house'); (tmp_path / 'in/c.txt').touch()
    assert run('restore', tmp_path / 'in', tmp_path / 'out', '--caption', 'sidecar') == 2
    assert Enlarge.calls == [dict(prompt='a red house'), {}]
    assert [r['prompt'] for r in records(tmp_path / 'out')] == ['a red house', '']
    assert 'b.txt' in capsys.readouterr().err and len(enlarge) == 1
    for bad in (('--caption', 'magic'), ('--caption', f'vlm:{tmp_path}/nothing'),
                ('--caption', 'sidecar', '--prompt', 'a cat')):
        assert run('restore', tmp_path / 'in', tmp_path / 'new', *bad) == 2 and capsys.readouterr().err.count('\n') == 1
    assert len(enlarge) == 1  # none of them loaded the restorer


@pytest.mark.parametrize('bad, words', [
    (('--steps', 0), '--steps: expected a whole number from 1 to 1000'), (('--steps', 10**9), 'to 1000'),
    (('--guidance', -1), '--guidance: expected'), (('--upscale', 0.5), '--upscale: expected'),
    (('--upscale', 1000), 'from 1 to 16'), (('--tile-overlap', 1), 'from 0 and below 1'),
    (('--tile-size', -16), '--tile-size'), (('--tile-batch', 0), '--tile-batch'),
    (('--guidance-interval', 0.5, 0.2), 'guidance_interval'), (('--seed', 2**64 - 1), 'to 9223372036854775807'),
    (('--memory-limit', 'inf'), "got 'inf'"), (('--max-pixels', 10**13), '--max-pixels: expected'),
    (('--preset', 'best'), 'invalid choice'), (('--stepz', 3), '--stepz')], ids=str)
def test_bad_settings_are_refused_once_before_anything_starts(tmp_path, enlarge, capsys, bad, words):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'in' / name)
    assert run('restore', tmp_path / 'in', tmp_path / 'out', *bad) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and words in err and not enlarge and not (tmp_path / 'out').exists()


def test_settings_that_only_the_model_can_judge_are_refused_once(tmp_path, capsys):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'in' / name)
    for bad, words in ((('--tile-size', 50), 'multiple of 16'), (('--noise-scheduler', 'karras'), 'choose from ddim')):
        assert run('restore', tmp_path / 'in', tmp_path / 'out', '--device', 'cpu', *bad) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('foundir-v2:')]
        assert len(err) == 1 and words in err[0]


def test_a_batch_from_python(tmp_path, enlarge):
    for name in ('a.png', 'deep/b.gif'): picture(tmp_path / 'in' / name)
    config = batch.RestoreConfig(input=(tmp_path / 'in',), output=tmp_path / 'out', num_inference_steps=3,
                                 guidance_interval=[0, 0.5])
    assert batch.restore_batch(config) == 0 and (tmp_path / 'out/deep/b.png').exists()
    assert Enlarge.calls[-1] == dict(num_inference_steps=3, guidance_interval=(0.0, 0.5))
    assert batch.restore_batch(config) == 0 and len(Enlarge.calls) == 2
    for bad in (dict(num_inference_steps=10**9), dict(upscale=float('nan')), dict(input=()), dict(bits=12),
                dict(seed=-1)):
        with pytest.raises(ValueError, match=f'restore.{next(iter(bad))}: expected'):
            batch.RestoreConfig(**{'input': ('in',), 'output': 'out', **bad})


def test_a_training_stages_folder_restores(tmp_path):
    import shutil
    from foundir_v2.base import assets_path
    shutil.copytree(assets_path('tiny') / 'unet', tmp_path / 'stage/unet')
    (tmp_path / 'stage/pipeline.json').write_text((assets_path('tiny') / 'pipeline.json').read_text())
    assert run('restore', picture(tmp_path / 'a.png'), tmp_path / 'b.png', '--model', tmp_path / 'stage', '--device',
               'cpu') == 0
    assert run('restore', tmp_path / 'a.png', tmp_path / 'c.png', '--model', 'tiny', '--device', 'cpu') == 0
    difference = load_pixels(tmp_path / 'b.png').int() - load_pixels(tmp_path / 'c.png').int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize('mode, suffix, expected', [
    ('RGBA', '.png', 'RGBA'), ('RGBA', '.jpg', 'RGB'), ('CMYK', '.png', 'RGB'), ('L', '.webp', 'RGB'),
    ('1', '.png', 'RGB')])
def test_colour_modes(tmp_path, enlarge, mode, suffix, expected):
    src = picture(tmp_path / ('a.tif' if mode == 'CMYK' else 'a.png'), mode=mode)
    assert run('restore', src, tmp_path / f'b{suffix}', '--upscale', 2) == 0
    assert (Image.open(tmp_path / f'b{suffix}').mode, Image.open(tmp_path / f'b{suffix}').size) == (expected, (32, 24))


def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path, enlarge, capsys):
    good, empty = picture(tmp_path / 'a.png'), tmp_path / 'empty.png'
    empty.touch()
    (tmp_path / 'none').mkdir()
    blocked = tmp_path / 'file'
    blocked.write_text('not a folder')
    for argv, words in [((tmp_path / 'x.png', tmp_path / 'y.png'), 'x.png'),
                        ((empty, tmp_path / 'y.png'), 'empty'),
                        ((good, good), 'input itself'),
                        ((good, tmp_path / 'y.gif'), 'suffix'),
                        ((tmp_path / 'none', tmp_path / 'out'), 'no pictures'),
                        ((good, blocked / 'y.png'), "can't write"),
                        ((tmp_path / 'none', blocked), 'is a file'),
                        ((good, tmp_path / 'y.png', '--max-pixels', 100), 'more than 100 pixels')]:
        assert run('restore', *argv) == 2, argv
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and err.startswith('foundir-v2: ') and words in err, err
    assert not enlarge and not (tmp_path / 'y.png').exists()


def test_outputs_inside_the_input_folder_are_not_inputs(tmp_path, enlarge):
    picture(tmp_path / 'a.png')
    for _ in range(2): assert run('restore', tmp_path, tmp_path / 'restored', '--force') == 0
    assert [p.name for p in tmp_path.rglob('*.png')].count('a.png') == 2 and len(Enlarge.calls) == 2


def test_bugs_stay_visible(tmp_path, monkeypatch):
    import foundir_v2.degrade
    monkeypatch.setattr(foundir_v2.degrade, 'degrade', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run('degrade', picture(tmp_path / 'a.png'), tmp_path / 'b.png', '--task', 'haze')


def test_a_missing_extra_says_what_to_install(capsys, monkeypatch):
    def run_without(args): raise ModuleNotFoundError("No module named 'pyiqa'", name='pyiqa')
    monkeypatch.setattr(cli_mixture, 'run_mixture_show', run_without)
    assert run('mixture', 'show', 'x.csv') == 2 and "pip install 'foundir_v2[all]'" in capsys.readouterr().err


def test_degrade_is_the_librarys(tmp_path, capsys):
    from foundir_v2.core import load_image
    from foundir_v2.degrade import degrade
    src = picture(tmp_path / 'a.png', (64, 64))
    assert run('degrade', src, tmp_path / 'b.png', '--task', 'haze', '--seed', 3) == 0
    assert torch.allclose(load_image(tmp_path / 'b.png'), degrade(load_image(src), 'haze', 3), atol=0.6 / 255)
    assert run('degrade', '--list') == 0 and 'haze' in capsys.readouterr().out
    assert run('degrade', src, tmp_path / 'c.png') == 2
    assert run('degrade', src, tmp_path / 'c.png', '--task', 'fog') == 2
    assert run('degrade', src, tmp_path / 'd.png', '--task', 'haze', '--severity', 'severe') == 0
    assert torch.allclose(load_image(tmp_path / 'd.png'), degrade(load_image(src), 'haze', 0, 'severe'), atol=0.6 / 255)
    assert run('degrade', src, tmp_path / 'c.png', '--task', 'haze', '--severity', 'awful') == 2
    assert not (tmp_path / 'c.png').exists()


@pytest.mark.parametrize('scale', ['raw', 'relative', 'zscore'])
def test_mixture_log_is_the_whole_state(tmp_path, capsys, scale):
    from foundir_v2.mixture import DataEquilibrium
    des, log = DataEquilibrium(['a', 'b'], alpha=0.3, score_scale=scale, floor=0.05), tmp_path / 'log.csv'
    for step, scores in [(0, dict(a=20.0, b=30.0)), (10, dict(a=19.0, b=31.0)), (20, dict(a=21.5, b=31.0)),
                         (30, dict(a=21.0, b=29.0))]:
        assert run('mixture', 'update', log, *(f'{k}={v}' for k, v in scores.items()), '--step', step, '--alpha', 0.3,
                   '--floor', 0.05, '--score-scale', scale) == 0
        assert json.loads(capsys.readouterr().out) == pytest.approx(des.update(scores, step), abs=1e-6)
    assert run('mixture', 'show', log) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and '(19.00)' in table[2]
    before = log.read_bytes()
    for bad in [['a=1', 'b=2', '--step', 30], ['a=1', '--step', 40], ['a=x', 'b=1', '--step', 40],
                ['a=1', 'c=1', '--step', 40], ['a=1', 'a=2', 'b=3', '--step', 40]]:
        assert run('mixture', 'update', log, *bad, '--alpha', 0.3) == 2
        assert capsys.readouterr().err.count('\n') == 1
    assert log.read_bytes() == before


def test_mixture_from_small_runs_to_a_schedule(tmp_path, capsys):
    from foundir_v2.mixlaw import spread_mixtures
    from foundir_v2.mixture import ReplayMixture
    lines = ['run,task,weight,score']
    for i, w in enumerate(spread_mixtures(['a', 'b', 'c'], 12)):
        lines += [f'{i},{t},{w[t]},{28 - missing * np.exp(-2 * w[t])}' for t, missing in zip('abc', (2, 4, 8))]
    (tmp_path / 'runs.csv').write_text('\n'.join(lines) + '\n')
    assert run('mixture', 'fit', tmp_path / 'runs.csv', tmp_path / 'law.json') == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and [line.split()[0] for line in table[1:]] == ['a', 'b', 'c']
    assert all(27 < float(line.split()[1]) < 29 for line in table[1:])
    shares = {}
    for objective in ('mean', 'worst', 'a=1,b=0,c=0'):
        assert run('mixture', 'recommend', tmp_path / 'law.json', '--objective', objective, '--floor', 0.05, '--csv',
                   tmp_path / 'best.csv', '--force') == 0
        shares[objective] = {line.split()[0]: float(line.split()[1])
                             for line in capsys.readouterr().out.splitlines()[1:]}
        assert ReplayMixture(tmp_path / 'best.csv').at(10**6) == pytest.approx(shares[objective], abs=6e-4)
        assert sum(shares[objective].values()) == pytest.approx(1, abs=2e-3)
    assert shares['mean']['c'] > shares['mean']['b'] > shares['mean']['a']
    assert shares['worst'] == pytest.approx(shares['mean'], abs=0.02)
    assert shares['a=1,b=0,c=0']['a'] == pytest.approx(0.9)


def test_mixture_record_plot_and_replay(tmp_path, capsys):
    from foundir_v2.mixture import ReplayMixture
    log = tmp_path / 'log.csv'
    for step in (0, 100, 200):
        assert run('mixture', 'update', log, f'a={20 + step / 50}', 'b=30', '--step', step, '--alpha', 0.3) == 0
    assert run('mixture', 'plot', log, tmp_path / 'new' / 'log.svg') == 0
    assert b'<svg' in (tmp_path / 'new' / 'log.svg').read_bytes()
    assert run('mixture', 'replay', log, tmp_path / 'long.csv', '--stretch', 150) == 0
    assert '3 mixtures, the last from step 30000 on' in capsys.readouterr().out
    assert (ReplayMixture(tmp_path / 'long.csv').at(29_999)
            == ReplayMixture(log).at(199) != ReplayMixture(tmp_path / 'long.csv').at(30_000))


def test_mixture_simulate(tmp_path, capsys):
    argv = ('mixture', 'simulate', '--policy', 'fixed', '--policy', 'des:alpha=0.3,score_scale=relative', '--seeds', 2,
            '--updates', 3, '--csv', tmp_path / 'r.csv', '--picture', tmp_path / 'r.png', '--save-curves',
            tmp_path / 'c.json')
    assert run(*argv) == 0
    first = capsys.readouterr().out
    assert 'fixed' in first and 'score_scale=relative' in first and (tmp_path / 'r.png').stat().st_size > 3000
    assert (tmp_path / 'r.csv').read_text().startswith('policy,runs,regret,error\n')
    assert run('mixture', 'simulate', tmp_path / 'c.json', *argv[2:]) == 2  # its curves would be replaced
    assert run('mixture', 'simulate', tmp_path / 'c.json', *argv[2:-2]) == 2
    assert run('mixture', 'simulate', tmp_path / 'c.json', *argv[2:-2], '--force') == 0
    assert capsys.readouterr().out == first
    assert run('mixture', 'simulate', '--policy', 'fixed', '--seeds', 1, '--updates', 3) == 0
    assert '±' not in capsys.readouterr().out.splitlines()[1]


def test_mixture_tools_refuse_bad_input_in_one_line(tmp_path, capsys):
    (tmp_path / 'log.csv').write_text('step,task,weight,score\n0,a,0.5,1\n0,b,0.5,1\n')
    (tmp_path / 'off.csv').write_text('step,task,weight,score\n0,a,0.5,1\n0,b,0.6,1\n')
    (tmp_path / 'noise.json').write_bytes(b'\xff\x00')
    (tmp_path / 'log.jsonl').write_text('{"kind": "mixture"}\n')
    out = tmp_path / 'out'
    for argv, words in [(('simulate', tmp_path / 'none.json'), 'none.json'),
                        (('simulate', '--policy', 'dse'), 'the choices are'),
                        (('simulate', '--policy', 'des'), 'alpha'),
                        (('simulate', '--seeds', 0), '--seeds: expected'),
                        (('simulate', '--interval', 'nan'), 'above 0'),
                        (('simulate', tmp_path / 'log.csv'), 'samples per training step'),
                        (('simulate', tmp_path / 'log.csv', '--samples-per-step', 8), 'at least 5'),
                        (('simulate', tmp_path / 'noise.json'), 'noise.json'),
                        (('simulate', tmp_path / 'log.jsonl'), 'line 1'),
                        (('simulate', '--seeds', 1, '--updates', 2, '--policy', 'fixed', '--picture', f'{out}.txt'),
                         'out.txt'),
                        (('simulate', tmp_path), 'directory'),
                        (('fit', tmp_path / 'log.csv', out), 'column run'),
                        (('fit', tmp_path / 'noise.json', out), 'noise.json'),
                        (('fit', tmp_path / 'none.csv', out), 'none.csv'),
                        (('recommend', tmp_path / 'log.csv'), 'no mixing law'),
                        (('recommend', tmp_path / 'log.csv', '--objective', 'a=x'), 'objective'),
                        (('plot', tmp_path / 'none.csv', f'{out}.png'), 'none.csv'),
                        (('plot', tmp_path / 'log.csv', f'{out}.txt'), 'out.txt'),
                        (('plot', tmp_path / 'log.csv', out), 'out'),
                        (('plot', tmp_path / 'noise.json', f'{out}.png'), 'noise.json'),
                        (('replay', tmp_path / 'off.csv', out), 'sum to 1.1'),
                        (('replay', tmp_path / 'log.csv', out, '--stretch', 0), 'stretch'),
                        (('replay', tmp_path / 'log.csv', out, '--stretch', 'nan'), 'stretch')]:
        assert run('mixture', *argv) == 2, argv
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and err.startswith('foundir-v2: ') and words in err, (argv, err)
    assert not list(tmp_path.glob('out*')) and not list(tmp_path.glob('.*'))
    assert run('mixture', 'simulate', '--objective', 'median') == 2 and 'choose from' in capsys.readouterr().err


def test_captions_are_copied_from_sidecars(tmp_path):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'in' / name)
    (tmp_path / 'in' / 'a.txt').write_text('a red house')
    assert run('caption', tmp_path / 'in', tmp_path / 'out', '--captioner', 'sidecar') == 2  # b has none
    (tmp_path / 'in' / 'b.txt').touch()
    # a.txt is there
    assert run('caption', tmp_path / 'in', tmp_path / 'out', '--captioner', 'sidecar') == 2
    assert not (tmp_path / 'out/b.txt').exists()
    assert run('caption', tmp_path / 'in', tmp_path / 'out', '--captioner', 'sidecar', '--skip-existing') == 0
    assert (
        {p.name: p.read_text().strip() for p in (tmp_path / 'out').iterdir()} == {'a.txt': 'a red house', 'b.txt': ''})
    assert run('caption', tmp_path / 'in' / 'a.png', tmp_path / 'one', '--captioner', 'sidecar') == 0
    assert (tmp_path / 'one' / 'a.txt').exists()
    assert run('caption', tmp_path / 'in', tmp_path / 'out', '--captioner', 'magic') == 2
    assert run('caption', tmp_path / 'in', tmp_path / 'in', '--captioner', 'sidecar', '--force') == 2  # onto themselves


def test_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'foundir_v2.cli', 'restore', 'nothing.png', str(tmp_path / 'o.png')],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '') and done.stderr.count('\n') == 1
    done = subprocess.run([sys.executable, '-m', 'foundir_v2.cli', 'restore', '--stepz', '3'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'foundir-v2 restore --help' in done.stderr


def test_data_fetch_leaves_pictures_of_ones_own(tmp_path, capsys, monkeypatch):
    import foundir_v2.fetch as fetch
    fetched = []
    monkeypatch.setattr(fetch, 'fetch', lambda folder, cache_dir, sources: fetched.append(sources) or Path(folder))
    (tmp_path / 'data/train').mkdir(parents=True)
    (tmp_path / 'data/train/a.png').write_text('mine')
    assert run('data', 'fetch', '--data-dir', tmp_path / 'data') == 0
    said = capsys.readouterr().out
    assert 'pictures of your own' in said and '.cache/fetched/weights' in said and fetched == [fetch.WEIGHTS]
    assert [p.name for p in (tmp_path / 'data').rglob('*')] == ['train', 'a.png']


def test_data_fetch_reports_what_is_there(tmp_path, capsys, monkeypatch):
    import foundir_v2.fetch as fetch
    def three_files(data_dir, cache_dir):
        Path(data_dir).mkdir()
        (Path(data_dir) / 'SOURCES.csv').write_bytes(fetch.sources_csv(fetch.PHOTOS[:3]))
        return Path(data_dir)
    monkeypatch.setattr(fetch, 'fetch', three_files)
    assert run('data', 'fetch', '--data-dir', tmp_path / 'data') == 0
    assert '3 files, checked' in capsys.readouterr().out


def test_clean_judges_a_folder(tmp_path, capsys):
    import pandas as pd
    rng = np.random.default_rng(0)
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(tmp_path / 'flat.png')
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / 'noisy.png')
    (tmp_path / 'broken.png').write_text('no picture')
    assert run('clean', tmp_path, '--limit', 'noise=0.02,0.05', '--csv', tmp_path / 'out.csv') == 0
    table = pd.read_csv(tmp_path / 'out.csv').set_index('photo')
    assert (table.loc['flat.png', 'noise'] < 0.001) and table.loc['noisy.png', 'noise'] > 0.05
    assert 'noise' in table.loc['noisy.png', 'reason'] and table.verdict.nunique() == 2
    assert table.verdict['broken.png'] == table.verdict['noisy.png']
    capsys.readouterr()
    for bad in (['--limit', 'noise'], ['--limit', 'fog=1,2'], ['--metrics', 'psnr']):
        assert run('clean', tmp_path, *bad) == 2 and capsys.readouterr().err.count('\n') == 1
    assert run('clean', tmp_path / 'nothing') == 2


def test_clean_asks_other_judges_in_processes_and_writes_a_page(tmp_path, capsys):
    import pandas as pd
    rng = np.random.default_rng(0)
    for i in range(3): Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f'{i} ü.png')
    page, table = tmp_path / 'sheet.html', tmp_path / 'out.csv'
    options = ['--judges', 'traces,statistics', '--limit', 'noise=4,6', '--contact-sheet', page, '--csv', table]
    assert run('clean', tmp_path, *options, '--num-workers', 2) == 0
    measured = pd.read_csv(table)
    assert {'veil', 'jpeg_step', 'noise'} <= set(measured) and (measured.verdict == 'rejected').all()
    assert page.read_text(encoding='utf-8').count('<figure') == 3
    capsys.readouterr()
    assert run('clean', tmp_path, *options, '--force') == 0
    assert pd.read_csv(table).equals(measured)
    for bad in (['--judges', 'nobody'], ['--num-workers', '-1'], ['--contact-sheet', tmp_path / '0 ü.png']):
        assert run('clean', tmp_path, *bad) == 2 and capsys.readouterr().err.count('\n') == 1


def test_report_prints_the_metrics(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('report') == 2 and 'metrics/evaluate.json' in capsys.readouterr().err
    system = lambda psnr: dict(psnr=psnr, ssim=0.5, stlpips=0.25, piqe=40.0)
    tree = dict(categories=dict(deblur=dict(input=system(21.5), restored=system(26.25))),
                mean=dict(input=system(21.5), restored=system(26.25)))
    (tmp_path / 'm.json').write_text(json.dumps(tree))
    (tmp_path / 'reports').mkdir()
    (tmp_path / 'reports' / 'report.ipynb').touch()
    assert run('report', 'm.json') == 0
    out = capsys.readouterr().out
    assert '26.25' in out and 'deblur' in out and 'reports/report.ipynb' in out


@pytest.mark.parametrize('size', [(64, 48), (1, 1), (17, 130)])
def test_restore_with_real_weights(tmp_path, size):
    src = picture(tmp_path / 'a.png', size)
    assert run('restore', src, tmp_path / 'b.png', '--model', 'base', '--steps', 1, '--device', 'cpu') == 0
    assert Image.open(tmp_path / 'b.png').size == size
