"""Damaged states of mixtures and samplers, damaged scores, and the small files of the mixture library.

Each is refused with the library's error, in one line and with the object unchanged, or taken and then usable."""
import copy
import json
import math
import random
from functools import partial

import numpy as np
import pytest

from foundir_v2.adapters import MixtureIterator
from foundir_v2.core import FoundIRError
from foundir_v2.mixlaw import fit_law, predict, spread_mixtures
from foundir_v2.mixsim import load_curves, save_curves, score_of
from foundir_v2.mixtools import load_law, parse_policy
from foundir_v2.mixture import (POLICIES, DataEquilibrium, ExcessLossMixture, FixedMixture, IncrementalMixture,
                                MixtureError, OnlineDataMixing, ProportionalMixture, RebalanceMixture, ReplayMixture,
                                SequentialMixture, SlopeMixture, TargetGapMixture, TemperatureMixture, policy_for)
from foundir_v2.sampler import MixtureSampler

TASKS = ('a', 'b', 'c')
ENDS = dict(zip(TASKS, (24.0, 25.0, 26.0)))
MAKERS = {'fixed': lambda: FixedMixture({'a': 0.5, 'b': 0.25, 'c': 0.25}),
          'proportional': lambda: ProportionalMixture({'a': 5, 'b': 10, 'c': 1}),
          'temperature': lambda: TemperatureMixture({'a': 5, 'b': 10, 'c': 1}, 3),
          'sequential': lambda: SequentialMixture(TASKS, [10, 35]),
          'incremental': lambda: IncrementalMixture(TASKS, [10, 35]),
          'replay': lambda: ReplayMixture({0: {'a': 0.2, 'b': 0.3, 'c': 0.5}, 20: {'a': 1.0, 'b': 0.0, 'c': 0.0}}),
          'des': lambda: DataEquilibrium(TASKS, 0.5, 'zscore', min_step=2, max_step=8, floor=0.05, dead_band=1.8),
          'excess_loss': lambda: ExcessLossMixture(TASKS, ENDS),
          'target_gap': lambda: TargetGapMixture(TASKS, ENDS, rate=0.2),
          'odm': lambda: OnlineDataMixing(TASKS, best=30, worst=10),
          'slope': lambda: SlopeMixture(TASKS),
          'rebalance': lambda: RebalanceMixture(TASKS, ENDS)}
MAKERS |= {name: partial(policy_for, TASKS, name) for name in POLICIES if name not in MAKERS}  # by their defaults
MORE = {'des zscore': lambda: DataEquilibrium(TASKS, 0.5, 'zscore', protect_falling=True),
        'des raw': lambda: DataEquilibrium(TASKS, 0.5, initial_scores=ENDS),
        'des relative': lambda: DataEquilibrium(TASKS, 2.0, 'relative', targets=ENDS, gap=1.0)}
HOSTILE = [
    None, True, False, 0, 1, -1, 3, 10**400, 10**5000, -10**400, 2**63, 2**64, 0.0, -0.0, 0.5, -0.5, 1e308, -1e308,
    5e-324, 1e100, math.nan, math.inf, -math.inf, '', 'a', 'zz', '1', 'NaN', 'x' * 10_000, 'two\nlines', b'a', [], {},
    (), [[]], [1, 2], ['a', 'b', 'c'], ['a', 'b'], ['a', 'a', 'b'], {'a': 1}, {'a': 1.0, 'b': 0.0, 'c': 0.0},
    {'a': 2.0, 'b': -1.0, 'c': 0.0}, {'zz': 1}, {1: 2}, {None: None}, [None] * 50, {'scores': {}}, object, {1, 2}, 1j]


def deep(depth=2000):
    out = []
    for _ in range(depth): out = [out]
    return out


def places(tree, path=()):
    "Every path into nested mappings and lists."
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def mutate(state, rng):
    "A damaged copy, and what was done to it."
    state = copy.deepcopy(state)
    path = rng.choice(list(places(state)))
    if not path: return rng.choice([*HOSTILE, [state]]), 'the whole'
    at = state
    for key in path[:-1]: at = at[key]
    key, old = path[-1], at[path[-1]]
    kinds = ['replace'] * 4 + ['remove', 'add', 'wrap', 'text', 'scale', 'twin', 'rename', 'deep', 'ragged']
    kind = rng.choice(kinds)
    if kind == 'remove': del at[key]
    elif kind == 'add' and isinstance(at, dict): at[rng.choice(['zz', '', 3, 'weights'])] = rng.choice(HOSTILE)
    elif kind == 'add': at.append(rng.choice(HOSTILE))
    elif kind == 'wrap': at[key] = rng.choice([[old], {'a': old}, (old, old)])
    elif kind == 'text': at[key] = str(old)
    elif kind == 'scale': at[key] = old * rng.choice([-1, 0, 2, 1e9]) if isinstance(old, (int, float)) else [old, old]
    elif kind == 'twin': at[key] = copy.deepcopy(rng.choice([v for v in (at.values() if isinstance(at, dict) else at)]))
    elif kind == 'rename' and isinstance(at, dict): at[rng.choice(['zz', 'A', ' a'])] = at.pop(key)
    elif kind == 'deep': at[key] = deep()
    elif kind == 'ragged' and isinstance(old, list): at[key] = old[:-1] if rng.random() < .5 else old + old[:1]
    else: kind, at[key] = 'replace', rng.choice(HOSTILE)
    return state, f'{kind} {".".join(map(str, path))}'


def rounds(n, images=3, seed=0):
    rng = np.random.default_rng(seed)
    return [{t: (20 + i + j + rng.normal(0, 1, images)).tolist() for j, t in enumerate(TASKS)} for i in range(n)]


def trained(make, updates):
    policy = make()
    for i, scores in enumerate(rounds(updates)): policy.update(scores, 10 * i)
    return policy


def fault_of_refusal(e, error):
    text = str(e)
    if not isinstance(e, error): return f'{type(e).__name__}: {text[:150]}'
    if '\n' in text or not text: return f'not one line: {text[:150]!r}'
    return f'{len(text)} characters' if len(text) > 700 else ''


def sound(weights):
    return all(math.isfinite(w) and w >= 0 for w in weights.values()) and abs(math.fsum(weights.values()) - 1) < 1e-6


def used(policy, make, state):
    "What is wrong with a policy that took a state; it goes on with as many images as that state knows."
    kept = policy.state_dict()
    json.dumps(kept, allow_nan=False)
    again = make()
    again.load_state_dict(json.loads(json.dumps(kept)))
    if again.state_dict() != kept: return 'its state does not come back'
    known = kept['memory'].get('scores', {})
    for i in range(3):
        if not sound(policy.weights): return f'weights {policy.weights}'
        scores = {t: np.random.default_rng(i).normal(22 + i, 1, len(known.get(t, [0] * 3))).tolist() for t in TASKS}
        policy.update(scores, (policy.step or 0) + 10)
    return '' if sound(policy.weights) else f'weights {policy.weights}'


def try_state(make, target, state):
    before = json.dumps(target.state_dict())
    try: target.load_state_dict(state)
    except BaseException as e:
        return fault_of_refusal(e, MixtureError) or (
            'changed by a refused load' if json.dumps(target.state_dict()) != before else '')
    try: return used(target, make, state)
    except Exception as e: return f'taken, then {type(e).__name__}: {str(e)[:150]}'


def test_mixture_states(tally, full):
    assert set(MAKERS) == set(POLICIES)
    rng, makers = random.Random(0), MAKERS | MORE
    states = [(name, make, trained(make, n).state_dict()) for name, make in makers.items() for n in (0, 1, 4)]
    for i in range(3000 if full else 300):
        name, make, state = states[i % len(states)]
        bad, what = mutate(json.loads(json.dumps(state)), rng)
        tally.held(f'{name}, {what}', try_state(make, trained(make, 2), bad))


def test_the_sound_state_is_taken(tally):
    for name, make in (MAKERS | MORE).items():
        state = trained(make, 4).state_dict()
        target = trained(make, 2)
        target.load_state_dict(state)
        tally.held(name, '' if target.state_dict() == state else 'another state')


LENGTHS = {'a': 40, 'b': 7, 'c': 1000}


def stream(batches=20, adaptive=True, exhaustion='repeat'):
    mixture = (DataEquilibrium(TASKS, 0.5, initial_scores=ENDS) if adaptive
               else FixedMixture({'a': 0.5, 'b': 0.25, 'c': 0.25}))
    sampler = MixtureSampler(LENGTHS, mixture, 4, seed=3, interval=5, exhaustion=exhaustion)
    while sampler.position.step < batches:
        for _ in sampler: pass
        if adaptive: mixture.update(rounds(1, seed=sampler.position.step)[0], sampler.position.step)
    return sampler


def try_sampler(make, state):
    target = make(5)
    before = json.dumps(target.state_dict())
    try: target.load_state_dict(state)
    except BaseException as e:
        return fault_of_refusal(e, MixtureError) or (
            'changed by a refused load' if json.dumps(target.state_dict()) != before else '')
    try:
        again = make(5)
        again.load_state_dict(json.loads(json.dumps(target.state_dict(), allow_nan=False)))
        if again.state_dict() != target.state_dict(): return 'its state does not come back'
        batch = next(iter(target), [])
        if any(d.task not in TASKS or not 0 <= d.index < LENGTHS[d.task] for d in batch): return f'draws {batch}'
        return '' if batch == next(iter(again), []) else 'not the same stream'
    except Exception as e: return f'taken, then {type(e).__name__}: {str(e)[:150]}'


def test_sampler_states(tally, full):
    rng = random.Random(1)
    kinds = [lambda n: stream(n), lambda n: stream(n, adaptive=False)]
    states = [(make, make(n).state_dict()) for make in kinds for n in (0, 20)]
    for i in range(1000 if full else 120):
        make, state = states[i % len(states)]
        bad, what = mutate(json.loads(json.dumps(state)), rng)
        tally.held(what, try_sampler(make, bad))


def test_iterator_states(tally, full):
    rng, data = random.Random(2), {t: range(n) for t, n in LENGTHS.items()}
    for i in range(300 if full else 40):
        one = MixtureIterator(data, stream(adaptive=False))
        for _ in range(6): next(one)
        bad, what = mutate(json.loads(json.dumps(one.state_dict())), rng)
        before = json.dumps(one.state_dict())
        try: one.load_state_dict(bad)
        except BaseException as e:
            fault = fault_of_refusal(e, MixtureError) or (
                'changed by a refused load' if json.dumps(one.state_dict()) != before else '')
        else: fault = '' if next(one)['task'] in TASKS else 'no sample'
        tally.held(what, fault)


def test_scores(tally, full):
    rng, makers = random.Random(3), list((MAKERS | MORE).items())
    for i in range(600 if full else 80):
        name, make = makers[i % len(makers)]
        policy = trained(make, 2)
        bad, what = mutate(rounds(1)[0], rng)
        before = json.dumps(policy.state_dict())
        try: policy.update(bad, 20)
        except BaseException as e:
            fault = fault_of_refusal(e, MixtureError) or (
                'changed by a refused update' if json.dumps(policy.state_dict()) != before else '')
        else: fault = '' if sound(policy.weights) else f'weights {policy.weights}'
        tally.held(f'{name}, {what}', fault)


@pytest.mark.parametrize('kind', ['law', 'curves'])
def test_small_files(tally, full, tmp_path, kind):
    path, rng = tmp_path / 'file.json', random.Random(4)
    if kind == 'law':
        plan = spread_mixtures(TASKS, 8)
        law = fit_law(plan,
                      [{t: 28 - missing * math.exp(-2 * w[t]) for t, missing in zip(TASKS, (2, 4, 8))} for w in plan])
        path.write_text(
            json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else list(v) for k, v in vars(law).items()}))
    else: save_curves(load_curves('tiny'), path)
    good = json.loads(path.read_text())
    for _ in range(200 if full else 30):
        bad, what = mutate(good, rng)
        try: path.write_text(json.dumps(bad))
        except (TypeError, ValueError, RecursionError): continue
        try: read = (load_law if kind == 'law' else load_curves)(path)
        except BaseException as e: fault = fault_of_refusal(e, FoundIRError if kind == 'law' else ValueError)
        else:
            uniform = np.full(len(read.tasks), 1 / len(read.tasks))
            values = predict(read, uniform)[0] if kind == 'law' else score_of(read, 1000 * uniform)
            fault = '' if np.isfinite(values).all() else f'predicts {values}'
        tally.held(what, fault)


@pytest.mark.parametrize('options', [
    'alpha=1e999', 'alpha=-1', 'alpha=[1]', 'alpha=NaN', 'alpha=1,floor=9',
    'alpha=1,noise={"a": 1e-320, "b": 1, "c": 1}', 'alpha=1,min_unit=0', 'alpha=1,min_unit={"a": 1}',
    'alpha=' + '9' * 5000])
def test_options(tally, options):
    try: parse_policy(f'des:{options}', TASKS)
    except BaseException as e: tally.held(options[:20], fault_of_refusal(e, FoundIRError))
    else: tally.held(options[:20], 'taken')
