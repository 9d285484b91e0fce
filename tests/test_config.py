"Configuration is strict in both directions and never converts what it should not."
from dataclasses import FrozenInstanceError, dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from foundir_v2.config import ConfigError, from_dict, load_params, load_yaml, merge_sections


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
    (dict(stesp=1), 'unknown stesp; the choices are steps, inner'), (dict(inner={}), 'Outer.inner: missing lr'),
    (dict(steps='3'), "Outer.steps: expected int, got '3'"), (dict(steps=3.5), 'expected int'), (dict(steps=True), 'expected int'), (dict(steps=None), 'expected int'),
    (dict(inner=dict(lr='1e-3')), 'Outer.inner.lr: expected float'), (dict(inner=dict(lr=1, betas=[1])), 'expected 2 values, got 1'), (dict(inner=3), 'expected a mapping'),
    (dict(sizes=3), 'expected a list'), (dict(sizes=[1, 'a']), r'Outer.sizes\[1\]'), (dict(parts=dict(a=dict(lr='x'))), 'Outer.parts.a.lr'), (dict(name=3), 'Outer.name: expected str'), (dict(limits='x'), 'int or float')])
def test_bad_values_are_named(change, words):
    with pytest.raises(ConfigError, match=words) as caught: from_dict(Outer, GOOD | change)
    assert '\n' not in str(caught.value)


def test_missing_key():
    with pytest.raises(ConfigError, match='missing inner'): from_dict(Outer, dict(steps=1))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text('abcdefgh_', min_size=1, max_size=8), st.one_of(st.booleans(), st.none(), st.integers(-9, 9), st.floats(-1e9, 1e9), st.lists(st.integers(0, 3))), max_size=5))
def test_yaml_round_trip(tmp_path_factory, section):
    from ruamel.yaml import YAML
    path = tmp_path_factory.mktemp('yaml') / 'params.yaml'
    with path.open('w') as f: YAML(typ='safe', pure=True).dump(dict(section=section), f)
    assert load_params(path) == dict(section=section)


def test_yaml_is_version_1_2(tmp_path):
    (tmp_path / 'a.yaml').write_text('a: 1e-1\nb: no\nc: 010\n')
    assert load_yaml(tmp_path / 'a.yaml') == dict(a=0.1, b='no', c=10)


@pytest.mark.parametrize('text', ['a: [1', '- 1', 'a: 1\na: 2', '', 'a: !!python/object:os.system 1'])
def test_unusable_files_are_one_line(tmp_path, text):
    (tmp_path / 'a.yaml').write_text(text)
    with pytest.raises(ConfigError, match='a.yaml') as caught: load_yaml(tmp_path / 'a.yaml')
    assert '\n' not in str(caught.value)


def test_sections_must_not_collide():
    params = dict(a=dict(x=1), b=dict(y=2), c=dict(x=3))
    assert merge_sections(params, ['a', 'b']) == dict(x=1, y=2)
    with pytest.raises(ConfigError, match="key 'x'"): merge_sections(params, ['a', 'c'])
    with pytest.raises(ConfigError, match='unknown section'): merge_sections(params, ['d'])
