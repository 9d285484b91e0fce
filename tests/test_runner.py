"The runner: strict parameters, reports that appear whole or not at all, nobody left behind."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from foundir_v2.config import load_params
from foundir_v2.runner import (RunnerError, _temporary, assign, check_interpreter, check_parameters, checkout,
                               notebook_parameters, read_sections, set_value, strip_volatile)

ROOT = checkout()


def read_parameters(sections, wanted, settings, path): return assign(*read_sections(sections, settings, path), wanted)


def notebook(path: Path, *sources, tag='parameters'):
    cells = [nbformat.v4.new_code_cell(s, id=f'c{i}') for i, s in enumerate(sources)]
    if tag: cells[0].metadata['tags'] = [tag]
    kernel = dict(name='python3', language='python', display_name='python3')
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)
    return path


def run(*argv, **kw):
    return subprocess.run([sys.executable, '-m', 'foundir_v2.runner', *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, **kw)


@pytest.fixture
def params(tmp_path):
    path = tmp_path / 'params.yaml'
    path.write_text('a:\n  x: 1\n  flag: true\nb:\n  names: [u, v]\n  nothing: null\n')
    return path


def test_values_arrive_with_their_types_and_reports_repeat(tmp_path, params):
    src = notebook(tmp_path / 's.ipynb', 'x = 0\nflag = False\nnames = []\nnothing = 0',
                   'print(repr((x, flag, names, nothing)), object())')
    out = tmp_path / 'deep' / 'r.ipynb'
    reports = []
    for _ in range(2):
        done = run(src, out, 'a', 'b', '--params', params, '--set', 'x=2.5')
        assert done.returncode == 0, done.stderr
        assert "(2.5, True, ['u', 'v'], None)" in done.stdout
        reports.append(out.read_bytes())
    assert reports[0] == reports[1] and b' at 0x' not in reports[0] and b'start_time' not in reports[0]
    assert [p.name for p in out.parent.iterdir()] == ['r.ipynb']


def test_sets_of_names_must_be_equal(tmp_path, params):
    done = run(notebook(tmp_path / 's.ipynb', 'x = 0\nflag = 1\nnames = 2\nmore = 4'), tmp_path / 'r.ipynb', 'a', 'b',
               '--params', params)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert "doesn't know the parameters nothing and misses a value for more (sections: a, b; " in done.stderr
    assert not (tmp_path / 'r.ipynb').exists()


def test_parameters_cell_is_found_and_literal(tmp_path):
    read = lambda *a, **k: notebook_parameters(nbformat.read(notebook(tmp_path / 's.ipynb', *a, **k), 4))
    assert read('a: int = 1\nb = {"k": [1, None]}\nc = -1e-3') == dict(a=1, b=dict(k=[1, None]), c=-1e-3)
    for bad in ['import os', 'a = b = 1', 'a = [1][0]', 'a.b = 1', 'a, b = 1, 2', 'print(1)']:
        with pytest.raises(RunnerError, match='line 1'): read(bad)
    with pytest.raises(RunnerError, match='found 0'): read('a = 1', tag=None)


def test_a_section_is_a_mapping_or_its_keys(params):
    assert read_parameters(['a', 'b'], ['x', 'flag', 'b'], (), params) == dict(
        x=1, flag=True, b=dict(names=['u', 'v'], nothing=None))
    assert read_parameters(['mine=b'], ['mine'], (), params) == dict(mine=dict(names=['u', 'v'], nothing=None))
    params.write_text('a:\n  x: 1\nb:\n  x: 2\n')
    with pytest.raises(RunnerError, match='x is given twice'): read_parameters(['a', 'b'], ['x'], (), params)


def test_settings_find_their_section(params):
    assert read_parameters(['a'], ['x', 'flag'], ['x=null'], params) == dict(x=None, flag=True)
    assert read_parameters(['b'], ['b'], ['b.names=[w]', 'b.nothing=3'], params) == dict(b=dict(names=['w'], nothing=3))
    assert read_parameters(['a'], ['x', 'flag', 'stage'], ['stage=2'], params) == dict(x=1, flag=True, stage=2)
    for bad, words in {'x': 'expected key=value', 'a=1': 'a is a section', 'a.x.y=1': 'there is no a.x',
                       'x=[1': "can't read --set x as YAML"}.items():
        with pytest.raises(ValueError, match=words): read_parameters(['a'], ['x', 'flag'], [bad], params)
    tree = dict(a=dict(x=1))
    assert set_value(tree, ['a'], 'y=2') == dict(y=2) and set_value(tree, ['a'], 'a.x=2') == {}
    assert tree == dict(a=dict(x=2))


def test_check_parameters_accepts_equal_sets():
    check_parameters(['a'], ['a'], 'n')
    with pytest.raises(RunnerError): check_parameters([], ['a'], 'n')


def test_failure_keeps_the_report_and_the_evidence(tmp_path, params):
    src = notebook(tmp_path / 's.ipynb', 'x = 0\nflag = 0', 'raise RuntimeError(f"no {x}")')
    out = tmp_path / 'test-runner-failure.ipynb'
    out.write_text('the old report')
    failed = ROOT / 'logs' / 'test-runner-failure.failed.ipynb'
    try:
        done = run(src, out, 'a', '--params', params)
        assert done.returncode == 1 and 'RuntimeError: no 1' in done.stderr and '\x1b' not in done.stderr
        assert out.read_text() == 'the old report' and 'RuntimeError' in failed.read_text()
        assert not list(tmp_path.glob('.*running*'))
    finally: failed.unlink(missing_ok=True)


def test_a_copy_takes_the_interpreter_that_its_lock_pins(tmp_path):
    "As `dvc exp run --temp` makes it: no .venv, and a Python that was built from the same lock."
    venv, copy = tmp_path / 'venv', tmp_path / 'copy'
    for folder in (venv, copy): folder.mkdir()
    (copy / 'requirements.lock').write_text('torch==2\n')
    # nobody knows what is installed there
    with pytest.raises(RunnerError, match='make venv'): check_interpreter(copy, prefix=str(venv))
    (venv / 'requirements.lock').write_text('torch==1\n')
    with pytest.raises(RunnerError, match='make venv'): check_interpreter(copy, prefix=str(venv))
    (venv / 'requirements.lock').write_text('torch==2\n')
    check_interpreter(copy, prefix=str(venv))
    (copy / '.venv').mkdir()
    with pytest.raises(RunnerError, match='make venv'): check_interpreter(copy, prefix=str(venv))  # it has its own


@pytest.mark.parametrize('changes, words', [
    (['train_stage1.conditioning_init=identiy'], 'train_stage1.conditioning_init: expected one of zero, identity'),
    (['train_stage2.loss=l3'], 'train_stage2.loss: expected one of l1, l2, rmse, psnr'),
    (['model.moe=sotf'], 'model.moe: expected one of soft, hard'),
    (['train.mixed_precision=fp8'], 'train.mixed_precision: expected one of auto, no, bf16, fp16'),
    (['mixture.policy=dse'], 'mixture.policy: expected one of fixed'),
    (['evaluate.metrics=[pnsr]'], r"evaluate.metrics\[0\]: expected one of"),
    (['train.weight_decay=-1', 'train.batch_size=1000000000', 'evaluate.split=tets'],
     'train.batch_size: .* train.weight_decay: .* evaluate.split')])
def test_bad_parameters_stop_any_stage_before_a_kernel_starts(tmp_path, monkeypatch, capsys, changes, words):
    "The ingest stage reads none of these."
    from foundir_v2 import runner
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, 'execute', lambda *a, **k: pytest.fail('a kernel was started'))
    params = load_params(ROOT / 'params.yaml')
    for change in changes: assert set_value(params, list(params), change) == {}
    (tmp_path / 'params.yaml').write_text(json.dumps(params))
    assert runner.main(['nbs/pipeline/ingest.ipynb', str(tmp_path / 'r.ipynb'), 'ingest', '--params',
                        str(tmp_path / 'params.yaml')]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and re.search(words, error)


def test_other_interpreters_are_refused(tmp_path):
    check_interpreter(ROOT)
    (tmp_path / '.venv').mkdir()
    with pytest.raises(RunnerError, match='make venv'): check_interpreter(tmp_path)
    base = os.path.realpath(sys.executable)  # the interpreter that .venv was made from: it has none of our packages
    done = subprocess.run([base, '-S', '-m', 'foundir_v2.runner', 'a', 'b'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is not this repository's" in done.stderr and 'Traceback' not in done.stderr


def test_leftovers_of_dead_processes_go_and_live_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    left, kept = (tmp_path / f'.r.{pid}.running.ipynb' for pid in (dead.pid, 1))
    left.touch(), kept.touch()
    assert _temporary(tmp_path / 'r.ipynb').name == f'.r.{os.getpid()}.running.ipynb'
    assert kept.exists() and not left.exists()


def test_strip_numbers_random_ids_consistently():
    text = 'T_abcde T_12345 T_abcde 123e4567-e89b-12d3-a456-426614174000'
    cell = nbformat.v4.new_code_cell('', id='a', outputs=[nbformat.v4.new_output('stream', text=text)])
    stripped = strip_volatile(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs[0].text
    assert stripped == f'T_00000 T_00001 T_00000 {2:036d}'


@pytest.mark.skipif(os.name != 'posix', reason='process groups')
@pytest.mark.parametrize('victim, wait_for', [('shell', 'runner'), ('runner', 'kernel')])
def test_nobody_outlives_a_killed_parent(tmp_path, params, victim, wait_for):
    pid_file = tmp_path / 'kernel.pid'
    src = notebook(tmp_path / 's.ipynb', 'x = 0\nflag = 0',
                   f'import os, time; open({str(pid_file)!r}, "w").write(str(os.getpid())); time.sleep(300)')
    # "; true" keeps the shell alive
    command = f'{sys.executable} -m foundir_v2.runner {src} {tmp_path / "r.ipynb"} a --params {params}; true'
    caller = subprocess.Popen([sys.executable, '-c', f'import subprocess; subprocess.run(["sh", "-c", {command!r}])'],
                              cwd=ROOT)
    try:
        deadline = time.time() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.time() < deadline and caller.poll() is None
            time.sleep(0.1)
        kernel = psutil.Process(int(pid_file.read_text()))
        runner = kernel.parent()
        assert 'foundir_v2.runner' in runner.cmdline()
        (caller if victim == 'shell' else runner).send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([runner, kernel], timeout=20)
        assert not alive
        assert not (tmp_path / 'r.ipynb').exists()
    finally:
        caller.kill()
        caller.wait()


def test_what_libraries_warn_of_at_import_is_not_shown(tmp_path, params):
    src = notebook(tmp_path / 's.ipynb', 'x = 0\nflag = 0', 'import bitsandbytes, tqdm.auto, warnings',
                   'warnings.warn("this one is")')
    done = run(src, tmp_path / 'r.ipynb', 'a', '--params', params)
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == 2 and 'UserWarning: this one is' in said[0], said


@pytest.mark.skipif(os.name != 'posix', reason='signals')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('kind', ['saves', 'plain'])
def test_a_stage_that_is_stopped_may_save_first(tmp_path, params, number, kind):
    "The runner alone gets the signal, as by Ctrl-C: the kernel has a session of its own."
    touch = lambda name: f'open({str(tmp_path / name)!r}, "w").close()\n'
    wait = 'with leaving_later() as noted:\n    while not noted(): time.sleep(.05)\n'
    body = dict(plain='time.sleep(300)', saves=f'{wait}{touch("saved")}raise Stopped(noted(), "step 3 is saved")')
    begin = 'import time\nfrom foundir_v2.process import Stopped, leaving_later\n' + touch('begun')
    src = notebook(tmp_path / 's.ipynb', 'x = 0\nflag = 0', begin + body[kind], touch('next'))
    command = [sys.executable, '-m', 'foundir_v2.runner', src, tmp_path / 'r.ipynb', 'a', '--params', params]
    runner = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not (tmp_path / 'begun').exists():
        assert time.time() < deadline and runner.poll() is None
        time.sleep(.1)
    os.killpg(runner.pid, number)
    said = runner.communicate(timeout=60)[1]
    assert runner.returncode == 128 + number and 'Traceback' not in said, said
    assert ('step 3 is saved' in said and (tmp_path / 'saved').exists()) or kind == 'plain'
    assert not (tmp_path / 'next').exists() and not (tmp_path / 'r.ipynb').exists()
    (ROOT / 'logs/r.failed.ipynb').unlink()
