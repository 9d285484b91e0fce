"Adapters keep the sampler's stream."
import json
import pytest
from foundir_v2.adapters import DrawDataset, FlatBatchSampler, MixtureIterator
from foundir_v2.mixture import FixedMixture, MixtureError
from foundir_v2.sampler import MixtureSampler

LENGTHS = {"a": 30, "b": 5}
PARTS = {t: [f"{t}{i}" for i in range(n)] for t, n in LENGTHS.items()}

def sampler(**options): return MixtureSampler(LENGTHS, FixedMixture({"a": 0.5, "b": 0.5}), batch_size=4, seed=2, **options)

def test_flat_indices_reach_the_drawn_items():
    torch_data = pytest.importorskip("torch.utils.data")
    loader = torch_data.DataLoader(torch_data.ConcatDataset([PARTS["b"], PARTS["a"]]), batch_sampler=FlatBatchSampler(sampler(interval=6), ["b", "a"]), collate_fn=list)
    assert list(loader) == [[PARTS[d.task][d.index] for d in batch] for batch in sampler(interval=6)]
    with pytest.raises(MixtureError): FlatBatchSampler(sampler(), ["a", "a"])

@pytest.mark.parametrize("stop", range(12))
def test_iterator_resumes_at_any_sample(stop):
    whole = MixtureIterator(PARTS, sampler(interval=2))
    expected = [next(whole) for _ in range(20)]
    one = MixtureIterator(PARTS, sampler(interval=2))
    for _ in range(stop): next(one)
    two = MixtureIterator(PARTS, sampler(interval=2))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [next(two) for _ in range(20 - stop)] == expected[stop:] and all(r["item"] == PARTS[r["task"]][r["index"]] for r in expected)

def test_iterator_ends_and_refuses():
    ending = MixtureIterator(PARTS, sampler(exhaustion="stop"))
    assert 5 <= sum(r["task"] == "b" for r in ending) < 9
    with pytest.raises(MixtureError): MixtureIterator({"a": PARTS["a"]}, sampler())
    with pytest.raises(MixtureError): MixtureIterator(PARTS, sampler()).load_state_dict({"done": 1})

def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    parts = {t: datasets.Dataset.from_dict({"name": names}) for t, names in PARTS.items()}
    rows = DrawDataset(parts)
    assert rows.lengths == LENGTHS
    batch = next(iter(sampler()))
    assert [rows[d] for d in batch] == [{"name": PARTS[d.task][d.index], "task": d.task, "seed": d.seed} for d in batch]
    assert next(MixtureIterator(parts, sampler()))["item"] == {"name": PARTS[batch[0].task][batch[0].index]}
    with pytest.raises(MixtureError, match="column seed"): DrawDataset({"a": [{"seed": 1}] * 30, "b": [{"seed": 1}] * 5})[batch[0]]
