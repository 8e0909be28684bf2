"""A memory's search beside a product of matrices in numpy and beside the graph of usearch: the same
rows and queries, one query at a time, interleaved, in one thread.

    python -m bench.memory --rows 50000 100000

The embeddings are tanh(z W) of normal z with `--intrinsic` dimensions: latents of a world lie near
a surface of few dimensions. Times are of the processor, but for a commit, which waits for the disk.
Recall is the share of the true nearest rows, by float64, that are found.

usearch is left out where it cannot be imported, and the output says so.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.rows import Format, Ids
from vicreg_jepa.memory.usearch_index import UsearchIndex
from vicreg_jepa.memory.writer import Writer

Search = Callable[[NDArray[np.float32]], Ids]
WORLD = "a world"
AT_ONCE = 1000


def drawn(count: int, dims: int, intrinsic: int, seed: int) -> NDArray[np.float32]:
    weights = np.random.default_rng(0).standard_normal((intrinsic, dims)) / intrinsic**0.5
    z = np.random.default_rng(seed).standard_normal((count, intrinsic))
    return np.tanh(z @ weights).astype(np.float32)


def format_of(dims: int) -> Format:
    return Format("bench", dims, 2, 2, 0)


def evicting(path: Path, dims: int, most: int) -> float:
    """Seconds of the write that makes room in a full store: a sixteenth of its rows go."""
    with Writer(path, format_of(dims), most=most) as store:
        episode, zeros = store.begin([WORLD]), np.zeros((1, 2))
        begun = time.process_time()
        store.write(episode, [0], np.zeros((1, dims)), zeros, zeros, np.empty((1, 0)), [0.0])
        return time.process_time() - begun


def filled(path: Path, embeddings: NDArray[np.float32], most: int) -> float:
    """Writes a store; returns the milliseconds of one row's commit, the median of 50."""
    count, dims = embeddings.shape
    places = np.random.default_rng(1).uniform(0, 64, (count, 2))
    surprises = np.random.default_rng(2).exponential(1.0, (count,))
    with Writer(path, format_of(dims), most=most) as store:
        (episode,) = store.begin([WORLD])

        def write(begin: int, end: int) -> None:
            rows = slice(begin, end)
            number = np.full(end - begin, episode)
            actions, outcomes = places[rows] / 64, np.empty((end - begin, 0))
            store.write(
                number,
                np.arange(begin, end),
                embeddings[rows],
                places[rows],
                actions,
                outcomes,
                surprises[rows],
            )

        single = count - 50
        for begin in range(0, single, AT_ONCE):
            write(begin, min(begin + AT_ONCE, single))
        times = []
        for number in range(single, count):
            begun = time.perf_counter()
            write(number, number + 1)
            times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def plain(embeddings: NDArray[np.float32], k: int) -> Search:
    """In float32, the nearest in no order, and the row numbers alone."""
    squares = np.square(embeddings).sum(axis=1)

    def search(query: NDArray[np.float32]) -> Ids:
        distances = squares - 2 * (embeddings @ query)
        return 1 + np.argpartition(distances, k)[:k]

    return search


def contenders(path: Path, embeddings: NDArray[np.float32], k: int) -> dict[str, Search]:
    def opened(name: str, reader: Callable[[], Reader]) -> Reader:
        begun = time.process_time()
        its = reader()
        print(f"{len(embeddings)} rows | {name} | opened in {time.process_time() - begun:.2f} s")
        return its

    exact = opened("ours", lambda: Reader(path))
    found: dict[str, Search] = {
        "ours": lambda query: exact.nearest(query[None], k, WORLD)[0].rows.id,
        "numpy, matmul and argpartition": plain(embeddings, k),
    }
    try:
        graph = opened("ours on usearch", lambda: Reader(path, index=UsearchIndex(threads=1)))
        found["ours on usearch"] = lambda query: graph.nearest(query[None], k, WORLD)[0].rows.id
    except ImportError as error:
        print(f"left out: usearch ({error})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000])
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--intrinsic", type=int, default=8)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--nearest", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    k, queries = options.nearest, drawn(options.queries, options.dims, options.intrinsic, 1)
    for count in options.rows:
        embeddings = drawn(count, options.dims, options.intrinsic, 2)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            commit = filled(path, embeddings, count)
            size = path.stat().st_size / count / 1024
            print(f"{count} rows | {commit:.1f} ms a commit of one row | {size:.2f} KiB a row")
            searches = contenders(path, embeddings, k)
            times: dict[str, list[float]] = {name: [] for name in searches}
            hits = dict.fromkeys(searches, 0)
            wide = embeddings.astype(np.float64)
            true = [1 + np.argsort(np.square(wide - query).sum(axis=1))[:k] for query in queries]
            for number, query in enumerate(queries):
                for name, search in searches.items():
                    begun = time.process_time()
                    ids = search(query)
                    times[name].append(1000 * (time.process_time() - begun))
                    hits[name] += len(np.intersect1d(ids, true[number]))
            print(f"{count} rows | {evicting(path, options.dims, count):.2f} s to make room")
            for name in searches:
                print(
                    f"{count} rows | {name} | {statistics.median(times[name]):.2f} ms a query, "
                    f"least {min(times[name]):.2f} | recall {hits[name] / k / len(queries):.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
