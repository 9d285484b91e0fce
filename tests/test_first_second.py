"""A misspelling is refused before anything heavy is imported: in the first second.

What is counted is imports, not seconds. Choices are keys of tables; where the rows of a table are torch's modules, or
functions that use it, torch is imported to look into it, but nothing that builds on it."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = 'torch', 'diffusers', 'transformers', 'pyiqa', 'papermill', 'nbformat'
CODE = f"""import sys
from foundir_v2.{{}} import main
try: code = main(sys.argv[1:])
except SystemExit as e: code = e.code
print(code, *(m for m in {HEAVY} if m in sys.modules))"""


def refused(module, *argv):
    "The line on stderr, and which heavy packages were imported."
    done = subprocess.run([sys.executable, '-c', CODE.format(module), *argv], capture_output=True, text=True, cwd=ROOT)
    code, *heavy = done.stdout.split()
    assert code == '2' and done.stderr.count('\n') == 1, done.stderr
    return done.stderr, heavy


@pytest.mark.parametrize('setting, word', [
    ('loss=l3', 'l1, l2'), ('moe=sfot', 'soft, hard'), ('mixed_precision=fp17', 'auto, no'),
    ('optimizer=moun', 'adamw, adamw8bit, muon'), ('architecture=promptr', 'foundir_v2, promptir'),
    ('conditioning_init=identiy', 'zero, identity'),
    ('policy=dess', 'fixed, '),
    ('tasks={weather: [hazee]}', 'haze'), ('score={deblur: pnsr}', 'psnr'), ('inference={start: lqq}', 'lq, noise'),
    ('reference_options={prompt: captions}', 'none, caption'), ('stpes=3', 'steps'), ('crop=100', 'multiple of 8'),
    ('weight_decay=-1', 'from 0')])
def test_training(setting, word):
    said, heavy = refused('cli', 'train', '--config', 'params.yaml', '--stage', '1', '--set', setting)
    assert word in said and not heavy


@pytest.mark.parametrize('setting, word', [
    ('evaluate.split=tests', 'train, reference, test'), ('report.headline=pnsr', 'psnr'),
    ('clean.metrics=[pique]', 'piqe'), ('evaluate.subtasks=[hazee]', 'haze'), ('train_stage2.loss=l3', 'l1, l2'),
    ('ingest.datasets=[{name: a, root: b, layout: resid}]', 'reside'),
    ('inference.prompt=captions', 'none, caption'), ('evaluate.metrics=[pnsr]', 'psnr'), ('train.sede=1', 'seed')])
def test_stages(setting, word, tmp_path):
    "Whichever stage is asked for, a misspelling for any of them stops it."
    sections = 'ingest', 'clean', 'train', 'train_stage2', 'inference', 'evaluate', 'report'
    out = tmp_path / 'out.ipynb'
    said, heavy = refused('runner', 'nbs/pipeline/ingest.ipynb', str(out), *sections, '--set', setting)
    assert word in said and not heavy and not out.exists()


@pytest.mark.parametrize('argv, word', [
    ('restore a.png b.png --start lqq', "'lq', 'noise'"), ('restore a.png b.png --preset papre', "'paper'"),
    ('degrade a.png b.png --task hazee', 'haze'), ('evaluate bicubic --metrics pnsr', 'psnr'),
    ('evaluate bicubic --task hazee', 'haze'), ('mixture simulate --objective men', "'mean'"),
    ('mixture simulate --policy dess', 'des'), ('restore a.png b.png --upscale 1000', 'to 16')])
def test_commands(argv, word):
    said, heavy = refused('cli', *argv.split())
    assert word in said and not heavy


@pytest.mark.parametrize('setting, word', [
    ('model.moe_experts=[spatail]', 'spatial, channel'), ('manifest.captioner=shiped', 'shipped'),
    ('evaluate.systems={input: bicubc}', 'bicubic'), ('clean.limits={sharpness: [1, 2]}', 'detail'),
    ('evaluate.out_of_distribution.version=9', '1')])
def test_tables_of_torch(setting, word, tmp_path):
    section = setting.partition('.')[0]
    said, heavy = refused('runner', 'nbs/pipeline/ingest.ipynb', str(tmp_path / 'out.ipynb'), section, '--set', setting)
    assert word in said and set(heavy) <= {'torch'}
