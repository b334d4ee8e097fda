"""How an epoch is cut into batches."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches import balance, batches_per_epoch, epoch_batches

items = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=30)


@pytest.mark.proves("train_batch_size")
@settings(deadline=None)
@given(items=items, batch_size=st.integers(1, 7), seed=st.integers(0, 2**63), epoch=st.integers(1, 50))
def test_every_item_is_seen_as_often_as_it_repeats_in_batches_of_one_bucket(items, batch_size, seed, epoch):
    buckets, repeats = [b for b, _ in items], [n for _, n in items]
    batches = epoch_batches(buckets, repeats, batch_size, seed, epoch)
    assert Counter(i for batch in batches for i in batch) == Counter({i: n for i, n in enumerate(repeats) if n})
    assert all(len({buckets[i] for i in batch}) == 1 for batch in batches)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == batches_per_epoch(buckets, repeats, batch_size)
    # At most one batch of a bucket is not full.
    assert all(n <= 1 for n in Counter(buckets[b[0]] for b in batches if len(b) < batch_size).values())


def test_an_epoch_is_the_same_whenever_it_is_made_and_differs_from_others():
    def epoch(seed, number):
        return epoch_batches("aabbccaabb" * 3, [2] * 30, 4, seed, number)

    assert epoch(1, 5) == epoch(1, 5)
    assert epoch(1, 5) != epoch(1, 6)
    assert epoch(1, 5) != epoch(2, 5)


def test_the_order_is_pinned_so_that_a_seed_means_the_same_in_later_versions():
    assert epoch_batches("aabab", [1, 1, 2, 1, 1], 2, 7, 1) == [(0,), (3, 1), (2,), (4, 2)]


@pytest.mark.parametrize(
    ("repeats", "wanted", "expected"),
    [
        ([1, 1, 1], 3, [1, 1, 1]),
        ([1, 1, 1], 2, [1, 1, 0]),  # too many: the last ones are not used
        ([1, 1, 1], 7, [3, 2, 2]),  # too few: round after round one more
        ([5, 5], 7, [5, 2]),
        ([2, 1], 6, [4, 2]),
        ([0, 1], 3, [0, 3]),
    ],
)
def test_regularisation_images_are_cut_or_repeated_to_the_number_wanted(repeats, wanted, expected):
    assert balance(repeats, wanted) == expected


@settings(deadline=None)
@given(repeats=st.lists(st.integers(1, 9), min_size=1, max_size=20), wanted=st.integers(0, 500))
def test_balanced_repeats_add_up_to_exactly_the_number_wanted(repeats, wanted):
    assert sum(balance(repeats, wanted)) == wanted
