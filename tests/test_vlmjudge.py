"The judge that asks: five words, strictly read; LLaVA's real classes with random weights."
import math

import pytest
import torch

from foundir_v2.caption import CaptionerError
from foundir_v2.clean import Judge, clean, make_thresholds
from foundir_v2.core import save_image, to_pil
from foundir_v2.memo import Memo
from foundir_v2.vlmjudge import DAMAGES, QUESTION, SEVERITIES, VLMJudge, parse_severity


@pytest.mark.parametrize("answer, grade", [
    *zip(SEVERITIES, range(5)), ("Very High.", 4), (" low\n", 1), ("**medium**", 2), ('"high"!', 3),
    ("The severity is very low.", 0), ("severity of rain is low", 1), ("the level of the noise is high", 3)])
def test_the_five_words_are_read(answer, grade): assert parse_severity(answer) == grade


@pytest.mark.parametrize("answer", [
    "", "very", "not low", "not very high", "low to medium", "high, very high", "lowest", "medium-high", "3", "none",
    "The image is sharp.", "low. But the noise is high", "I would say high", "the severity", "very  very high"])
def test_anything_else_is_no_answer(answer): assert math.isnan(parse_severity(answer))


def test_every_question_names_its_damage_and_all_answers():
    for damage in DAMAGES.values():
        question = QUESTION.format(damage=damage)
        assert damage in question and all(s in question for s in SEVERITIES)


class Scripted:
    "Stands where the model stands."
    def __init__(self, answers): self.answers, self.asked = answers, []

    def ask(self, questions, max_new_tokens):
        self.asked.append([text for _, text in questions])
        return self.answers[:len(questions)]


def test_one_batch_per_picture_a_grade_per_damage_and_what_is_unclear_is_counted():
    judge = VLMJudge("some/model", "cpu")
    judge.vlm = Scripted(["high", "Very low.", "hm", "low or medium", "medium", "low", "very high", "low"])
    said = judge(torch.rand(3, 20, 20))
    assert isinstance(judge, Judge) and tuple(said) == judge.measures == (*(f"vlm_{d}" for d in DAMAGES), "vlm_unclear")
    assert [said[f"vlm_{d}"] for d in ("blur", "noise", "rain", "dark")] == [3, 0, 2, 1] and said["vlm_unclear"] == 2
    assert math.isnan(said["vlm_jpeg"]) and math.isnan(said["vlm_haze"])
    assert judge.vlm.asked == [[QUESTION.format(damage=d) for d in DAMAGES.values()]]


def test_the_name_tells_model_and_questions():
    names = {VLMJudge(*a).name for a in (("a", "cpu"), ("b", "cpu"), ("a", "cpu", {"rain": "rain"}))}
    assert len(names) == 3 and VLMJudge("a", "cpu").name in names


def test_a_real_model_answers_reproducibly_and_its_nonsense_is_unclear(tiny_vlm):
    picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    first, again = (VLMJudge(str(tiny_vlm[0]), "cpu") for _ in range(2))
    texts = first.vlm.ask([(to_pil(picture), "is it a cat")], 5)
    assert len(texts) == 1 and set(texts[0].split()) <= tiny_vlm[1]
    said = first(picture)
    assert said["vlm_unclear"] == sum(math.isnan(said[f"vlm_{d}"]) for d in DAMAGES) > 0
    assert str(again(picture)) == str(said)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    judge = VLMJudge(str(tmp_path/"none"), "cpu")
    with pytest.raises(CaptionerError, match="can't load") as e: judge(torch.rand(3, 9, 9))
    assert "\n" not in str(e.value)


def test_grades_are_kept_by_content_and_model_and_get_limits(tmp_path):
    import pandas as pd
    judge = VLMJudge("some/model", "cpu", {"rain": "rain"})
    judge.vlm = Scripted(["high"])
    save_image(torch.rand(3, 20, 20), tmp_path/"a.png")
    index = pd.DataFrame([dict(photo=n, path="a.png", verdict="", reason="") for n in "ab"])
    for _ in range(2):
        table = clean(index, [judge], make_thresholds({"vlm_rain": [1, 2]}, [judge]), tmp_path,
                      memo=Memo(tmp_path/"memo"))
        assert list(table.verdict) == ["rejected"] * 2 and "vlm_rain 3" in table.reason[0]
    assert len(judge.vlm.asked) == 1
