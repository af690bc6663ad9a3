"""The sweep over collectives and its fit; the three all-reduces of the lesson, counted; on real ranks."""

import pytest
import torch

from labkit import run
from labkit.comm import Comm
from labkit.measure.collectives import OPS, fit, fits, predict, sweep
from labkit.parallel.all_reduce import ALGORITHMS


def sums_and_counts(comm: Comm, name: str, n: int) -> tuple:
    x = torch.arange(n, dtype=torch.float64) * (comm.rank + 1)
    before = x.clone()
    total = ALGORITHMS[name](x, comm)
    assert torch.equal(x, before)
    tallies = comm.tallies.values()
    return total, sum(t.calls for t in tallies), sum(t.wire_bytes for t in tallies)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_each_all_reduce_takes_the_steps_and_bytes_of_its_table(name: str, ranks: int) -> None:
    for n in (12, 13):  # three and four ranks don't divide 13
        results = run(sums_and_counts, ranks, args=(name, n))
        expected = torch.arange(n, dtype=torch.float64) * sum(range(1, ranks + 1))
        padded = -(-n // ranks) * ranks * 8
        steps, wire = {
            "ring": (2 * (ranks - 1), 2 * (ranks - 1) * padded // ranks),
            "one-shot": (1, (ranks - 1) * n * 8),
            "two-shot": (2, 2 * (ranks - 1) * padded // ranks),
        }[name]
        for total, calls, sent in results:
            assert torch.equal(total, expected)
            assert calls == steps
            assert sent == wire if n == 12 or name != "ring" else sent <= wire  # a ring's chunks need no padding


def test_a_sweep_has_a_row_for_each_point() -> None:
    sizes = (256, 4096, 65536)
    frame = sweep((2, 3), sizes=sizes, seconds=0.005)
    memory = frame[frame["path"] == "shared memory"]
    assert set(frame[frame["path"] == "sockets"]["op"]) == set(OPS)
    assert memory.empty or set(memory["op"]) == set(OPS) - {"send_recv"}
    assert (frame.groupby(["op", "ranks", "path"]).size() == 3).all()
    assert (frame["p95_us"] >= frame["median_us"]).all() and (frame["calls"] >= 7).all()
    reduced = frame[(frame["op"] == "all_reduce") & (frame["ranks"] == 3)]
    assert (reduced["busbw_gb_s"] / reduced["algbw_gb_s"]).tolist() == pytest.approx([4 / 3] * len(reduced))
    assert (reduced["algbw_gb_s"] * reduced["median_us"] * 1e3).tolist() == pytest.approx(reduced["bytes"].tolist())


def test_a_fit_finds_latency_and_bandwidth_again() -> None:
    sizes = [2**k for k in range(8, 27)]

    def micros(size: int) -> float:  # 20 us and 5 GB/s; from 1 MiB on 100 us and 2 GB/s
        return 20 + size / 5e3 if size < 2**20 else 100 + size / 2e3

    lines = fit(sizes, [micros(s) for s in sizes])
    assert [start for start, _, _ in lines] == [256, 2**20]
    assert [(alpha, beta) for _, alpha, beta in lines] == [pytest.approx((20, 5)), pytest.approx((100, 2))]
    assert predict(lines, 3000) == pytest.approx(micros(3000)) and predict(lines, 2**27) == pytest.approx(
        100 + 2**27 / 2e3
    )
    assert len(fit(sizes[:5], [micros(s) for s in sizes[:5]])) == 1


def test_fits_are_judged_on_sizes_that_they_have_not_seen() -> None:
    frame = sweep((2,), ("all_reduce",), [2**k for k in range(8, 18)], paths=["sockets"], seconds=0.005)
    [row] = fits(frame).to_dict("records")
    assert row["alpha_us"] > 0 and row["held_out"] >= 0
    unseen = frame.sort_values("bytes")["bytes"].iloc[1::2].tolist()
    frame.loc[frame["bytes"].isin(unseen), "median_us"] *= 3  # what was fitted stays as it was
    [spoilt] = fits(frame).to_dict("records")
    assert spoilt["residual"] == row["residual"] and spoilt["held_out"] > 0.4


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(ValueError, match="no operation 'allreduce': use all_reduce"):
        sweep((2,), ("allreduce",))
    with pytest.raises(ValueError, match="no path 'rdma'"):
        sweep((2,), paths=("rdma",))
    with pytest.raises(ValueError, match="use 2 or more"):
        sweep((1,))
