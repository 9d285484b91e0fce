"Configuration is strict in both directions, never converts what it should not, and survives hostile files."
import argparse
import json
import math
import tracemalloc
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Interval, MinLen, MultipleOf, Unit
from hypothesis import given, settings, strategies as st

from foundir_v2.config import (ConfigError, OneOf, argument, check_fields, convert, describe, expected, from_dict,
                               load_params, load_yaml, overlay, parse_yaml, shown)


@dataclass(frozen=True)
class Inner:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner
    name: str | None = None
    limits: int | float | None = None
    sizes: list[int] = field(default_factory=list)
    parts: dict[str, Inner] = field(default_factory=dict)


GOOD = dict(steps=3, inner=dict(lr=0.1))


def test_nested_values_and_defaults():
    cfg = from_dict(Outer, GOOD | dict(parts=dict(a=dict(lr=2, betas=[1, 2]))))
    assert cfg == Outer(3, Inner(0.1), parts=dict(a=Inner(2.0, (1.0, 2.0))))
    with pytest.raises(FrozenInstanceError): cfg.steps = 4


@pytest.mark.parametrize('change, words', [
    (dict(stesp=1), 'unknown stesp; the choices are steps, inner'),
    (dict(inner={}), 'Outer.inner: missing lr'),
    (dict(steps='3'), "Outer.steps: expected a whole number, got '3'"),
    (dict(steps=3.5), 'expected a whole number'),
    (dict(steps=True), 'expected a whole number'),
    (dict(steps=None), 'expected a whole number'),
    (dict(inner=dict(lr='1e-3')), 'Outer.inner.lr: expected a number'),
    (dict(inner=dict(lr=math.nan)), 'expected a number, got nan'),
    (dict(inner=dict(lr=math.inf)), 'expected a number, got inf'),
    (dict(inner=dict(lr=10**400)), 'expected a number'),
    (dict(inner=dict(lr=1, betas=[1])), 'expected 2 values, got 1'),
    (dict(inner=3), 'expected a mapping'),
    (dict(sizes=3), 'expected a list'),
    (dict(sizes=[1, 'a']), r'Outer.sizes\[1\]'),
    (dict(parts=dict(a=dict(lr='x'))), 'Outer.parts.a.lr'),
    (dict(name=3), 'Outer.name: expected a text or null'),
    (dict(limits='x'), 'a whole number or a number')])
def test_bad_values_are_named(change, words):
    with pytest.raises(ConfigError, match=words) as caught: from_dict(Outer, GOOD | change)
    assert '\n' not in str(caught.value)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught: from_dict(Outer, dict(stesp=1, steps='3', sizes=3))
    assert all(w in str(caught.value) for w in ('unknown stesp', 'missing inner', 'Outer.steps', 'Outer.sizes'))


def test_missing_key():
    with pytest.raises(ConfigError, match='missing inner'): from_dict(Outer, dict(steps=1))
    with pytest.raises(ConfigError, match='missing name'): from_dict(Outer, GOOD, required=['steps', 'inner', 'name'])


# --- declarations ---

TABLE = dict(soft=1, hard=2)
Width = Annotated[int, Interval(ge=8, le=64), MultipleOf(8), Unit('pixels')]


@dataclass(frozen=True)
class Declared:
    width: Width = 8  # of the thing
    share: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    kind: Annotated[str, OneOf(TABLE)] = 'soft'
    names: Annotated[list[str], MinLen(1)] = ('a',)
    stage: Literal[0, 1] = 0
    rate: Annotated[float, Interval(gt=0)] | None = None

    def __post_init__(self): check_fields(self)


@pytest.mark.parametrize('values, words', [
    (dict(width=7), r'Declared.width: expected a whole number from 8 to 64 and a multiple of 8 \(pixels\), got 7'),
    (dict(width=12), 'multiple of 8'),
    (dict(width=72), 'from 8 to 64'),
    (dict(share=1), 'a number from 0 and below 1, got 1'),
    (dict(kind='hrad'), "one of soft, hard, got 'hrad'"),
    (dict(kind=['soft']), 'expected a text'),
    (dict(names=[]), 'a list of at least 1'),
    (dict(stage=True), 'one of 0, 1, got True'),
    (dict(rate=0), 'a number above 0 or null'),
    (dict(rate=math.nan), 'above 0 or null, got nan')])
def test_a_declaration_is_checked_and_is_the_message(values, words):
    for make in (lambda: Declared(**values), lambda: from_dict(Declared, values)):
        with pytest.raises(ConfigError, match=words): make()


def test_values_are_stored_as_declared():
    made = Declared(share=0, names=('b', 'c'))
    assert made == from_dict(Declared, dict(share=0.0, names=['b', 'c'])) and type(made.share) is float
    assert type(made.names) is list


def test_a_row_added_to_a_table_is_a_choice(monkeypatch):
    monkeypatch.setitem(TABLE, 'mine', 3)
    assert Declared(kind='mine').kind == 'mine' and 'mine' in expected(Annotated[str, OneOf(TABLE)])


@given(st.from_type(Annotated[float, Interval(ge=0, lt=1)]))
def test_hypothesis_reads_the_same_declarations(value):
    assert convert(Annotated[float, Interval(ge=0, lt=1)], value, 'x') == value


def test_the_command_line_speaks_in_declarations(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument('--width', type=argument(Width))
    parser.add_argument('--rate', type=argument(Annotated[float, Interval(gt=0)] | None))
    assert parser.parse_args(['--width', '16', '--rate', '2']) == argparse.Namespace(width=16, rate=2.0)
    for bad in (['--width', '1e9'], ['--width', '9' * 5000], ['--rate', 'inf'], ['--rate', 'nan'], ['--rate', '-1']):
        with pytest.raises(SystemExit) as e: parser.parse_args(bad)
        last = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and 'expected a' in last and len(last) < 400
    assert describe(Declared)[0] == 'width: a whole number from 8 to 64 and a multiple of 8 (pixels) [8]; of the thing'


# --- files ---

@settings(max_examples=25, deadline=None)
@given(st.dictionaries(
    st.text('abcdefgh_', min_size=1, max_size=8),
    st.one_of(st.booleans(), st.none(), st.integers(-9, 9), st.floats(-1e9, 1e9), st.lists(st.integers(0, 3))),
    max_size=5))
def test_yaml_round_trip(tmp_path_factory, section):
    from ruamel.yaml import YAML
    path = tmp_path_factory.mktemp('yaml') / 'params.yaml'
    with path.open('w') as f: YAML(typ='safe', pure=True).dump(dict(section=section), f)
    assert load_params(path) == dict(section=section)


def test_yaml_is_version_1_2(tmp_path):
    (tmp_path / 'a.yaml').write_text('a: 1e-1\nb: no\nc: 010\n')
    assert load_yaml(tmp_path / 'a.yaml') == dict(a=0.1, b='no', c=10)


BOMB = 'a0: &a0 [lol]\n' + ''.join(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]\n' for i in range(1, 12))
WIDE = f'a: &a [{", ".join(["1"] * 5000)}]\nb: &b [{", ".join(["*a"] * 5000)}]\nc: [{", ".join(["*b"] * 5000)}]\n'
HOSTILE = dict(list='- 1', open='a: [1', twice='a: 1\na: 2', empty='', object='a: !!python/object:os.system 1',
               nested='a: ' + '[' * 900 + ']' * 900, deep='a: ' + '[' * 100 + ']' * 100, digits='a: ' + '9' * 5000,
               tag='a: !!int ore', date='a: !!timestamp noon', bomb=BOMB, wide=WIDE, cycle='a: &a [*a]',
               huge='a: "' + 'x' * 2**20 + '"')


@pytest.mark.parametrize('text', HOSTILE.values(), ids=HOSTILE)
def test_unusable_files_are_one_short_line(tmp_path, text):
    (tmp_path / 'a.yaml').write_text(text)
    tracemalloc.start()
    with pytest.raises(ConfigError, match='a.yaml') as caught: load_yaml(tmp_path / 'a.yaml')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500 and peak < 100 * 2**20


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / 'a.yaml').write_bytes(b'a: \xff\n')
    with pytest.raises(ConfigError, match='UTF-8'): load_yaml(tmp_path / 'a.yaml')


def test_nothing_unbounded_is_printed(tmp_path):
    (tmp_path / 'a.yaml').write_text('a: [' + ', '.join(['"' + 'x' * 200 + '"'] * 1000) + ']\n')
    with pytest.raises(ConfigError, match='expected a section') as caught: load_params(tmp_path / 'a.yaml')
    assert len(str(caught.value)) < 400
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, GOOD | {'k' * 10**6: 1} | {f'k{i}': 1 for i in range(1000)})
    assert len(str(caught.value)) < 400
    assert len(shown(16**5000)) < 200 and len(shown({'a' * 1000: ['b' * 1000] * 1000})) <= 160


# --- profiles ---

PARAMS = ('# head\na:\n  x: 1  # one\n  list:  # of two\n  - 1\n  - 2\n\n# next\nb:\n  y: null  # none\n  deep:\n'
          '    z: 1.0e-03\n')


def test_a_profile_keeps_comments_and_layout():
    assert overlay(PARAMS, '{}') == PARAMS
    laid = overlay(PARAMS, 'a:\n  x: 22\n  list:\n  - 3\nb:\n  deep:\n    z: 5.0e-05\n')
    assert (laid.replace('22 #', '22  #')
            == PARAMS.replace('x: 1', 'x: 22').replace('  - 1\n  - 2\n', '  - 3\n').replace('1.0e-03', '5.0e-05'))
    for change in ('a:\n  list: null\n', 'a:\n  list:\n  - 1\n  - 2\n  - 3\n', 'a:\n  list: 7\n  x:\n  - 3\n'):
        laid = overlay(PARAMS, change)
        assert all(c in laid for c in ('# head\n', '# one', '\n\n# next\nb:\n', '# none')), laid
    assert overlay(PARAMS, 'b:\n  deep:\n    w: 1\n').endswith('  deep:\n    w: 1\n')  # other keys: another mapping
    for bad in ('a: {w: 1}', 'c: {x: 1}', 'a: {x: 1, w: {y: 1}}'):
        with pytest.raises(ConfigError, match='no parameter'): overlay(PARAMS, bad)
    with pytest.raises(ConfigError): overlay(PARAMS, '- 1')


@pytest.mark.parametrize("options, chooser", [("options", "policy"), ("architecture_options", "architecture")])
def test_options_of_another_choice_are_not_laid_among_the_old_ones(options, chooser):
    text = f'm:\n  {chooser}: a\n  {options}:\n    x: 1\n    y: 2\n'
    laid = lambda **m: parse_yaml(overlay(text, json.dumps({'m': m})), 'laid')['m']
    assert laid(**{options: {'x': 3}})[options] == {'x': 3, 'y': 2}
    assert laid(**{chooser: 'a', options: {'x': 3}})[options] == {'x': 3, 'y': 2}
    for order in ([chooser, options], [options, chooser]):
        assert laid(**{k: {chooser: 'b', options: {'x': 3}}[k] for k in order}) == {chooser: 'b', options: {'x': 3}}
    assert laid(**{chooser: 'b', options: {}})[options] == {}
