"""Every sample once, equally many batches everywhere, and the same global batches for any number of ranks."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shadowlit.data.collate import Collate, PromptCollate
from shadowlit.data.loader import ResumableLoader, make_loader
from shadowlit.data.sampler import FILLER, ShardedBatchSampler, epoch_order
from shadowlit.errors import DataError


def test_the_docstrings_example():
    ranks = [list(ShardedBatchSampler(5, 2, 2, rank, shuffle=False)) for rank in range(2)]
    assert ranks == [[[0, 2], [4]], [[1, 3], [FILLER]]]


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 60), batch_size=st.integers(1, 7), ranks=st.integers(1, 5), seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3), shuffle=st.booleans(),
)  # fmt: skip
def test_every_sample_exactly_once(n, batch_size, ranks, seed, epoch, shuffle):
    samplers = [ShardedBatchSampler(n, batch_size, ranks, rank, seed, shuffle) for rank in range(ranks)]
    batches = [list(sampler.batches(epoch)) for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    flat = [i for own in batches for batch in own for i in batch]
    assert sorted(i for i in flat if i != FILLER) == list(range(n))
    assert flat.count(FILLER) < ranks
    assert all(FILLER not in batch for own in batches for batch in own[:-1])
    assert all(1 <= len(batch) <= batch_size for own in batches for batch in own)
    for together in zip(*batches, strict=True):
        assert len({len(batch) for batch in together}) == 1
    # One process with the whole batch sees the same sets.
    alone = ShardedBatchSampler(n, batch_size * ranks, 1, 0, seed, shuffle).batches(epoch)
    for whole, together in zip(alone, zip(*batches, strict=True), strict=True):
        assert sorted(whole) == sorted(i for batch in together for i in batch if i != FILLER)
    # A start in the middle is the tail of the whole.
    middle = len(samplers[0]) // 2
    assert list(samplers[0].batches(epoch, middle)) == batches[0][middle:]


@given(n=st.integers(1, 60), batch_size=st.integers(1, 7), ranks=st.integers(1, 5))
def test_drop_last_leaves_whole_batches(n, batch_size, ranks):
    if n < batch_size * ranks:
        with pytest.raises(
            DataError,
            match=r"nothing is left of \d+ samples?: .*Lower data\.batch_size or set data\.drop_last=false",
        ):
            ShardedBatchSampler(n, batch_size, ranks, 0, drop_last=True)
        return
    samplers = [ShardedBatchSampler(n, batch_size, ranks, rank, drop_last=True) for rank in range(ranks)]
    flat = [i for sampler in samplers for batch in sampler for i in batch]
    assert len(flat) == len(set(flat)) == n - n % (batch_size * ranks)
    assert FILLER not in flat


def test_the_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(50, 3, 1).tolist() == epoch_order(50, 3, 1).tolist()
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert epoch_order(4, 3, 7, shuffle=False).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", [
    {"num_samples": 0}, {"batch_size": 0}, {"num_replicas": 0}, {"rank": 1}, {"rank": -1}, {"seed": -1},
])  # fmt: skip
def test_impossible_numbers(wrong):
    with pytest.raises(DataError, match=r"can't make batches of .* expected at least one sample"):
        ShardedBatchSampler(**{"num_samples": 3, "batch_size": 2, **wrong})


# -- loaders ------------------------------------------------------------------------------------------------------


class Numbers:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def loader(num_workers=0, **options):
    sampler = ShardedBatchSampler(10, 3, seed=5)
    return ResumableLoader(Numbers(), sampler, collate_fn=list, num_workers=num_workers, **options)


EPOCHS = [list(ShardedBatchSampler(10, 3, seed=5).batches(epoch)) for epoch in range(4)]


def test_epoch_after_epoch():
    own = loader()
    assert [list(own) for _ in range(3)] == EPOCHS[:3]
    assert len(own) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 3, 4, 5])
def test_the_state_is_the_next_batch_to_deliver(taken, num_workers):
    own = loader(num_workers)
    assert own.state_dict() == {"epoch": 0, "batch": 0}
    iterators = iter(own), iter(own)
    for i in range(taken):
        assert next(iterators[i // 4]) == EPOCHS[i // 4][i % 4]
    assert own.state_dict() == {"epoch": taken // 4, "batch": taken % 4}
    other = loader()
    other.load_state_dict(own.state_dict())
    assert len(other) == 4
    assert list(other) == EPOCHS[taken // 4][taken % 4 :]
    assert list(other) == EPOCHS[taken // 4 + 1]


def test_an_epoch_that_is_cut_short():
    own = loader(batches_per_epoch=2)
    for epoch in range(3):
        assert own.state_dict() == {"epoch": epoch, "batch": 0}
        iterator = iter(own)
        assert [next(iterator), next(iterator)] == EPOCHS[epoch][:2]
    left = loader()
    next(iter(left))
    assert list(left) == EPOCHS[1]


def test_unused_iterators_change_nothing():
    own = loader()
    iter(own), iter(own)
    assert list(own) == EPOCHS[0]


def test_iterating_leaves_the_global_random_state_alone():
    import torch

    for own in (loader(), make_loader(Numbers(), ShardedBatchSampler(10, 3, shuffle=False), collate_fn=list)):
        before = torch.get_rng_state()
        list(own)
        assert torch.equal(before, torch.get_rng_state())


def test_evaluation_batches_are_the_samplers():
    for rank in range(3):
        sampler = ShardedBatchSampler(10, 3, 3, rank, shuffle=False)
        own = make_loader(Numbers(), sampler, collate_fn=list)
        assert type(own) is DataLoader
        assert list(own) == list(sampler)


# -- collate ------------------------------------------------------------------------------------------------------


def test_right_padding_by_hand():
    samples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    batch = pickle.loads(pickle.dumps(Collate(9)))(samples)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [-100, -100, -100]],
    }
    assert {str(value.dtype) for value in batch.values()} == {"torch.int64"}
    assert Collate(9, 4)(samples)["labels"].shape == (2, 4)
    assert Collate(9, 3)(samples)["labels"].shape == (2, 3)


def test_left_padding_by_hand():
    samples = [{"input_ids": [1, 2, 3], "index": 7, "reference": "x"}, {"input_ids": [4], "index": -1}]
    batch = pickle.loads(pickle.dumps(PromptCollate(9)))(samples)
    assert batch.pop("reference") == ["x", None]
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [9, 9, 4]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "index": [7, -1],
    }
    assert {str(value.dtype) for value in batch.values()} == {"torch.int64"}
