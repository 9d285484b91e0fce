"""Scoring many pictures, against the usual script that makes its metric for every picture: ratios within one run,
equal values.

Two things are measured. Scoring what was never seen saves the making of the metric and no more: 1.0 (SSIM, which is
computing alone) to 1.4 times as fast with the metrics that run offline, of which ST-LPIPS has 10 MB of weights; the
larger a metric's network beside the picture, the more it is. A whole benchmark has half a second of its own at its
start, to name its methods by their code, so that a miniature is no faster than the script (0.9). What was seen is not
scored again: a benchmark that goes on after an interruption, or gets one more method, asks its memo
(`foundir_v2.trials`)."""
import time

import pytest
import torch

from foundir_v2 import iqa
from foundir_v2.core import generator, load_image, save_image
from foundir_v2.memo import Memo
from foundir_v2.restorers import make_restorer
from foundir_v2.trials import read_cases, run_trials, set_folders

PICTURES = 6
METRICS = ['psnr', 'ssim', 'stlpips', 'piqe']
METHODS = {name: name for name in ('bicubic', 'levels', 'gamma')}  # that take no time


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


def script(folder, methods):
    "Every picture of every method, and its metrics made anew: value by value in the order of `run_trials`."
    values = []
    for case in read_cases('nh_haze', folder):
        for method in methods:
            x = make_restorer(method)(load_image(case.lq), subtask='nonhomogeneous_haze')
            pair = (x.clamp(0, 1) * 255).round() / 255, load_image(case.gt)
            values += [usual(m, [pair])[0] for m in METRICS]
    return values


def test_a_benchmark_that_goes_on(tmp_path, capsys):
    for i, (image, reference) in enumerate(pictures()):
        save_image(image, tmp_path / f'NH-HAZE/{i}_hazy.png')
        save_image(reference, tmp_path / f'NH-HAZE/{i}_GT.png')
    folders, memo = set_folders(tmp_path, ['nh_haze']), Memo(tmp_path / 'memo.sqlite')
    more = {**METHODS, 'unsharp': 'unsharp'}
    ways = {'the usual script': lambda: script(folders['nh_haze'], METHODS),
            'never seen': lambda: run_trials(folders, METHODS, memo, METRICS).value.tolist(),
            'seen': lambda: run_trials(folders, METHODS, memo, METRICS).value.tolist(),
            'the usual script, one method more': lambda: script(folders['nh_haze'], more),
            'one method more': lambda: run_trials(folders, more, memo, METRICS).value.tolist()}
    iqa.prepare(METRICS)
    times, values = {}, {}
    for name, way in ways.items():
        start = time.process_time()
        values[name] = way()
        times[name] = time.process_time() - start
    assert values['never seen'] == values['seen'] == values['the usual script']
    assert values['one method more'] == values['the usual script, one method more']
    first, again = (times['the usual script'] / times[name] for name in ('never seen', 'seen'))
    grown = times['the usual script, one method more'] / times['one method more']
    with capsys.disabled():
        print(f'\na benchmark of {len(METHODS)} methods, in times of the usual script: never seen {first:.1f}, seen '
              f'{again:.0f}; one method more: {grown:.1f}')
    assert again > 3 and grown > 3
