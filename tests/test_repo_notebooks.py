"Notebooks are the source of truth: clean, complete, and the package is what they export."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / 'nbs').glob('[0-9][0-9]*_*.ipynb'))
STAGES = [p for folder in ('pipeline', 'contributions', 'experiments', 'compare')
          for p in sorted((ROOT / 'nbs' / folder).glob('*.ipynb'))]
OTHERS = ([p for folder in ('experiments', 'tutorials') for p in sorted((ROOT / 'nbs' / folder).glob('*.ipynb'))]
          + [ROOT / 'nbs' / 'index.ipynb'])
ALL = [*LIBRARY, *STAGES, *OTHERS]
name = lambda p: p.relative_to(ROOT / 'nbs').as_posix()
VOLATILE = [(r' at 0x[0-9a-f]{6,}', 'a memory address'), (re.escape(str(Path.home()) + '/'), 'a home folder'),
            (re.escape(str(ROOT) + '/'), 'the path of this checkout'), (r'/tmp/\w', 'a temporary path'),
            (r'\d+(\.\d+)?\s?it/s', 'a speed')]


def code(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']


@pytest.mark.parametrize('path', ALL, ids=name)
def test_format_and_ids(path):
    raw = json.loads(path.read_text(encoding='utf-8'))
    assert (raw['nbformat'], raw['nbformat_minor']) == (4, 5)
    nbformat.validate(nbformat.from_dict(raw))
    as_jupyter_writes = nbformat.writes(nbformat.read(path, 4)) + '\n'
    assert path.read_text(encoding='utf-8') == as_jupyter_writes, 'save it in Jupyter, or run make clean-notebooks'
    ids = [c.get('id') for c in raw['cells']]
    assert all(ids) and len(set(ids)) == len(ids)
    assert path.stat().st_size < 2**20
    assert set(raw['metadata']) <= {'kernelspec', 'language_info'}
    for c in raw['cells']: assert set(c['metadata']) <= {'tags'}, f'{c["id"]}: run make clean-notebooks'


@pytest.mark.parametrize('path', [*LIBRARY, *OTHERS], ids=name)
def test_saved_outputs_are_clean(path):
    for cell in code(path):
        assert cell.execution_count is None
        for output in cell.outputs:
            assert output.output_type != 'error', f'{cell.id} ends in an error'
            assert output.get('name') != 'stderr', f'{cell.id} has messages on stderr'
            text = output.get('text', '') + ''.join(
                v for k, v in output.get('data', {}).items() if k.startswith('text/'))
            for pattern, what in VOLATILE: assert not re.search(pattern, text), f'{cell.id} shows {what}: {text[:200]}'


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stages_hold_no_outputs_and_no_logic(path):
    from foundir_v2.runner import notebook_parameters
    nb = nbformat.read(path, 4)
    notebook_parameters(nb, path.name)
    for cell in code(path):
        assert not cell.outputs and cell.execution_count is None, f'{cell.id}: run make clean-notebooks'
        defined = [n for n in ast.walk(ast.parse(cell.source))
                   if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        assert not defined, f'{cell.id} defines {defined[0].name}: logic belongs in a library notebook'
        assert '#| export' not in cell.source


def test_export_leaves_no_difference(tmp_path):
    for part in ('nbs', 'foundir_v2'):
        shutil.copytree(ROOT / part, tmp_path / part,
                        ignore=shutil.ignore_patterns('assets', '__pycache__', 'pipeline', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    for module in (tmp_path / 'foundir_v2').glob('*.py'):
        if module.name != '__init__.py': module.unlink()
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path,
                   check=True)
    exported = {p.name: p.read_text(encoding='utf-8') for p in (tmp_path / 'foundir_v2').glob('*.py')}
    committed = {p.name: p.read_text(encoding='utf-8') for p in (ROOT / 'foundir_v2').glob('*.py')}
    assert sorted(exported) == sorted(committed), (
        'a module without a notebook, or a notebook that was not exported: run make export')
    assert [n for n in exported if exported[n] != committed[n]] == [], 'run make export'


def test_every_module_names_its_notebook():
    for module in (ROOT / 'foundir_v2').glob('*.py'):
        if module.stem in ('__init__', '_modidx'): continue
        source = re.search(r'File to edit: \.\./(\S+)\.ipynb', module.read_text(encoding='utf-8'))
        assert source, f'{module.name} was not generated from a notebook'
        assert (ROOT / (source[1] + '.ipynb')).is_file(), f'{module.name}: its notebook {source[1]} is gone'


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_library_notebooks_hold_to_the_form(path):
    nb = nbformat.read(path, 4)
    cells = code(path)
    assert re.search(rf'^#\| default_exp {path.stem.partition("_")[2]}$', cells[0].source, re.M), (
        'the first code cell names the module, as the file is named')
    head = next(c.source for c in nb.cells if c.cell_type == 'markdown').splitlines()
    assert head[0].startswith('# ') and any(line.startswith('> ') for line in head[1:4]), (
        'title and one-line summary come first')
    assert len(next(line for line in head if line.startswith('> '))) <= 116, 'the summary does not fit into a line'
    wide = [c.id for c in cells if '\n\n\n' in c.source]
    assert not wide, f'{wide}: one blank line is between the definitions of a cell'
    exported = [c for c in cells if re.search(r'^#\|\s*export', c.source, re.M)]
    shown = [c for c in cells if not re.search(r'^#\|\s*(export|hide|default_exp)', c.source, re.M)]
    assert exported and shown
    for cell in exported:
        assert len(cell.source.splitlines()) <= 45, f'{cell.id} has {len(cell.source.splitlines())} lines: split it'
    prose = sum(len(c.source.split()) for c in nb.cells if c.cell_type == 'markdown')
    assert prose >= 150, f'{prose} words of prose'


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_imports_go_to_lower_numbers(path):
    from foundir_v2.stages import imported_modules
    number = {name: n for n, _, name in (p.stem.partition('_') for p in LIBRARY)}  # 18 < 18a < 20
    exported = '\n'.join(c.source for c in code(path) if re.search(r'^#\|\s*export', c.source, re.M))
    lazy = {m for n in ast.walk(ast.parse(exported)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            for m in imported_modules(ast.unparse(n))}
    for module in imported_modules(exported) - lazy:
        assert number[module] < path.stem.partition('_')[0], f'{path.stem} imports {module}, which has a higher number'


def test_nobody_imports_the_package_called_tests():
    for path in [*ROOT.glob('tests/*.py'), *ROOT.glob('foundir_v2/*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or '']
                     if isinstance(node, ast.ImportFrom) and not node.level else [])
            assert not [n for n in names if n.split('.')[0] == 'tests'], (
                f'{path.name}: `tests` is a package that another distribution installs')


def test_readme_is_current(tmp_path):
    subprocess.run([sys.executable, '.ci/readme.py', str(tmp_path / 'README.md')], cwd=ROOT, check=True)
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == (ROOT / 'README.md').read_text(encoding='utf-8'), (
        'run make readme')


def test_files_named_in_the_readme_exist():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    paths = set(re.findall(r'\b(?:nbs|profiles|tests)/[\w/]+\.\w+', text)) | {
        t for t in re.findall(r'\]\(([^)#]+)\)', text) if '://' not in t}
    assert paths
    missing = sorted(p for p in paths if not (ROOT / p).exists())
    assert not missing
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.M))
    assert set(re.findall(r'\bmake ([a-z-]+)', text.replace('make up', ''))) <= targets
