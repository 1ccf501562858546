"""How well descriptors tell clusters of clients apart, before any training.

    python benchmarks/descriptors.py --data DIR        (an image folder; without it, scikit-learn's digits)

Clients are grouped by k-means on their standardised descriptors, as the generator ``mixture`` groups them, and the
groups are held against the true clusters of the partition: adjusted Rand index of the training clients and of the
unseen ones, 1 for a perfect match, 0 for chance. Writes benchmarks/descriptors.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.cluster import k_means
from sklearn.metrics import adjusted_rand_score

from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import load_client, load_partition
from framp_core.descriptors import Standardiser, build_descriptor

CLUSTERS = 4
SETTINGS: dict[str, dict[str, Scalar]] = {
    "concept shift": {"partition.concept-shift-clusters": CLUSTERS},
    "concept shift, alpha 0.1": {"partition.concept-shift-clusters": CLUSTERS, "partition.alpha": 0.1},
    "rotation": {"partition.feature-shift": "rotation", "partition.feature-shift-clusters": CLUSTERS},
    "colour": {"partition.feature-shift": "colour", "partition.feature-shift-clusters": CLUSTERS},
}
DESCRIPTORS = ("class-moments", "moments", "histogram")


def indices_of(config: FrampConfig) -> tuple[float, float]:
    """Adjusted Rand index of the training clients and of the unseen ones."""
    nodes = config.partition.nodes
    images, partition = load_partition(config, nodes)
    descriptor = build_descriptor(config, images.shape, images.classes)
    described = np.stack([descriptor.describe(load_client(config, number, nodes)) for number in range(nodes)])
    seen = np.array([split.role == "train" for split in partition.clients])
    shifts = [split.concept_shift or split.feature_shift for split in partition.clients]
    truth = np.array([shift.cluster for shift in shifts if shift is not None])
    points = Standardiser(descriptor, described[seen])(described).astype(np.float64)
    centres, *_ = k_means(points[seen], CLUSTERS, n_init=20, random_state=0)
    found = ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    return adjusted_rand_score(truth[seen], found[seen]), adjusted_rand_score(truth[~seen], found[~seen])


def main() -> None:
    """Print the table and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="image folder")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    preset = Path(__file__).parents[1] / "presets" / ("cifar10-study.toml" if given.data else "digits.toml")
    source: dict[str, Scalar] = {"data.root": str(given.data.resolve())} if given.data else {}
    torch.set_num_threads(1)
    table = Table("setting", *DESCRIPTORS, title="Adjusted Rand index, training / unseen clients, mean over seeds")
    rows = {}
    for setting, shift in SETTINGS.items():
        rows[setting] = {
            name: np.mean([
                indices_of(FrampConfig.load(preset, {**source, **shift, "descriptor.name": name, "seed": seed}))
                for seed in range(given.seeds)
            ], axis=0).round(3).tolist()
            for name in DESCRIPTORS
        }  # fmt: skip
        table.add_row(setting, *(f"{train:.2f} / {unseen:.2f}" for train, unseen in rows[setting].values()))
    Console().print(table)
    Path(__file__).with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
