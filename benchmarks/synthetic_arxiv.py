"""Write a synthetic graph of ogbn-arxiv's size, for measuring speed and memory where the real one is not at hand.

    python benchmarks/synthetic_arxiv.py FILE.npz [--seed 0] [--tiny]
    framp run presets/graph-file.toml -o data.root=$PWD/FILE.npz

It has ogbn-arxiv's 169,343 nodes, 1,166,243 directed edges, 128 features and 40 classes of very different sizes,
power-law in-degrees, and an edge homophily of about 0.65, but it is random: an accuracy on it says nothing about the
real data set. The array ``synthetic`` of the file says so too. With --tiny, a hundredth of the nodes and edges.
"""

import argparse
from pathlib import Path

import numpy as np

HOMOPHILY = 0.65
"""Share of the edges that join nodes of one class."""
EXPONENT = 2.5
"""Of the power law of the in-degrees: P(degree > d) falls like d^(1 - EXPONENT)."""
NOISE = 3.0
"""Standard deviation of a feature about its class mean; class means are standard normal per feature."""


def synthetic_arxiv(
    seed: int, nodes: int = 169_343, edges: int = 1_166_243, features: int = 128, classes: int = 40
) -> dict[str, np.ndarray]:
    """The arrays ``x``, ``edge_index``, ``y``, and ``synthetic``, a sentence that says what they are.

    Class sizes fall like 1 / rank. An edge's target is drawn by the nodes' power-law weights, its source uniformly:
    with a probability from the target's class, otherwise from all nodes. No pair of nodes is joined twice.
    """
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, classes + 1)
    # Every class first gets one node.
    y = np.concatenate([np.arange(classes), rng.choice(classes, nodes - classes, p=shares / shares.sum())])
    y = rng.permutation(y)
    means = rng.standard_normal((classes, features), dtype=np.float32)
    x = means[y] + np.float32(NOISE) * rng.standard_normal((nodes, features), dtype=np.float32)
    note = f"synthetic graph of ogbn-arxiv's kind, seed {seed}; not ogbn-arxiv"
    return {"x": x, "edge_index": _edges(rng, y, edges), "y": y, "synthetic": np.array(note)}


def _edges(rng: np.random.Generator, y: np.ndarray, edges: int) -> np.ndarray:
    nodes, sizes = len(y), np.bincount(y)
    by_class, starts = np.argsort(y, kind="stable"), np.cumsum(sizes) - sizes
    weights = np.cumsum(rng.pareto(EXPONENT - 1, nodes) + 1)
    # Sources that are drawn from all nodes are of the target's class by chance.
    chance = np.bincount(y, np.diff(weights, prepend=0)) @ sizes / (weights[-1] * nodes)
    pairs = np.empty((2, 0), dtype=np.int64)
    while pairs.shape[1] < edges:
        count = edges - pairs.shape[1]
        # Pairs that are drawn again are mostly of one class, so what they leave open is as well.
        lacking = (HOMOPHILY * edges - np.count_nonzero(y[pairs[0]] == y[pairs[1]])) / count
        inside = np.clip((lacking - chance) / (1 - chance), 0, 1)
        target = np.minimum(np.searchsorted(weights, rng.random(count) * weights[-1], side="right"), nodes - 1)
        same = by_class[starts[y[target]] + (rng.random(count) * sizes[y[target]]).astype(np.int64)]
        source = np.where(rng.random(count) < inside, same, rng.integers(nodes, size=count))
        pairs = np.concatenate([pairs, np.stack([source, target])[:, source != target]], axis=1)
        _, first = np.unique(pairs.min(axis=0) * nodes + pairs.max(axis=0), return_index=True)
        pairs = pairs[:, np.sort(first)]
    return pairs


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="to write; ends in .npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the nodes and edges")
    given = parser.parse_args()
    if given.file.suffix != ".npz":
        parser.error(f"{str(given.file)!r} does not end in .npz")
    size = {"nodes": 1693, "edges": 11_662} if given.tiny else {}
    np.savez(given.file, **synthetic_arxiv(given.seed, **size))
    print(f"{given.file}: {given.file.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
