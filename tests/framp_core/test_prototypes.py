from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.prototypes import PrototypeBank, Prototypes, alignment_loss, local_prototypes

CLASSES = 5
FEATURES = 3


def prototypes_of(*rows: tuple[int, int, list[float]]) -> Prototypes:
    classes, counts, means = zip(*rows, strict=True)
    return Prototypes(np.array(classes), np.array(counts), np.array(means, dtype=np.float32))


def slow_distance(feature: np.ndarray, prototype: np.ndarray, distance: str) -> float:
    if distance == "squared-l2":
        return sum((float(a) - float(b)) ** 2 for a, b in zip(feature, prototype, strict=True)) / len(feature)
    dot = sum(float(a) * float(b) for a, b in zip(feature, prototype, strict=True))
    return 1 - dot / float(np.linalg.norm(feature) * np.linalg.norm(prototype))


@settings(derandomize=True, deadline=None)
@given(
    distance=st.sampled_from(["squared-l2", "cosine"]),
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=9),
    present=st.lists(st.booleans(), min_size=CLASSES, max_size=CLASSES),
    seed=st.integers(0, 2**16),
)
def test_alignment_equals_a_loop_over_samples(
    distance: Literal["squared-l2", "cosine"], labels: list[int], present: list[bool], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(labels), FEATURES)).astype(np.float32)
    means = rng.normal(size=(CLASSES, FEATURES)).astype(np.float32)
    expected = sum(
        slow_distance(feature, means[label], distance)
        for feature, label in zip(features, labels, strict=True)
        if present[label]
    ) / len(labels)
    loss = alignment_loss(
        torch.from_numpy(features),
        torch.tensor(labels),
        torch.from_numpy(means),
        torch.tensor(present),
        distance,
    )
    assert loss.shape == ()
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("distance", ["squared-l2", "cosine"])
def test_a_class_without_prototype_contributes_nothing(distance: Literal["squared-l2", "cosine"]) -> None:
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    means, labels = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1])
    present = torch.tensor([False, True])
    loss = alignment_loss(features, labels, means, present, distance)
    # Second sample alone: squared L2 (1 + 1) / 2 = 1 and cosine 1 - 0 = 1; the mean runs over both samples.
    assert float(loss.detach()) == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.equal(gradient[0], torch.zeros(2))
    assert gradient[1].abs().sum() > 0


def test_cosine_has_a_finite_gradient_at_dead_features() -> None:
    features = torch.zeros(1, 3, requires_grad=True)
    loss = alignment_loss(features, torch.tensor([0]), torch.ones(1, 3), torch.tensor([True]), "cosine")
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient.isfinite().all()


@settings(derandomize=True, deadline=None)
@given(labels=st.lists(st.integers(0, CLASSES - 1), max_size=20), seed=st.integers(0, 2**16))
def test_local_prototypes_equal_loops_over_classes(labels: list[int], seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(len(labels), FEATURES)).astype(np.float32)
    result = local_prototypes(torch.from_numpy(features), torch.tensor(labels, dtype=torch.int64), CLASSES)
    assert result.classes.tolist() == sorted(set(labels))
    assert (result.classes.dtype, result.counts.dtype, result.means.dtype) == (np.int64, np.int64, np.float32)
    assert result.means.shape == (len(set(labels)), FEATURES)
    for held, count, mean in zip(result.classes, result.counts, result.means, strict=True):
        rows = [feature for feature, label in zip(features, labels, strict=True) if label == held]
        assert count == len(rows)
        np.testing.assert_allclose(mean, np.mean(np.array(rows, dtype=np.float64), axis=0), rtol=1e-6, atol=1e-7)


def test_dense_puts_each_mean_in_its_row() -> None:
    means, present = prototypes_of((1, 7, [1.0, 2.0]), (3, 1, [3.0, 4.0])).dense(4)
    assert means.tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
    assert present.tolist() == [False, True, False, True]


def test_bank_weights_clients_by_their_counts() -> None:
    bank = PrototypeBank(classes=3, feature_size=2, decay=0.5)
    bank.update([prototypes_of((0, 1, [4.0, 0.0]), (2, 5, [1.0, 1.0])), prototypes_of((0, 3, [0.0, 8.0]))])
    # Class 0: (1 * [4, 0] + 3 * [0, 8]) / 4; class 2 from one client; class 1 from none.
    assert bank.seen.tolist() == [True, False, True]
    exported = bank.export()
    assert exported.classes.tolist() == [0, 2]
    assert exported.counts.tolist() == [4, 5]
    assert exported.means.tolist() == [[1.0, 6.0], [1.0, 1.0]]
    assert exported.means.dtype == np.float32


def test_bank_averages_over_rounds_and_keeps_what_a_round_lacks() -> None:
    bank = PrototypeBank(classes=3, feature_size=1, decay=0.75)
    bank.update([prototypes_of((0, 2, [8.0]), (1, 2, [5.0]))])
    bank.update([prototypes_of((0, 2, [4.0]), (2, 9, [3.0]))])
    # Class 0: 0.75 * 8 + 0.25 * 4; class 1 was not in the round; class 2 is new and is not mixed with zero.
    assert bank.export().means.tolist() == [[7.0], [5.0], [3.0]]
    assert bank.export().counts.tolist() == [2, 2, 9]


def test_decay_zero_is_the_last_round() -> None:
    def after_two_rounds(decay: float) -> list[list[float]]:
        bank = PrototypeBank(classes=1, feature_size=1, decay=decay)
        bank.update([prototypes_of((0, 1, [8.0]))])
        bank.update([prototypes_of((0, 1, [4.0]))])
        return bank.export().means.tolist()

    assert after_two_rounds(0.0) == [[4.0]]
    assert after_two_rounds(0.5) == [[6.0]]


def test_an_empty_round_changes_nothing() -> None:
    bank = PrototypeBank(classes=2, feature_size=2, decay=0.5)
    bank.update([])
    assert len(bank.export().classes) == 0
    assert bank.export().means.shape == (0, 2)
    bank.update([prototypes_of((1, 1, [1.0, 2.0]))])
    bank.update([])
    assert bank.export().means.tolist() == [[1.0, 2.0]]


def test_exported_prototypes_do_not_change_with_the_bank() -> None:
    bank = PrototypeBank(classes=1, feature_size=1, decay=0.0)
    bank.update([prototypes_of((0, 1, [1.0]))])
    exported = bank.export()
    bank.update([prototypes_of((0, 1, [2.0]))])
    assert exported.means.tolist() == [[1.0]]
