import pickle

import pytest

from foundir_v2.core import FoundIRError
from foundir_v2.degrade import OPERATORS
from foundir_v2.tasks import (CATEGORIES, SUBTASKS, VARIANTS, Choice, Integers, LogUniform, Step, SubTask, Uniform,
                              by_category, subtask)

REQUIRED = """motion_blur defocus_blur gaussian_noise camera_noise jpeg haze rain snow raindrop low_light
low_light_noise sr_x2 sr_x4 blur_noise noise_jpeg rain_haze""".split()


def test_catalogue_has_the_required_subtasks_and_five_categories():
    assert set(REQUIRED) <= set(SUBTASKS) and len(SUBTASKS) >= 16
    assert CATEGORIES == ("deblur", "denoise", "weather", "lowlight", "sr")
    assert all(name == s.name for name, s in SUBTASKS.items())


@pytest.mark.parametrize("name, category",
                         dict(blur_noise="deblur", blur_jpeg="deblur", noise_jpeg="denoise", rain_haze="weather",
                              low_light_noise="lowlight", low_light_haze="lowlight", sr_x2_jpeg="sr").items())
def test_a_coupled_subtask_belongs_to_its_first_word(name, category):
    assert SUBTASKS[name].category == category and len(SUBTASKS[name].recipe) > 1


def test_categories_partition_the_catalogue_and_are_balanced():
    table = by_category()
    assert tuple(table) == CATEGORIES and sorted(sum(table.values(), [])) == sorted(SUBTASKS)
    assert min(map(len, table.values())) >= 3 and max(map(len, table.values())) <= 2.5 * min(map(len, table.values()))


EVERY_VARIANT = [v for several in VARIANTS.values() for v in several]


def proper(r):
    if isinstance(r, Choice): return len(r.options) > 1 and all(isinstance(o, str) for o in r.options)
    if isinstance(r, LogUniform) and r.low <= 0: return False
    return isinstance(r, (Uniform, LogUniform, Integers)) and r.low <= r.high


@pytest.mark.parametrize("s", [*SUBTASKS.values(), *EVERY_VARIANT], ids=lambda s: s.name)
def test_recipes_name_real_operators_and_their_parameters(s):
    for operator, ranges in s.recipe:
        code = OPERATORS[operator].__code__
        arguments = set(code.co_varnames[1:code.co_argcount]) - {"seed"}
        assert set(ranges) == arguments, (s.name, operator)
        assert all(proper(r) for r in ranges.values())


def test_every_subtask_has_variants_of_its_own_kind():
    assert list(VARIANTS) == list(SUBTASKS) and len({v.name for v in EVERY_VARIANT}) == len(EVERY_VARIANT) >= 30
    for parent, several in VARIANTS.items():
        for v in several:
            one = SUBTASKS[parent]
            assert v.name.startswith(parent + ":")
            assert (v.category, v.metric, v.scale) == (one.category, one.metric, one.scale)
            assert v.recipe != one.recipe


def test_a_variant_is_found_by_its_name_and_is_no_task_of_the_benchmark():
    for v in EVERY_VARIANT: assert subtask(v.name) is v
    assert not {v.name for v in EVERY_VARIANT} & {n for names in by_category().values() for n in names}
    with pytest.raises(FoundIRError, match="'haze:mist'; choose one of haze, haze:depths") as e: subtask("haze:mist")
    assert "rain" not in str(e.value)


def test_super_resolution_is_what_changes_the_size():
    for s in (*SUBTASKS.values(), *EVERY_VARIANT):
        scales = [r["scale"] for operator, r in s.recipe if operator in ("downscale", "shrink")]
        assert s.is_sr == bool(scales) == (s.scale > 1) and all(r == Integers(s.scale, s.scale) for r in scales)


def test_unknown_names_list_the_choices():
    for wrong in ("fog", "", None, ["haze"]):
        with pytest.raises(FoundIRError, match="haze.*sr_x4") as e: subtask(wrong)
        assert "\n" not in str(e.value)


def test_bad_definitions_are_refused():
    with pytest.raises(FoundIRError, match="wether.*weather"): SubTask("x", "wether", (Step("haze", {}),))
    with pytest.raises(FoundIRError, match="empty"): SubTask("x", "weather", ())


def test_subtasks_are_plain_values():
    for s in (*SUBTASKS.values(), *EVERY_VARIANT):
        assert pickle.loads(pickle.dumps(s)) == s and hash(s) == hash(pickle.loads(pickle.dumps(s)))
        with pytest.raises(AttributeError): s.name = "other"
