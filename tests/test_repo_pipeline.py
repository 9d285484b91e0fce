"dvc.yaml, params.yaml and the pipeline notebooks say the same thing."
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from foundir_v2.config import declarations, load_params, load_yaml, overlay, parse_yaml
from foundir_v2.params import SECTIONS, STAGES as TRAINING, check_params
from foundir_v2.runner import assign, check_parameters, notebook_parameters, parser, read_sections
from foundir_v2.settings import FLAT, PARTS, TrainConfig
from foundir_v2.stages import differences, expected_stage, library_notebooks, modules, runner_arguments

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = load_yaml(ROOT / 'dvc.yaml')
STAGES = {n: s.get('do', s) for n, s in PIPELINE['stages'].items()}
NOTEBOOK_STAGES = {n: runner_arguments(s['cmd']) for n, s in STAGES.items() if runner_arguments(s['cmd'])}
PROFILES = {p.stem: p.read_text(encoding='utf-8') for p in sorted((ROOT / 'profiles').glob('*.yaml'))}
path_of = lambda entry: entry if isinstance(entry, str) else next(iter(entry))
outputs = lambda stage: [path_of(o) for key in ('outs', 'metrics', 'plots') for o in stage.get(key, [])]


def laid(profile):
    "The text of params.yaml with a profile."
    return overlay((ROOT / 'params.yaml').read_text(encoding='utf-8'), PROFILES[profile])


def test_dependencies_follow_from_the_imports():
    assert differences(ROOT) == [], 'run make export'


def test_the_folders_of_a_pool_are_what_ingestion_depends_on(tmp_path):
    for name in ('nbs', 'foundir_v2'): (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / 'params.yaml').read_text(encoding='utf-8')
    pool = 'datasets: [{name: a, root: /disk/a, layout: reside}, {name: b, root: sets/b, layout: div2k}]'
    (tmp_path / 'params.yaml').write_text(text.replace('datasets: null', pool))
    deps, usual = (expected_stage('ingest', STAGES['ingest'], root)['deps'] for root in (tmp_path, ROOT))
    assert deps == ['/disk/a', 'sets/b', *usual[1:]] and usual[0] == 'data'


def test_export_makes_every_module_from_every_notebook():
    export = STAGES['export']
    assert export['deps'] == library_notebooks(ROOT)
    assert export['outs'] == [{m: dict(cache=False, persist=True)} for m in modules(ROOT)]


def test_every_pipeline_notebook_is_a_stage():
    assert {src for src, _ in NOTEBOOK_STAGES.values()} == {
        p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs' / 'pipeline').glob('*.ipynb')}


@pytest.mark.parametrize('name', NOTEBOOK_STAGES)
def test_stage_is_named_as_its_report(name):
    src, _ = NOTEBOOK_STAGES[name]
    words = shlex.split(STAGES[name]['cmd'])
    assert words[4] == f'reports/{name}.ipynb' and words[4] in outputs(STAGES[name]) and src in STAGES[name]['deps']
    if name in TRAINING: assert src == 'nbs/pipeline/train.ipynb' and words[-2:] == ['--set', f'stage={TRAINING[name]}']
    else: assert src == f'nbs/pipeline/{name}.ipynb'


@pytest.mark.parametrize('profile', PROFILES)
@pytest.mark.parametrize('name', NOTEBOOK_STAGES)
def test_every_stage_gets_the_parameters_of_its_notebook(tmp_path, monkeypatch, name, profile):
    monkeypatch.chdir(ROOT)
    (tmp_path / 'params.yaml').write_text(laid(profile))
    args = parser().parse_args(shlex.split(STAGES[name]['cmd'])[3:])
    wanted = notebook_parameters(nbformat.read(ROOT / args.src, 4), args.src)
    values = assign(*read_sections(args.sections, args.set, tmp_path / 'params.yaml'), wanted)
    check_parameters(values, wanted, args.src, args.sections)
    if name in TRAINING:
        TrainConfig.from_sections(values['stage'], values['train_stage'],
                                  **{p: values[p] for p in PARTS if p in values})
        assert ('update_every' in values['train_stage']) == ('options' in values['mixture'])


def test_the_training_notebook_runs_on_its_own_defaults():
    values = notebook_parameters(nbformat.read(ROOT / 'nbs/pipeline/train.ipynb', 4))
    assert TrainConfig.from_sections(values['stage'], values['train_stage'], **{p: values[p] for p in PARTS}).steps == 2


def test_a_key_that_a_stage_does_not_read_is_no_dependency_of_it():
    reads = lambda stage, key: any(key == p or key.startswith(p + '.') for p in STAGES[stage]['params'])
    assert [s for s in NOTEBOOK_STAGES if reads(s, 'mixture.options.alpha')] == [*TRAINING]
    assert [s for s in NOTEBOOK_STAGES if reads(s, 'inference.start')] == ['train_stage1', 'train_stage2']
    assert [s for s in NOTEBOOK_STAGES if reads(s, 'train.caption_dropout')] == ['train_stage1', 'train_stage2']
    assert [s for s in NOTEBOOK_STAGES if reads(s, 'mixture.tasks')] == ['ingest', *TRAINING]


def test_every_section_is_used():
    used = {s for _, sections in NOTEBOOK_STAGES.values() for s in sections}
    assert set(load_params(ROOT / 'params.yaml')) == used


def test_a_parameter_is_declared_and_has_one_value():
    params = load_params(ROOT / 'params.yaml')
    assert set(params) == set(SECTIONS)
    for name, section in params.items():
        if name not in TRAINING: assert set(section) == set(declarations(SECTIONS[name]))
    fields = [f for part in FLAT.values() for f in declarations(part)]
    assert len(fields) == len(set(fields)), 'a field of two sections'


def pairs(values, base, where=''):
    "(key, value in the profile, value in params.yaml) of every leaf of a profile."
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            yield from pairs(value, base[key], f'{where}{key}.')
        else: yield where + key, value, base.get(key, ...)  # a policy's options replace those of another


@pytest.mark.parametrize('profile', PROFILES)
def test_profiles_hold_what_differs(profile):
    changes = parse_yaml(PROFILES[profile], profile)
    assert [key for key, value, base in pairs(changes, load_params(ROOT / 'params.yaml')) if value == base] == []
    check_params(parse_yaml(laid(profile), profile), ROOT)
    comments = lambda text: [line.partition('# ')[2] for line in text.splitlines() if '# ' in line]
    expected = (ROOT / 'params.yaml').read_text()
    if 'policy' in changes.get('mixture', {}):  # the options of another policy go with what is said about them
        expected = re.sub('(  options:.*\n)(    .*\n)+', r'\1', expected)
    assert comments(expected) == comments(laid(profile))


def test_the_profiles():
    assert set(PROFILES) == {'tiny', 'smoke', 'sdxl', 'released'} and laid('tiny') == (ROOT / 'params.yaml').read_text()


def test_make_profile_goes_there_and_back_and_keeps_edits(tmp_path):
    for part in ('profiles', '.ci', 'foundir_v2'):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns('assets'))
    shutil.copy(ROOT / 'params.yaml', tmp_path)
    git = lambda *args: subprocess.run(
        ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false', *args], cwd=tmp_path,
        check=True, capture_output=True)
    git('init', '-q'), git('add', 'params.yaml'), git('commit', '-qm', 'params')
    params, before = tmp_path / 'params.yaml', (ROOT / 'params.yaml').read_text()
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    profile = lambda name: subprocess.run([sys.executable, '.ci/profile.py', name], cwd=tmp_path, env=environment,
                                          capture_output=True, text=True)
    for name in ('sdxl', 'released', 'smoke', 'tiny'):
        done = profile(name)
        assert done.returncode == 0 and params.read_text() == laid(name), done.stderr
    assert params.read_text() == before
    params.write_text(edited := before.replace('steps: 3000', 'steps: 2999'))
    done = profile('smoke')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'changes of its own' in done.stderr
    assert params.read_text() == edited
    assert 'none of: released, sdxl, smoke, tiny' in profile('big').stderr


def test_every_dependency_comes_from_somewhere():
    made = {o for s in STAGES.values() for o in outputs(s)}
    for name, stage in STAGES.items():
        for dep in map(path_of, stage['deps']):
            known = (dep in made or any(dep.startswith(m + '/') for m in made) or dep == 'data'
                     or dep.startswith('data/') or (ROOT / dep).exists())
            assert known, f'{name} depends on {dep}, which no stage makes'


def test_outputs_have_one_stage_and_are_kept_out_of_git_or_in_it():
    made = [o for s in STAGES.values() for o in outputs(s)]
    assert len(made) == len(set(made))
    ignored = [line.strip('/') for line in (ROOT / '.gitignore').read_text().splitlines() if line.startswith('/')]
    for stage in STAGES.values():
        for entry in [o for key in ('outs', 'metrics', 'plots') for o in stage.get(key, [])]:
            cached = isinstance(entry, str) or entry[path_of(entry)].get('cache', True)
            assert cached == (path_of(entry).split('/')[0] in ignored), (
                f'{path_of(entry)}: cached outputs lie in ignored folders, the others in git')


def test_stages_find_their_interpreter_and_shell_neutral_commands():
    for stage in STAGES.values():
        assert re.fullmatch(r'(nbdev_export|python -m foundir_v2\.runner [\w/.= -]+)', stage['cmd'])


@pytest.mark.parametrize('profile', PROFILES)
def test_numbers_mean_the_same_to_every_yaml_reader(profile):
    import yaml
    for text in (PROFILES[profile], laid(profile)):
        assert yaml.safe_load(text) == parse_yaml(text, profile), 'write 1.0e-01, and quote words such as no'
