"dvc.yaml, params.yaml and the pipeline notebooks say the same thing."
import re
import shlex
from pathlib import Path

import nbformat
import pytest

from foundir_v2.config import load_params, load_yaml, merge_sections
from foundir_v2.runner import check_parameters, notebook_parameters
from foundir_v2.stages import differences, library_notebooks, modules, runner_arguments

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = load_yaml(ROOT / 'dvc.yaml')
STAGES = {n: s.get('do', s) for n, s in PIPELINE['stages'].items()}
NOTEBOOK_STAGES = {n: runner_arguments(s['cmd']) for n, s in STAGES.items() if runner_arguments(s['cmd'])}
PARAMETER_FILES = [ROOT / 'params.yaml', *sorted((ROOT / 'profiles').glob('*.yaml'))]
path_of = lambda entry: entry if isinstance(entry, str) else next(iter(entry))
outputs = lambda stage: [path_of(o) for key in ('outs', 'metrics', 'plots') for o in stage.get(key, [])]


def shape(value):
    "The keys of nested mappings. Lists and scalars are values: they may differ between profiles."
    return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else None


def test_dependencies_follow_from_the_imports():
    assert differences(ROOT) == [], 'run make export'


def test_export_makes_every_module_from_every_notebook():
    export = STAGES['export']
    assert export['deps'] == library_notebooks(ROOT)
    assert export['outs'] == [{m: dict(cache=False, persist=True)} for m in modules(ROOT)]


def test_every_pipeline_notebook_is_a_stage():
    assert {src for src, _ in NOTEBOOK_STAGES.values()} == {p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs' / 'pipeline').glob('*.ipynb')}


@pytest.mark.parametrize('name', NOTEBOOK_STAGES)
def test_stage_is_named_as_its_notebook_and_report(name):
    src, _ = NOTEBOOK_STAGES[name]
    report = shlex.split(STAGES[name]['cmd'])[4]
    assert (src, report) == (f'nbs/pipeline/{name}.ipynb', f'reports/{name}.ipynb')
    assert report in outputs(STAGES[name]) and src in STAGES[name]['deps']


@pytest.mark.parametrize('file', PARAMETER_FILES, ids=lambda p: p.name)
@pytest.mark.parametrize('name', NOTEBOOK_STAGES)
def test_sections_are_the_parameters_of_the_notebook(name, file):
    src, sections = NOTEBOOK_STAGES[name]
    wanted = notebook_parameters(nbformat.read(ROOT / src, 4), src)
    check_parameters(merge_sections(load_params(file), sections), wanted, src, sections)


def test_every_section_is_used():
    used = {s for _, sections in NOTEBOOK_STAGES.values() for s in sections}
    assert set(load_params(ROOT / 'params.yaml')) == used


@pytest.mark.parametrize('file', PARAMETER_FILES[1:], ids=lambda p: p.name)
def test_profiles_are_complete(file):
    assert {f.stem for f in PARAMETER_FILES} == {'params', 'smoke', 'sdxl'}
    assert shape(load_params(file)) == shape(load_params(PARAMETER_FILES[0]))


def test_every_dependency_comes_from_somewhere():
    made = {o for s in STAGES.values() for o in outputs(s)}
    for name, stage in STAGES.items():
        for dep in map(path_of, stage['deps']):
            known = dep in made or any(dep.startswith(m + '/') for m in made) or dep == 'data' or dep.startswith('data/') or (ROOT / dep).exists()
            assert known, f'{name} depends on {dep}, which no stage makes'


def test_outputs_have_one_stage_and_are_kept_out_of_git_or_in_it():
    made = [o for s in STAGES.values() for o in outputs(s)]
    assert len(made) == len(set(made))
    ignored = [line.strip('/') for line in (ROOT / '.gitignore').read_text().splitlines() if line.startswith('/')]
    for stage in STAGES.values():
        for entry in [o for key in ('outs', 'metrics', 'plots') for o in stage.get(key, [])]:
            cached = isinstance(entry, str) or entry[path_of(entry)].get('cache', True)
            assert cached == (path_of(entry).split('/')[0] in ignored), f'{path_of(entry)}: cached outputs lie in ignored folders, the others in git'


def test_stages_find_their_interpreter_and_shell_neutral_commands():
    for stage in STAGES.values(): assert re.fullmatch(r'(nbdev_export|python -m foundir_v2\.runner [\w/. -]+)', stage['cmd'])


@pytest.mark.parametrize('file', PARAMETER_FILES, ids=lambda p: p.name)
def test_numbers_mean_the_same_to_every_yaml_reader(file):
    import yaml
    assert yaml.safe_load(file.read_text()) == load_params(file), 'write 1.0e-01, and quote words such as no'
