"""Scoring many pictures: as the evaluation does it, against the usual script that makes its metric for every picture.

Ratios within one run; equal values. (What is kept by `foundir_v2.trials` isn't measured again at all.)"""
import time

import pytest
import torch

from foundir_v2 import iqa
from foundir_v2.core import generator

PICTURES = 6


def pictures():
    coarse = torch.rand(2 * PICTURES, 3, 24, 24, generator=generator('scoring'))
    fine = torch.nn.functional.interpolate(coarse, size=(128, 128), mode='bicubic').clamp(0, 1)
    return list(zip(fine[::2], fine[1::2]))


def usual(name, pairs):
    values = []
    for image, reference in pairs:
        iqa._create.cache_clear()  # pyiqa.create_metric, with its weights, as scripts do inside of their loop
        values.append(iqa.score(name, image, reference))
    return values


def ours(name, pairs): return [iqa.score(name, image, reference) for image, reference in pairs]


@pytest.mark.parametrize('name', ['stlpips', 'piqe', 'ssim'])
def test_scoring(name, capsys):
    pairs, times = pictures(), {usual: [], ours: []}
    iqa.prepare([name])
    assert ours(name, pairs) == usual(name, pairs)
    for _ in range(3):
        for way in times:
            start = time.perf_counter()
            way(name, pairs)
            times[way].append(time.perf_counter() - start)
    ratio = min(times[usual]) / min(times[ours])
    with capsys.disabled(): print(f'\n{name}: {ratio:.1f} times as many pictures as with a metric made for each')
    if name == 'stlpips': assert ratio > 1.2  # AlexNet is 10 MB to load; the larger the network, the more
