"What the package promises to those who only install it."
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = ('dvc', 'dvclive', 'jupyterlab', 'jupyter_client', 'papermill', 'nbdev', 'nbformat', 'pyiqa', 'pandas',
             'pyarrow', 'matplotlib', 'skimage')
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / 'settings.ini')
normal = lambda s: re.sub(r'[-_.]+', '-', s).lower()

BLOCK = '''
import sys
class Without:
    "A finder that finds everything but the forbidden packages."
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *args):
        return None if name.split(".")[0] in {forbidden!r} else self.finder.find_spec(name, *args)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(f) for f in sys.meta_path]
'''


def run_without(forbidden, code):
    return subprocess.run([sys.executable, '-c', BLOCK.format(forbidden=set(forbidden)) + code], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.mark.parametrize('code, forbidden', [
    ('import foundir_v2.mixture', (*FORBIDDEN, 'fastcore', 'torch', 'diffusers', 'transformers', 'scipy', 'ruamel')),
    ('from foundir_v2.pipeline import FoundIRv2Pipeline', (*FORBIDDEN, 'scipy', 'ruamel', 'spandrel')),
    ('import foundir_v2.degrade, foundir_v2.tasks, foundir_v2.sampler', (*FORBIDDEN, 'fastcore', 'ruamel'))],
                         ids=lambda v: v if isinstance(v, str) else '')
def test_the_core_imports_without_the_extras(code, forbidden):
    done = run_without(forbidden, code)
    assert done.returncode == 0 and not done.stderr, done.stderr[-1500:]  # nor a warning before the first picture


def test_the_block_blocks():
    assert "No module named 'pandas'" in run_without(['pandas'], 'import pandas').stderr


def test_versions_agree():
    from importlib.metadata import version
    import foundir_v2
    assert foundir_v2.__version__ == SETTINGS['DEFAULT']['version'] == version('foundir_v2')
    assert SETTINGS['DEFAULT']['version'] in (ROOT / 'CHANGELOG.md').read_text()


def test_declared_core_covers_what_the_pipeline_imports():
    code = 'import foundir_v2.loading, foundir_v2.mixture\nprint(*sorted({n.split(".")[0] for n in sys.modules}))'
    done = subprocess.run([sys.executable, '-c', 'import sys\n' + code], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    loaded = set(done.stdout.split())
    rooms = ('pipeline', 'loading', 'solver', 'core', 'mixture', 'mixchecks')
    source = '\n'.join((ROOT / 'foundir_v2' / f'{m}.py').read_text() for m in rooms)
    ours = (set(re.findall(r'^\s*(?:import|from) (\w+)', source, re.M)) & loaded
            - set(sys.stdlib_module_names) - {'foundir_v2'})
    declared = {'PIL' if normal(r) == 'pillow' else r
                for r in re.findall(r"'([\w-]+)>=", re.search(r'core = \[[^]]*', (ROOT / 'setup.py').read_text())[0])}
    assert ours and ours <= declared


def test_lock_pins_everything_with_hashes():
    text = (ROOT / 'requirements.lock').read_text()
    assert '://' not in text
    entries = re.split(r'\n(?=[A-Za-z0-9])', text.strip())
    for entry in entries: assert re.match(r'[\w.-]+==[\w.+!]+', entry) and '--hash=sha256:' in entry, entry[:80]
    pinned = {normal(e.split('==')[0]) for e in entries}
    direct = {normal(re.match(r'[\w.-]+', line)[0])
              for line in (ROOT / 'requirements.in').read_text().splitlines() if line and not line.startswith('#')}
    needed = {normal(r) for r in re.findall(r"'([\w.-]+)(?:>=|==)", (ROOT / 'setup.py').read_text())}
    assert direct <= pinned
    assert needed <= pinned


def test_environment_is_the_locked_one():
    from importlib.metadata import PackageNotFoundError, version
    wrong = []
    for name, pin, marker in re.findall(r'^([\w.-]+)==([^ ;\\]+)(?: ; ([^\\]*))?',
                                        (ROOT / 'requirements.lock').read_text(), re.M):
        if marker: continue
        try: found = version(name)
        except PackageNotFoundError: found = None
        if found != pin: wrong.append(f'{name}: {found}, locked {pin}')
    assert not wrong, 'run make venv'


def test_assets_are_small_and_packaged():
    files = [p for p in (ROOT / 'foundir_v2' / 'assets').rglob('*') if p.is_file()]
    weights = sum(p.stat().st_size for p in files if p.suffix == '.safetensors')
    assert 0 < weights <= 25 * 2**20
    assert not [p for p in files if p.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl')], (
        'weights are shipped as safetensors')
    assert "'assets/**/*'" in (ROOT / 'setup.py').read_text()


def test_nothing_private_is_committed():
    files = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert files
    ignored = subprocess.run(['git', 'ls-files', '-ci', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    assert not ignored, 'a result or environment is in git'
    assert not [f for f in files if (ROOT / f).exists() and (ROOT / f).stat().st_size > 30 * 2**20]
