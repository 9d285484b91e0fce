import math, pickle

import pytest

from foundir_v2.core import FoundIRError
from foundir_v2.degrade import OPERATORS, draw_parameters
from foundir_v2.tasks import (BENCHMARK, CATEGORIES, COUPLED, FOUNDIR, PLACES, SETS, SEVERITIES, SUBTASKS, VARIANTS,
                              Choice, Integers, LogUniform, Step, SubTask, Uniform, by_category, category_of, couple,
                              narrow, paired_task, subtask, subtask_names, task_table)

REQUIRED = """motion_blur defocus_blur gaussian_noise camera_noise jpeg haze rain snow raindrop low_light
low_light_noise sr_x2 sr_x4 blur_noise noise_jpeg rain_haze""".split()


def test_catalogue_has_the_required_subtasks_and_five_categories():
    assert set(REQUIRED) <= set(SUBTASKS) and len(SUBTASKS) >= 56
    assert CATEGORIES == ("deblur", "denoise", "weather", "lowlight", "sr")
    assert all(name == s.name for name, s in SUBTASKS.items())


@pytest.mark.parametrize("name, category",
                         dict(blur_noise="deblur", blur_jpeg="deblur", noise_jpeg="denoise", rain_haze="weather",
                              low_light_noise="lowlight", low_light_haze="lowlight", sr_x2_jpeg="sr").items())
def test_a_coupled_subtask_belongs_to_its_first_word(name, category):
    assert SUBTASKS[name].category == category and len(SUBTASKS[name].recipe) > 1


def test_categories_partition_the_catalogue_and_are_balanced():
    for chosen, names in (("version1", BENCHMARK), ("all", SUBTASKS)):
        table = by_category(chosen)
        assert tuple(table) == CATEGORIES and sorted(sum(table.values(), [])) == sorted(names)
    assert by_category() == by_category("version1")
    sizes = [len(names) for names in by_category().values()]
    assert min(sizes) >= 3 and max(sizes) <= 2.5 * min(sizes)


def test_a_set_stands_for_names():
    assert subtask_names("version1") == list(BENCHMARK) == list(SUBTASKS)[:22] and len(subtask_names("all")) >= 56
    assert subtask_names(["haze", "rain"]) == ["haze", "rain"]
    for names in SETS.values(): assert set(names) <= set(SUBTASKS) and len(set(names)) == len(names)
    assert set().union(*(SETS[name] for name in SETS if name != "all")) == set(SUBTASKS)
    assert by_category("low_resolution") == {"sr": list(SETS["low_resolution"])}, "an empty category"
    with pytest.raises(FoundIRError, match="'haze'; choose one of version1, foundir"): subtask_names("haze")


def test_the_20_of_foundir_are_there_and_each_with_fewer_pixels():
    assert len(FOUNDIR) == len(SETS["low_resolution"]) == 20 and set(COUPLED) < set(FOUNDIR) < set(SUBTASKS)
    small = {name.split("_", 2)[2]: SUBTASKS[name] for name in SETS["low_resolution"]}
    assert set(small) == set(FOUNDIR)
    for name, task in small.items():
        rest = [step.operator for step in task.recipe if step.operator != "downscale"]
        assert rest == [step.operator for step in SUBTASKS[name].recipe] and task.is_sr


def stations(recipe):
    names = list(PLACES)
    return [next(names.index(p) for p, operators in PLACES.items() if step.operator in operators) for step in recipe]


def test_recipes_stand_in_the_order_of_physics():
    out_of_order = {s.name for s in SUBTASKS.values() if stations(s.recipe) != sorted(stations(s.recipe))}
    assert out_of_order == {"night_rain", "sr_x2_night_rain", "sr_x4_real"}
    assert sorted(o for operators in PLACES.values() for o in operators) == sorted(OPERATORS)


@pytest.mark.parametrize("name", ["blur_noise_jpeg", "low_light_blur_noise", "sr_x2_low_light_noise_jpeg", "old_photo"])
def test_parts_may_come_in_any_order(name):
    recipe = SUBTASKS[name].recipe
    for k in range(len(recipe)):
        mixed = recipe[k:] + recipe[:k]
        assert sorted(stations(couple(*mixed))) == stations(couple(*mixed))
    assert couple(*recipe) == recipe == couple(*recipe[1:], onto=recipe[:1])


def test_coupling_refuses_an_operator_without_a_place(monkeypatch):
    sand = Step("sandstorm", {})
    with pytest.raises(FoundIRError, match="'sandstorm' has no place.*air"): couple(SUBTASKS["jpeg"].recipe[0], sand)
    monkeypatch.setitem(PLACES, "air", (*PLACES["air"], "sandstorm"))
    assert couple(SUBTASKS["jpeg"].recipe[0], sand)[0] == sand


EVERY_VARIANT = [v for several in VARIANTS.values() for v in several]


def proper(r):
    if isinstance(r, Choice): return r.options and all(isinstance(o, str) for o in r.options)
    if isinstance(r, LogUniform) and r.low <= 0: return False
    return isinstance(r, (Uniform, LogUniform, Integers)) and r.low <= r.high and r.worse in ("low", "high", None)


@pytest.mark.parametrize("s", [*SUBTASKS.values(), *EVERY_VARIANT], ids=lambda s: s.name)
def test_recipes_name_real_operators_and_their_parameters(s):
    for operator, ranges in s.recipe:
        code = OPERATORS[operator].__code__
        arguments = set(code.co_varnames[1:code.co_argcount]) - {"seed"}
        assert set(ranges) == arguments, (s.name, operator)
        assert all(proper(r) for r in ranges.values())


def test_every_subtask_has_variants_of_its_own_kind():
    assert tuple(VARIANTS) == BENCHMARK and len({v.name for v in EVERY_VARIANT}) == len(EVERY_VARIANT) >= 30
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
        assert s.is_sr == bool(scales) == (s.scale > 1) == (s.category == "sr") == (s.metric == "stlpips")
        assert math.prod(r.low for r in scales) == math.prod(r.high for r in scales) == s.scale


def test_unknown_names_lead_to_known_ones():
    for wrong, hint in (("hase", "did you mean haze"), ("sr_x3", "did you mean sr_x"), ("", "--list"),
                        ("haze:fog", "one of haze, haze:"), (None, "--list"), (["haze"], "--list")):
        with pytest.raises(FoundIRError, match=f"unknown sub-task.*{hint}") as e: subtask(wrong)
        assert "\n" not in str(e.value)


def test_bad_definitions_are_refused():
    with pytest.raises(FoundIRError, match="wether.*weather"): SubTask("x", "wether", (Step("haze", {}),))
    with pytest.raises(FoundIRError, match="empty"): SubTask("x", "weather", ())


def test_subtasks_are_plain_values():
    for s in (*SUBTASKS.values(), *EVERY_VARIANT):
        assert pickle.loads(pickle.dumps(s)) == s and hash(s) == hash(pickle.loads(pickle.dumps(s)))
        with pytest.raises(AttributeError): s.name = "other"


def test_a_severity_is_a_third_of_every_range_from_its_mild_end():
    ranges = dict(a=Uniform(1, 4), b=LogUniform(0.001, 1), c=Integers(10, 40, "low"), d=Uniform(-3, 3, None),
                  e=Choice(("x", "y")), f=Integers(2, 2))
    task = SubTask("x", "weather", (Step("jpeg", ranges),))
    mild, typical, severe = (narrow(task, severity).recipe[0].ranges for severity in SEVERITIES)
    assert [(round(m["a"].low, 9), round(m["a"].high, 9)) for m in (mild, typical, severe)] == [(1, 2), (2, 3), (3, 4)]
    assert [(round(m["b"].low, 9), round(m["b"].high, 9)) for m in (mild, typical, severe)] == [
        (0.001, 0.01), (0.01, 0.1), (0.1, 1)]
    assert [m["c"] for m in (mild, typical, severe)] == [
        Integers(30, 40, "low"), Integers(20, 30, "low"), Integers(10, 20, "low")]
    for m in (mild, typical, severe): assert all(m[k] == ranges[k] for k in "def")
    assert narrow(task, None) is task and narrow(task, "mild").name == "x"
    with pytest.raises(FoundIRError, match="'medium'; choose one of mild, typical, severe"): narrow(task, "medium")


def test_every_subtask_can_be_narrowed_but_plain_bicubic():
    same = {s.name for s in (*SUBTASKS.values(), *EVERY_VARIANT) if narrow(s, "mild") == narrow(s, "severe")}
    assert same == {"sr_x2", "sr_x4", "sr_x2:kernel", "sr_x4:kernel"}


def test_stored_pairs_alone_are_a_category_of_their_own():
    one = paired_task("underwater", 4)
    assert one.category == category_of("underwater") == "underwater" and not one.recipe and one.is_sr
    assert category_of("haze") == "weather" and task_table(dict(a=[])) == dict(a=[])
    assert task_table("version1") == by_category("version1")
    with pytest.raises(FoundIRError, match="no recipe"): draw_parameters(one, 0)
    with pytest.raises(FoundIRError, match="recipe is empty.*paired_task"): SubTask("underwater", "weather", ())
