import pytest
import torch

from foundir_v2.core import FoundIRError, generator
from foundir_v2.gallery import sheet_of, severities, square
from foundir_v2.tasks import SEVERITIES, SUBTASKS

PHOTO = square(torch.rand(3, 20, 33, generator=generator("gallery")), 48)


@pytest.mark.parametrize("name", SUBTASKS)
def test_every_subtask_has_a_picture_at_every_severity(name):
    made = severities(PHOTO, name, 0)
    assert list(made) == list(SEVERITIES) and all(x.shape == PHOTO.shape for x in made.values())


def test_a_sheet_holds_the_pictures_pixel_by_pixel():
    black, white = torch.zeros(3, 10, 12), torch.ones(3, 10, 12)
    sheet = sheet_of({"a": [black, white], "b": [white, black], "c": [black, black]}, columns=2)
    assert sheet.size == (2 * (2 * 13 + 8) - 9, 2 * 28)
    assert sheet.getpixel((3, 20)) == (0, 0, 0) and sheet.getpixel((16, 20)) == (255, 255, 255)
    for bad in ({}, {"a": [black], "b": [black, white]}, {"a": [black, torch.ones(3, 9, 9)]}):
        with pytest.raises(FoundIRError, match="equally many pictures of one size"): sheet_of(bad)
