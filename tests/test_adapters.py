"Adapters keep the sampler's stream."
import json
import pytest
from foundir_v2.adapters import DrawDataset, FlatBatchSampler, MixtureIterator
from foundir_v2.mixture import DataEquilibrium, FixedMixture, MixtureError
from foundir_v2.sampler import MixtureSampler

LENGTHS = {"a": 30, "b": 5}
PARTS = {t: [f"{t}{i}" for i in range(n)] for t, n in LENGTHS.items()}


def sampler(**options):
    return MixtureSampler(LENGTHS, FixedMixture({"a": 0.5, "b": 0.5}), batch_size=4, seed=2, **options)


def test_flat_indices_reach_the_drawn_items():
    torch_data = pytest.importorskip("torch.utils.data")
    loader = torch_data.DataLoader(torch_data.ConcatDataset([PARTS["b"], PARTS["a"]]),
                                   batch_sampler=FlatBatchSampler(sampler(interval=6), ["b", "a"]), collate_fn=list)
    assert list(loader) == [[PARTS[d.task][d.index] for d in batch] for batch in sampler(interval=6)]
    for bad in (["a", "a"], ["a"], "ab", ["a", "b", "c"]):
        with pytest.raises(MixtureError): FlatBatchSampler(sampler(), bad)
    assert isinstance(loader.batch_sampler, torch_data.Sampler)


def test_a_training_loop_of_ones_own_resumes_exactly():
    "ConcatDataset, two worker processes, a closed loop, a stop in the middle of an interval."
    torch_data = pytest.importorskip("torch.utils.data")
    def loop(state=None, stop=None):
        des = DataEquilibrium(["a", "b"], 0.5, floor=0.1)
        flat = FlatBatchSampler(MixtureSampler(LENGTHS, des, batch_size=4, seed=7, interval=5), ["a", "b"])
        if state: flat.load_state_dict(state)
        step, seen = (state["step"] if state else 0), []
        loader = torch_data.DataLoader(torch_data.ConcatDataset([PARTS["a"], PARTS["b"]]), batch_sampler=flat,
                                       num_workers=2, collate_fn=list)
        while step < 20:
            for batch in loader:
                seen.append(batch); step += 1
                if step == stop: return seen, json.loads(json.dumps(flat.state_dict(consumed=step)))
            des.update({"a": 20 + step * 0.1, "b": 20.0 - step % 3}, step)
        return seen, None
    whole, _ = loop()
    head, state = loop(stop=13)  # workers have prefetched beyond step 13
    assert head + loop(state)[0] == whole and len(whole) == 20


@pytest.mark.parametrize("stop", range(12))
def test_iterator_resumes_at_any_sample(stop):
    whole = MixtureIterator(PARTS, sampler(interval=2))
    expected = [next(whole) for _ in range(20)]
    one = MixtureIterator(PARTS, sampler(interval=2))
    for _ in range(stop): next(one)
    two = MixtureIterator(PARTS, sampler(interval=2))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [next(two) for _ in range(20 - stop)] == expected[stop:]
    assert all(r["item"] == PARTS[r["task"]][r["index"]] for r in expected)


def test_iterator_ends_and_refuses():
    ending = MixtureIterator(PARTS, sampler(exhaustion="stop"))
    assert 5 <= sum(r["task"] == "b" for r in ending) < 9
    with pytest.raises(MixtureError): MixtureIterator({"a": PARTS["a"]}, sampler())
    iterator = MixtureIterator(PARTS, sampler())
    next(iterator)
    state = iterator.state_dict()
    for bad in ({"done": 1}, None, {**state, "done": "x"}, {**state, "done": 1.5}, {**state, "done": 4},
                {**state, "done": -1}, {**state, "sampler": None}, {**state, "sampler": {}}):
        with pytest.raises(MixtureError): iterator.load_state_dict(bad)
    assert iterator.state_dict() == state
    with pytest.raises(MixtureError, match="streamed"): MixtureIterator({**PARTS, "b": iter(PARTS["b"])}, sampler())


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    parts = {t: datasets.Dataset.from_dict({"name": names}) for t, names in PARTS.items()}
    rows = DrawDataset(parts)
    assert rows.lengths == LENGTHS
    batch = next(iter(sampler()))
    assert [rows[d] for d in batch] == [{"name": PARTS[d.task][d.index], "task": d.task, "seed": d.seed} for d in batch]
    assert next(MixtureIterator(parts, sampler()))["item"] == {"name": PARTS[batch[0].task][batch[0].index]}
    with pytest.raises(MixtureError, match="unknown task c"): rows[batch[0]._replace(task="c")]
    with pytest.raises(MixtureError, match="is a str, expected a mapping"): DrawDataset(PARTS)[batch[0]]
    with pytest.raises(MixtureError, match="column seed"):
        DrawDataset({"a": [{"seed": 1}] * 30, "b": [{"seed": 1}] * 5})[batch[0]]


def test_an_update_inside_a_batch_cannot_be_saved():
    mixture = DataEquilibrium(list(PARTS), 0.5)
    samples = MixtureIterator(PARTS, MixtureSampler(LENGTHS, mixture, batch_size=4, seed=2))
    for _ in range(samples.sampler.batch_size + 1): next(samples)
    mixture.update(dict.fromkeys(PARTS, 20.0), 1)
    with pytest.raises(MixtureError, match="between batches"): samples.state_dict()
    while samples._done < len(samples._batch): next(samples)
    assert samples.state_dict()["sampler"]["mixture"]["step"] == 1
