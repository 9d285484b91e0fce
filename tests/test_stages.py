"Dependencies of stages are what their notebooks import, no more and no less."
import json

import pytest

from foundir_v2.config import load_yaml
from foundir_v2.core import FoundIRError
from foundir_v2.stages import (
    code_deps, differences, import_closure, imported_modules, notebook_source, read_by, runner_arguments, update)

RUNNER = 'python -m foundir_v2.runner'


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / 'foundir_v2').mkdir()
    (tmp_path / 'nbs' / 'pipeline').mkdir(parents=True)
    for name, source in dict(core='', tasks='from .core import x', iqa='def f():\n    from foundir_v2.tasks import y',
                             cli='from . import iqa', __init__='__version__ = "1"', _modidx='').items():
        (tmp_path / 'foundir_v2' / f'{name}.py').write_text(source)
    notebook(tmp_path / 'nbs' / 'pipeline' / 'a.ipynb', 'from foundir_v2.iqa import f')
    notebook(tmp_path / 'nbs' / '00_core.ipynb', '')
    (tmp_path / 'dvc.yaml').write_text('# kept\nstages:\n  export:\n    cmd: nbdev_export\n  a:\n'
                                       f'    cmd: {RUNNER} nbs/pipeline/a.ipynb reports/a.ipynb one two\n    deps:\n'
                                       '    - data\n    - foundir_v2/cli.py\n    outs:\n'
                                       '    - reports/a.ipynb  # kept too\n')
    return tmp_path


def notebook(path, *sources):
    path.write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source='import foundir_v2.nothing')] + [
        dict(cell_type='code', source=s) for s in sources])))


def test_closure_follows_lazy_and_relative_imports(checkout):
    assert code_deps('nbs/pipeline/a.ipynb', checkout) == [
        'nbs/pipeline/a.ipynb', 'foundir_v2/core.py', 'foundir_v2/iqa.py', 'foundir_v2/tasks.py']
    assert import_closure('import foundir_v2.core as c', checkout) == ['foundir_v2/core.py']


@pytest.mark.parametrize('source, found', [
    ('import foundir_v2', set()),
    ('from foundir_v2 import __version__', set()),
    ('import foundir_v2.core.x', {'core'}),
    ('from foundir_v2.core import *', {'core'}),
    ('from .core import a', {'core'}),
    ('from . import core, iqa', {'core', 'iqa'}),
    ('import os, foundir_v2.core', {'core'}),
    ('from foundir_v2_other.core import a', set()),
    ('try:\n    import foundir_v2.iqa\nexcept ImportError: pass', {'iqa'})])
def test_spellings_of_imports(source, found): assert imported_modules(source) == found


def test_magics_are_no_python(tmp_path):
    notebook(tmp_path / 'n.ipynb', '%matplotlib inline\nimport foundir_v2.core', '!ls', '%%bash\nls -l',
             'if 1:\n    %time x = 1')
    assert imported_modules(notebook_source(tmp_path / 'n.ipynb')) == {'core'}


def test_a_missing_module_is_named(checkout):
    (checkout / 'foundir_v2' / 'tasks.py').unlink()
    with pytest.raises(FoundIRError, match='foundir_v2.tasks is imported but'):
        code_deps('nbs/pipeline/a.ipynb', checkout)


def test_update_replaces_code_and_keeps_data_and_comments(checkout):
    assert differences(checkout)
    changes = '\n'.join(update(checkout))
    assert '-foundir_v2/cli.py' in changes and '+foundir_v2/iqa.py' in changes and 'a.params: +one, +two' in changes
    text = (checkout / 'dvc.yaml').read_text()
    assert '# kept\n' in text and '# kept too' in text
    assert '    - data\n    - nbs/pipeline/a.ipynb\n    - foundir_v2/core.py\n' in text
    assert differences(checkout) == [] and update(checkout) == [] and (checkout / 'dvc.yaml').read_text() == text


def test_an_experiment_has_a_pipeline_of_its_own(checkout):
    "Its stages run at the root; a folder of results below nbs/ is data, so is a file of the package that is no code."
    folder = checkout / 'nbs' / 'trial'
    folder.mkdir()
    notebook(folder / 'b.ipynb', 'import foundir_v2.core')
    (folder / 'dvc.yaml').write_text(
        'stages:\n  b:\n    matrix:\n      seed: [0, 1]\n    wdir: ../..\n'
        f'    cmd: {RUNNER} nbs/trial/b.ipynb logs/b.ipynb --set seed=${{item.seed}}\n'
        '    deps:\n    - nbs/trial/results\n    - foundir_v2/assets/captions.csv\n    - foundir_v2/cli.py\n'
        '    params:\n    - kept\n')
    assert 'b.deps: +nbs/trial/b.ipynb, +foundir_v2/core.py, -foundir_v2/cli.py' in differences(checkout)
    update(checkout)
    assert differences(checkout) == []
    stage = load_yaml(folder / 'dvc.yaml')['stages']['b']
    assert stage['params'] == ['kept'] and stage['deps'] == [
        'nbs/trial/results', 'foundir_v2/assets/captions.csv', 'nbs/trial/b.ipynb', 'foundir_v2/core.py']


def test_a_new_import_is_a_difference(checkout):
    update(checkout)
    notebook(checkout / 'nbs' / 'pipeline' / 'a.ipynb', 'from foundir_v2.iqa import f', 'import foundir_v2.cli')
    assert differences(checkout) == ['a.deps: +foundir_v2/cli.py']
    (checkout / 'foundir_v2' / 'new.py').touch()
    assert 'export.outs: +foundir_v2/new.py' in differences(checkout)


def test_only_runner_commands_have_arguments():
    assert runner_arguments('nbdev_export') is None
    assert runner_arguments(f'{RUNNER} a.ipynb b.ipynb one two') == ('a.ipynb', ['one', 'two'])
    assert (runner_arguments(f'{RUNNER} a.ipynb b.ipynb one --set n=3 two=three --params=x.yaml')
            == ('a.ipynb', ['one', 'three']))


def test_params_are_the_keys_that_are_read(checkout):
    (checkout / 'params.yaml').write_text('one:\n  x: 1\ntwo:\n  y: 2\nmixture:\n  tasks: null\n  options: {}\n'
                                          'train_stage1:\n  steps: 1\n')
    assert read_by(['one', 'two'], checkout) == ['one', 'two']
    assert read_by(['mixture', 'train_stage1'], checkout) == ['mixture.tasks', 'mixture.start', 'train_stage1']
    (checkout / 'params.yaml').write_text('mixture:\n  tasks: null\n  options: {}\ntrain_stage1:\n  update_every: 1\n')
    assert read_by(['mixture', 'train_stage1'], checkout) == ['mixture', 'train_stage1']
    with pytest.raises(FoundIRError, match='unknown section three'): read_by(['three'], checkout)
