"The sampler: proportions, one stream for every split, exact resume, exhaustion, bad input."
import json, math
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from foundir_v2.mixture import DataEquilibrium, FixedMixture, MixtureError, SequentialMixture
from foundir_v2.sampler import Draw, MixtureSampler, choose_tasks, coverage_report, philox_words

LENGTHS = {"c": 50, "a": 1000, "b": 7}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}


def sampler(batch_size=8, seed=0, mixture=None, **options):
    return MixtureSampler(LENGTHS, mixture or FixedMixture(WEIGHTS), batch_size, seed, **options)


def stream(world, batch, steps, make=lambda: FixedMixture(WEIGHTS), seed=0, **options):
    "Draws of all ranks in the order of the global stream."
    runs = [iter(sampler(batch, seed, make(), rank=r, world_size=world, **options)) for r in range(world)]
    return [d for _ in range(steps) for run in runs for d in next(run)]


def test_ten_million_draws_follow_the_mixture():
    n, weights = 10**7, np.array([0.02, 0.38, 0.6])
    counts = sum(np.bincount(choose_tasks(philox_words(11, at, 10**6)[:, 0], weights), minlength=3)
                 for at in range(0, n, 10**6))
    bounds = 3.2905 * np.sqrt(n * weights * (1 - weights))  # 99.9 % of a binomial, normal approximation
    assert counts.sum() == n and (np.abs(counts - n * weights) < bounds).all()


def test_items_are_uniform():
    draws = stream(1, 64, 1000)
    items = np.bincount([d.index for d in draws if d.task == "b"], minlength=7)
    chi2 = ((items - items.mean()) ** 2 / items.mean()).sum()
    assert len(items) == 7 and chi2 < 22.46  # 99.9 % of chi2 with 6 degrees of freedom
    assert all(0 <= d.index < LENGTHS[d.task] and 0 <= d.seed < 2**63 for d in draws)
    assert len({d.seed for d in draws}) == len(draws)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_split_gives_one_stream(world):
    assert stream(world, 24 // world, 30) == stream(1, 24, 30)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_split_gives_one_stream_through_updates(world):
    ranks = [sampler(24 // world, mixture=closed_loop(), rank=r, world_size=world, interval=7) for r in range(world)]
    alone = sampler(24, mixture=closed_loop(), interval=7)
    whole, split = run(alone, 40), list(zip(*[run(s, 40) for s in ranks]))
    assert [sum(parts, []) for parts in split] == whole
    assert len({json.dumps(s.state_dict()) for s in [*ranks, alone]}) == 1


def test_order_of_names_does_not_matter():
    other = MixtureSampler(dict(reversed(LENGTHS.items())), FixedMixture(dict(sorted(WEIGHTS.items(), reverse=True))),
                           8, 0)
    assert next(iter(other)) == next(iter(sampler()))


def closed_loop(): return DataEquilibrium(sorted(LENGTHS), 0.5, initial_scores=dict.fromkeys(LENGTHS, 20.0))


def run(s, steps, every=7):
    "A training loop with an update every 7 steps; yields the batches."
    batches = []
    while len(batches) < steps:
        for batch in s:
            batches.append(batch)
            k = s.position.step
            if len(batches) == steps and k % every: return batches
        if k % every == 0: s.mixture.update({t: 20 + math.sin(k * (i + 1)) for i, t in enumerate(sorted(LENGTHS))}, k)
    return batches


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 59))
def test_stop_anywhere_and_go_on(stop):
    whole = run(sampler(mixture=closed_loop(), interval=7), 60)
    first = sampler(mixture=closed_loop(), interval=7)
    head = run(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = sampler(mixture=closed_loop(), interval=7)
    second.load_state_dict(state)
    assert head + run(second, 60 - stop) == whole
    assert len(json.dumps(state)) < 3000


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([1, 2, 5]))
def test_ranks_may_change_between_runs(stop, world, batch):
    whole = stream(1, 1, 24 * 20 + world * batch * 12)
    ranks = [sampler(8, rank=r, world_size=3) for r in range(3)]
    runs = [iter(r) for r in ranks]
    head = [d for _ in range(stop) for r in runs for d in next(r)]
    state = json.loads(json.dumps(ranks[0].state_dict()))
    assert all(r.state_dict() == state for r in ranks)
    others = [sampler(batch, rank=r, world_size=world) for r in range(world)]
    for s in others: s.load_state_dict(state)
    runs = [iter(s) for s in others]
    tail = [d for _ in range(12) for r in runs for d in next(r)]
    assert head + tail == whole[:len(head) + len(tail)]
    assert others[0].position == (stop + 12, stop * 24 + 12 * world * batch)


def test_state_of_what_was_consumed():
    s = sampler()
    batches = iter(s)
    fetched = [next(batches) for _ in range(10)]
    again = sampler()
    again.load_state_dict(s.state_dict(consumed=6))
    assert [next(iter(again)) for _ in range(4)] == fetched[6:] and again.position.step == 10
    assert again.state_dict(consumed=8) == s.state_dict(consumed=8)
    for wrong in (5, 11, -1):
        with pytest.raises(MixtureError, match="consumed"): again.state_dict(consumed=wrong)


def test_a_pass_ends_at_the_next_multiple():
    s = sampler(interval=5)
    assert [len(list(s)) for _ in range(3)] == [5, 5, 5]
    mid = sampler(interval=5)
    state = sampler()
    batches = iter(state)
    for _ in range(7): next(batches)
    mid.load_state_dict(state.state_dict())
    assert len(list(mid)) == 3 and len(list(mid)) == 5


def test_mixture_changes_at_exactly_its_step():
    plan = lambda: SequentialMixture(["a", "b", "c"], [3, 8])
    for world in (1, 2):  # one pass, nobody calls update
        draws = stream(world, 8 // world, 12, plan)
        assert [{d.task for d in draws[8 * k:8 * k + 8]} for k in range(12)] == [{"a"}] * 3 + [{"b"}] * 5 + [{"c"}] * 4
    loop = closed_loop()
    s = sampler(batch_size=512, mixture=loop, interval=4)
    list(s)
    loop.update({"a": 20.0, "b": 20.0, "c": -40.0}, 4)
    assert all(d.task == "c" for d in next(iter(s)))


def test_data_loader_with_workers_prefetches_nothing_across_an_update():
    torch = pytest.importorskip("torch")
    class Echo(torch.utils.data.Dataset):
        def __getitem__(self, draw): return tuple(draw)
    def epoch_draws(workers):
        loop = closed_loop()
        s = sampler(mixture=loop, interval=6)
        loader = torch.utils.data.DataLoader(Echo(), batch_sampler=s, num_workers=workers, collate_fn=list)
        out = []
        for k in range(3):
            for batch in loader: out += batch
            loop.update({"a": 20.0 + k, "b": 21.0 - 2 * k, "c": 20.0}, s.position.step)
        return out
    assert epoch_draws(0) == epoch_draws(2) == [tuple(d) for d in epoch_draws(0)]


def test_report_counts_the_whole_stream():
    world = [sampler(8, rank=r, world_size=2, mixture=SequentialMixture(["a", "b", "c"], [3, 8])) for r in range(2)]
    runs, drawn = [iter(s) for s in world], []
    for _ in range(20): drawn += [d for r in runs for d in next(r)]
    for s in world:
        rows = {r["task"]: r for r in coverage_report(s)}
        assert ({t: r["drawn"] for t, r in rows.items()} == {t: sum(d.task == t for d in drawn) for t in "abc"}
                == {"a": 48, "b": 80, "c": 192})
        assert rows["a"]["target"] == pytest.approx(3 / 20) and rows["b"]["epochs"] == 80 / 7
        assert 0.99 < rows["b"]["coverage"] <= 1
    again = sampler(8, rank=1, world_size=2, mixture=SequentialMixture(["a", "b", "c"], [3, 8]))
    again.load_state_dict(json.loads(json.dumps(world[0].state_dict())))
    assert coverage_report(again) == coverage_report(world[0])


class Restless:
    "Weights that change at every step."
    def __init__(self): self.weights = dict(WEIGHTS)

    def at(self, step):
        x = 0.2 + 0.1 * math.sin(step)
        return {"a": x, "b": 0.5 - x, "c": 0.5}


def test_a_mixture_that_never_rests_keeps_a_small_state():
    s = sampler(mixture=Restless())
    batches = iter(s)
    drawn = [d for _ in range(300) for d in next(batches)]
    assert {r["task"]: r["drawn"] for r in coverage_report(s)} == {t: sum(d.task == t for d in drawn) for t in "abc"}
    assert len(s.state_dict()["tally"]["notes"]) <= 64


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("exhaustion", ["stop", "downweight"])
def test_exhaustion_is_the_same_for_every_split(world, exhaustion):
    def all_draws(world):
        samplers = [sampler(8 // world, seed=3, rank=r, world_size=world, exhaustion=exhaustion, epochs=2)
                    for r in range(world)]
        runs, out = [iter(s) for s in samplers], []
        for _ in range(60):
            batches = [next(r, None) for r in runs]
            if None in batches: return out, samplers
            out += sum(batches, [])
        return out, samplers
    draws, samplers = all_draws(world)
    assert draws == all_draws(1)[0]
    b = sum(d.task == "b" for d in draws)
    if exhaustion == "stop":
        assert 14 <= b < 14 + 8 and all(s.exhausted == ["b"] for s in samplers) and list(samplers[0]) == []
    else: assert len(draws) == 480 and b < 0.7 * 0.2 * 480 and samplers[0].exhausted == []


def test_downweighting_survives_a_resume():
    s = sampler(exhaustion="downweight")
    batches = iter(s)
    whole = [next(batches) for _ in range(80)]
    first = sampler(exhaustion="downweight")
    batches = iter(first)
    for _ in range(41): next(batches)
    second = sampler(exhaustion="downweight")
    second.load_state_dict(json.loads(json.dumps(first.state_dict(consumed=33))))
    batches = iter(second)
    assert [next(batches) for _ in range(47)] == whole[33:]


@pytest.mark.parametrize("options", [
    dict(lengths={**LENGTHS, "b": 0}), dict(lengths={**LENGTHS, "b": -1}), dict(lengths={**LENGTHS, "b": 1.5}),
    dict(lengths={"a": 3}), dict(lengths={**LENGTHS, "d": 4}), dict(lengths={}), dict(batch_size=0), dict(seed=-1),
    dict(seed=0.5), dict(rank=1), dict(rank=-1), dict(world_size=0), dict(interval=0), dict(exhaustion="loop"),
    dict(epochs=0), dict(decay=2)])
def test_bad_arguments(options):
    with pytest.raises(MixtureError):
        MixtureSampler(**{"lengths": LENGTHS, "mixture": FixedMixture(WEIGHTS), "batch_size": 8, "seed": 0, **options})


def test_a_mixture_gone_bad_is_noticed():
    class Broken: weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    s = sampler(mixture=Broken())
    batches = iter(s)
    next(batches)
    s.mixture.weights = {"a": 0.5, "b": 0.2, "c": math.nan}
    with pytest.raises(MixtureError, match="finite"): next(batches)


@pytest.mark.parametrize("change", [
    dict(version=9), dict(seed=1), dict(lengths={"a": 1000, "b": 8, "c": 50}), dict(lengths={"a": 1000}), dict(step=-1),
    dict(sample=None), dict(tally={}), dict(tally={"start": 0, "drawn": [1], "target": [1.0], "notes": []}),
    dict(mixture={"version": 1})])
def test_foreign_states_change_nothing(change):
    s = sampler()
    next(iter(s))
    before = s.state_dict()
    with pytest.raises(MixtureError): s.load_state_dict({**before, **change})
    with pytest.raises(MixtureError): s.load_state_dict({"step": 0})
    assert s.state_dict() == before


def test_draws_are_plain_records():
    draw = next(iter(sampler()))[0]
    assert isinstance(draw, Draw) and isinstance(draw.index, int) and isinstance(draw.seed, int) and draw == tuple(draw)


class Shares:
    "Weights and nothing else."
    def __init__(self, weights): self.weights = weights


@pytest.mark.parametrize("change, match", [
    (dict(mixture=None), "holds no mixture"),
    (dict(sample=0), "0 samples after 3 steps"),
    (dict(sample=2), "2 samples after 3 steps"),
    (dict(step=0), "after 0 steps")])
def test_damaged_states_change_nothing(change, match):
    make = lambda: MixtureSampler({"a": 5, "b": 7}, DataEquilibrium(["a", "b"], 0.5), 4, seed=1)
    one, other = make(), make()
    taken = iter(one)
    for _ in range(3): next(taken)
    before = other.state_dict()
    with pytest.raises(MixtureError, match=match): other.load_state_dict(one.state_dict() | change)
    assert other.state_dict() == before


def test_mixtures_without_state_or_weights():
    with pytest.raises(MixtureError, match="without weights"): MixtureSampler({"a": 5}, object(), 4, seed=1)
    plain = MixtureSampler({"a": 5}, Shares({"a": 1.0}), 4, seed=1)
    plain.load_state_dict(plain.state_dict())
    with pytest.raises(MixtureError, match="holds a mixture"):
        plain.load_state_dict(MixtureSampler({"a": 5}, FixedMixture({"a": 1.0}), 4, seed=1).state_dict())


def test_a_state_from_before_the_last_update_is_gone():
    mixture = DataEquilibrium(list(LENGTHS), 0.5)
    s = sampler(mixture=mixture); it = iter(s)
    for _ in range(5): next(it)
    mixture.update(dict.fromkeys(LENGTHS, 20.0), 5)
    assert s.state_dict(consumed=5)["step"] == 5
    with pytest.raises(MixtureError, match="updated at step 5"): s.state_dict(consumed=3)
    next(it)
    assert s.state_dict(consumed=5)["mixture"]["step"] == 5  # fetched ahead, not trained
    again = sampler(mixture=mixture)  # a policy that comes from an earlier run
    assert again.state_dict()["step"] == 0 and next(iter(again)) and again.state_dict(consumed=0)["step"] == 0


@pytest.mark.parametrize("rank", [-1, 2, 0.5, True, "0"])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(MixtureError, match="from 0 to 1"): sampler(rank=rank, world_size=2)
