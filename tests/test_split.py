"""Shares cover everything, overlap only where they must, and are as even as can be, for any degree."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import split
from labkit.mesh import Layout


@given(st.integers(0, 1000), st.integers(1, 64))
def test_even_shares_cover_everything_once(n: int, parts: int) -> None:
    shares = split.even(n, parts)
    assert [i for share in shares for i in share] == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 16), st.integers(1, 8), st.data())
def test_heads_are_balanced_and_have_the_kv_they_read(kv_heads: int, group: int, data: st.DataObject) -> None:
    query_heads = kv_heads * group
    tp = data.draw(st.integers(1, query_heads))
    shares = split.heads(query_heads, kv_heads, tp)
    assert [h for share in shares for h in share.query] == list(range(query_heads))
    sizes = [len(share.query) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        assert list(share.kv) == sorted({h // group for h in share.query})
        # Padded, the local query heads are whole groups, in the order of the local KV heads.
        assert share.pad_left + len(share.query) + share.pad_right == len(share.kv) * group
        padded_first = share.query.start - share.pad_left
        assert padded_first == share.kv.start * group


def test_smollm2_heads_over_two_and_four_ranks() -> None:
    two, four = split.heads(9, 3, 2), split.heads(9, 3, 4)
    assert [len(s.query) for s in two] == [5, 4]
    assert [list(s.kv) for s in two] == [[0, 1], [1, 2]]  # KV head 1 is on both
    assert [len(s.query) for s in four] == [3, 2, 2, 2]
    assert [list(s.kv) for s in four] == [[0], [1], [1, 2], [2]]


@pytest.mark.parametrize("tp", [0, 10])
def test_too_many_ranks_for_the_heads_names_the_legal_values(tp: int) -> None:
    with pytest.raises(split.LayoutError, match=rf"tensor_parallel_size={tp} .* 9 query heads .* use 1 to 9"):
        split.heads(9, 3, tp)


@given(st.integers(1, 200), st.data())
def test_layers_are_shared_out_evenly_the_last_stages_first(n: int, data: st.DataObject) -> None:
    pp = data.draw(st.integers(1, n))
    shares = split.layers(n, pp)
    assert [i for share in shares for i in share] == list(range(n))
    sizes = [len(share) for share in shares]
    assert sizes == sorted(sizes) and sizes[-1] - sizes[0] <= 1


@given(st.integers(0, 500), st.integers(1, 9), st.integers(1, 9))
def test_every_row_of_the_head_is_on_one_rank_which_has_its_embedding(n: int, tp: int, pp: int) -> None:
    shares = split.vocabulary(n, tp, pp)
    assert [i for shard in shares for part in shard for i in part] == list(range(n))
    for shard, rows in zip(shares, split.even(n, tp), strict=True):
        assert len(shard) == pp and sum(map(len, shard)) == len(rows)
        assert max(map(len, shard)) - min(map(len, shard)) <= 1


def test_layers_refuse_more_stages_than_layers() -> None:
    with pytest.raises(split.LayoutError, match="pipeline_parallel_size=31 does not fit 30 layers: use 1 to 30"):
        split.layers(30, 31)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.data())
def test_layout_places_ranks_as_arange_view_dp_pp_tp(dp: int, pp: int, tp: int, data: st.DataObject) -> None:
    layout = Layout(tp=tp, pp=pp, dp=dp)
    rank = data.draw(st.integers(0, layout.world - 1))
    place = layout.place(rank)
    assert (place["dp"] * pp + place["pp"]) * tp + place["tp"] == rank
    for axis, size in (("tp", tp), ("pp", pp), ("dp", dp)):
        peers = layout.peers(rank, axis)
        assert len(peers) == size and peers[place[axis]] == rank


@pytest.mark.parametrize("degrees", [{"tp": 0}, {"pp": -1}, {"dp": 1.5}])
def test_degrees_are_whole_and_positive(degrees: dict) -> None:
    with pytest.raises(split.LayoutError, match="use a whole number, 1 or more"):
        Layout(**degrees)


@pytest.mark.parametrize("how", ["contiguous", "round-robin"])
@given(ranks=st.integers(1, 16), more=st.integers(0, 64))
def test_every_expert_has_one_rank_and_counts_differ_by_one(how: str, ranks: int, more: int) -> None:
    placement = split.experts(ranks + more, ranks, how)
    assert sorted(e for mine in placement for e in mine) == list(range(ranks + more))
    assert max(map(len, placement)) - min(map(len, placement)) <= 1


def _best(load: list[int], ranks: int) -> float:
    """Busiest over mean of the best placement with as many experts on each rank as `experts` gives, by trying all."""
    sizes = [len(part) for part in split.even(len(load), ranks)]

    def place(left: frozenset[int], sizes: list[int]) -> float:
        if not sizes:
            return 0
        return min(
            max(sum(load[e] for e in mine), place(left - set(mine), sizes[1:])) for mine in combinations(left, sizes[0])
        )

    return place(frozenset(range(len(load))), sizes) * ranks / sum(load)


@given(st.lists(st.integers(1, 1000), min_size=4, max_size=8), st.integers(2, 4))
def test_experts_by_load_are_close_to_the_best_placement(load: list[int], ranks: int) -> None:
    placement = split.experts_by_load(load, ranks)
    assert sorted(e for mine in placement for e in mine) == list(range(len(load)))
    assert max(map(len, placement)) - min(map(len, placement)) <= 1
    assert split.busiest_over_mean(load, placement) <= _best(load, ranks) * 4 / 3


def test_placement_repairs_a_skewed_load() -> None:
    load = [8, 7, 1, 1, 6, 5, 1, 1]  # hot experts are neighbours
    contiguous, by_load = split.experts(8, 4), split.experts_by_load(load, 4)
    assert split.busiest_over_mean(load, contiguous) == 2.0
    assert split.busiest_over_mean(load, by_load) == 9 * 4 / 30
    assert split.busiest_over_mean([0] * 8, by_load) == 1.0


@pytest.mark.parametrize(("n", "ranks", "how"), [(8, 9, "contiguous"), (8, 0, "contiguous"), (8, 2, "linear")])
def test_what_is_no_placement_names_the_legal_values(n: int, ranks: int, how: str) -> None:
    with pytest.raises(split.LayoutError, match="use "):
        split.experts(n, ranks, how)


def test_the_expert_axis_is_dp_times_tp_inside_a_stage() -> None:
    layout = Layout(tp=2, pp=2, dp=2, expert_parallel=True)
    assert layout.ep == 4 and layout.as_dict() == {"tp": 2, "pp": 2, "dp": 2, "ep": 4}
    assert layout.peers(1, "ep") == [0, 1, 4, 5] and layout.peers(6, "ep") == [2, 3, 6, 7]
    assert Layout(tp=2, dp=2).ep == 1 and Layout(tp=2, dp=2).peers(3, "ep") == [3]
