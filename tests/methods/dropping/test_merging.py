"""Merged tokens are means of their parts, as a loop over pairs finds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlms_tutorial.errors import InputError
from xlvlms_tutorial.methods.dropping import merge_tokens


def merged_by_hand(states, keep):
    """Lists of members, merged pair by pair."""
    members = [[k] for k in range(len(states))]
    while len(members) > keep:
        means = [states[group].mean(dim=0) for group in members]
        pairs = []
        for a in range(0, len(members), 2):
            similar = [
                (float(torch.cosine_similarity(means[a], means[b], dim=0)), b)
                for b in range(1, len(members), 2)
            ]
            pairs.append((*max(similar), a))
        pairs.sort(reverse=True)
        n = min(len(members) - keep, len(members) // 2)
        for _, b, a in pairs[:n]:
            members[b] = members[b] + members[a]
        gone = {a for _, _, a in pairs[:n]}
        members = [group for k, group in enumerate(members) if k not in gone]
    return members


@given(n=st.integers(1, 17), keep=st.integers(1, 17), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_means_are_those_of_the_members_that_a_loop_finds(n, keep, seed):
    keep = min(n, keep)
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(n, 5, dtype=torch.float64, generator=random)
    positions, means = merge_tokens(states, keep)
    members = merged_by_hand(states, keep)
    assert len(positions) == keep
    assert positions.tolist() == [group[0] for group in members]
    expected = torch.stack([states[group].mean(dim=0) for group in members])
    torch.testing.assert_close(means, expected, rtol=0, atol=1e-12)
    sizes = torch.tensor([len(group) for group in members], dtype=torch.float64)
    torch.testing.assert_close((means * sizes[:, None]).sum(0), states.sum(0))


def test_equal_tokens_merge_first_and_lose_nothing():
    states = torch.eye(4)[[0, 1, 2, 3, 0, 2, 1, 3]]
    positions, means = merge_tokens(states, 6)
    assert len(positions) == 6
    assert {tuple(row) for row in means.tolist()} == {tuple(row) for row in torch.eye(4).tolist()}


def test_keep_is_one_of_the_numbers_that_there_are():
    for keep in (0, 5):
        with pytest.raises(InputError, match="give 1 to 4"):
            merge_tokens(torch.ones(4, 2), keep)
