import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.config import PartitionConfig
from framp_core.data.shift import (
    TRANSFORMS,
    Blur,
    Colour,
    Contrast,
    Resolution,
    Rotation,
    Shift,
    concept_shifts,
    feature_shifts,
)
from framp_core.errors import DataError


def images(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def configured(clients=8, unseen_clients=2, **values):
    return PartitionConfig(clients=clients, unseen_clients=unseen_clients, **values)


def drawn(kind, seed, clusters=0, cluster=0):
    return TRANSFORMS[kind].draw(np.random.default_rng(seed), cluster, clusters)


# --- transforms -----------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(list(TRANSFORMS)),
    seed=st.integers(0, 20),
    count=st.integers(0, 3),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_transforms_keep_shape_and_type_and_leave_their_input(kind, seed, count, channels, height, width):
    batch = images(count, channels, height, width)
    original = batch.clone()
    shifted = drawn(kind, seed)(batch)
    assert (shifted.shape, shifted.dtype) == (batch.shape, torch.uint8)
    assert torch.equal(batch, original)


@pytest.mark.parametrize("kind", list(TRANSFORMS))
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_batch(kind, channels):
    batch, transform = images(20, channels, 16, 16), drawn(kind, 1)
    together = transform(batch)
    alone = torch.cat([transform(batch[index : index + 1]) for index in range(20)])
    assert (together.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together, batch)


def test_quarter_turns_are_exact_and_corners_are_black():
    batch = images(2, 3, 6, 6)
    for turns in range(4):
        expected = np.rot90(batch.numpy(), turns, axes=(2, 3))
        np.testing.assert_array_equal(Rotation(90.0 * turns)(batch), expected)
    white = torch.full((1, 1, 9, 9), 255, dtype=torch.uint8)
    turned = Rotation(45.0)(white)[0, 0]
    assert turned[4, 4] == 255
    assert turned[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [0] * 4
    edge = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    edge[..., :2, 4] = 255
    left, right = (Rotation(degrees)(edge)[0, 0].int() for degrees in (30.0, -30.0))
    assert left[:, :4].sum() > 5 * left[:, 5:].sum()
    assert right[:, 5:].sum() > 5 * right[:, :4].sum()


def test_colour_exchanges_and_scales_channels():
    red, green, blue = pixel = (100, 200, 31)
    batch = torch.tensor(pixel, dtype=torch.uint8).reshape(1, 3, 1, 1).repeat(2, 1, 4, 5)
    shifted = Colour("brg", 0.5, 1.2, 1.2, negative=True)(batch)
    expected = [round(blue * 0.5 + 1e-6), round(red * 1.2), min(255, round(green * 1.2))]
    assert shifted[1, :, 2, 3].tolist() == expected
    assert (shifted == shifted[:1, :, :1, :1]).all()
    grey = images(2, 1, 4, 4)
    for negative in (True, False):
        source = 255 - grey.double() if negative else grey.double()
        np.testing.assert_array_equal(Colour("brg", 0.5, 1.2, 1.2, negative)(grey), np.rint(source.numpy() * 0.5))


def test_contrast_scales_brightness_then_the_distance_from_mean_grey():
    batch = images(3, 3, 8, 8)
    shifted = Contrast(contrast=0.5, brightness=0.8)(batch).double().numpy()
    dimmed = np.floor(batch.double().numpy() * 0.8)
    grey = np.floor(np.tensordot([0.2989, 0.587, 0.114], dimmed, axes=(0, 1)))
    mean = grey.mean(axis=(1, 2))[:, None, None, None]
    np.testing.assert_allclose(shifted, mean + 0.5 * (dimmed - mean), atol=1.01)


def test_blur_equals_a_loop_over_a_square_kernel():
    sigma_share, height, width = 0.07, 16, 20
    sigma = sigma_share * height
    radius = math.ceil(3 * sigma)
    batch = images(1, 1, height, width)
    padded = np.pad(batch[0, 0].double().numpy(), radius, mode="reflect")
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    expected = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            expected[row, column] = (padded[row : row + len(kernel), column : column + len(kernel)] * kernel).sum()
    np.testing.assert_allclose(Blur(sigma_share)(batch)[0, 0].double().numpy(), expected, atol=0.51)


def test_resolution_loses_detail_only():
    batch = images(4, 3, 16, 16)
    assert torch.equal(Resolution(1.0)(batch), batch)
    spread = [Resolution(scale)(batch).double().std().item() for scale in (1.0, 0.75, 0.5, 0.25)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.5 * spread[0]
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(Resolution(0.25)(flat), flat)


@pytest.mark.parametrize("kind", list(TRANSFORMS))
def test_a_transform_is_rebuilt_from_its_labels(kind):
    transform = drawn(kind, 4)
    labels = json.loads(json.dumps(transform.to_dict()))
    assert TRANSFORMS[labels.pop("kind")](**labels) == transform
    assert len({drawn(kind, seed) for seed in range(5)}) == 5


def test_clusters_span_the_range_of_their_transform():
    assert [drawn("rotation", 0, 4, cluster) for cluster in range(4)] == [Rotation(90.0 * turn) for turn in range(4)]
    assert [drawn("colour", 0, 6, cluster).order for cluster in range(3)] == ["rgb", "rbg", "grb"]
    contrasts = [drawn("contrast", 0, 3, cluster).contrast for cluster in range(3)]
    assert contrasts == pytest.approx([0.25, math.sqrt(0.25 * 2.5), 2.5], abs=1e-4)
    assert [drawn("blur", 0, 3, cluster).sigma for cluster in range(3)] == pytest.approx([0.01, 0.045, 0.08])
    assert [drawn("resolution", 0, 4, cluster).scale for cluster in range(4)] == [1.0, 0.75, 0.5, 0.25]
    angles = [drawn("rotation", seed).degrees for seed in range(200)]
    assert -60 <= min(angles) < -50 < 50 < max(angles) <= 60


# --- who has which --------------------------------------------------------------------------------------------------


def test_shifts_that_are_off_are_none():
    off = configured(feature_shift_clusters=3)
    assert feature_shifts(off, 0) == [None] * 10
    assert concept_shifts(off, 10, 0) == [None] * 10


@settings(derandomize=True, deadline=None, max_examples=60)
@given(clients=st.integers(1, 20), unseen=st.integers(0, 9), data=st.data(), seed=st.integers(0, 50))
def test_clusters_come_in_equal_shares_in_each_role(clients, unseen, data, seed):
    clusters = data.draw(st.integers(1, clients))
    asked = configured(
        clients, unseen, feature_shift="blur", feature_shift_clusters=clusters, concept_shift_clusters=clusters
    )
    for shifts in (feature_shifts(asked, seed), concept_shifts(asked, 10, seed)):
        own = [shift.cluster for shift in shifts]
        assert len(own) == clients + unseen
        for part in (own[:clients], own[clients:]):
            counts = np.bincount(part, minlength=clusters)
            assert len(counts) == clusters
            assert np.ptp(counts) <= 1
        by_cluster = {}
        for shift in shifts:
            assert by_cluster.setdefault(shift.cluster, shift) == shift


def test_clusters_do_not_follow_the_capacity_blocks_or_each_other():
    asked = configured(16, 0, feature_shift="rotation", feature_shift_clusters=4, concept_shift_clusters=4)
    together = np.zeros((4, 4))
    both = np.zeros((4, 4))
    for seed in range(100):
        features = [shift.cluster for shift in feature_shifts(asked, seed)]
        concepts = [shift.cluster for shift in concept_shifts(asked, 10, seed)]
        for client in range(16):
            together[client // 4, features[client]] += 1  # Capacities come in blocks of four clients.
            both[features[client], concepts[client]] += 1
    # 100 expected in each cell, standard deviation below 10; clusters in blocks would give 400 and 0.
    assert np.abs(together - 100).max() < 45
    assert np.abs(both - 100).max() < 45


def test_a_clients_own_transform_depends_on_seed_and_index_alone():
    few, many = (configured(clients, 0, feature_shift="colour") for clients in (4, 12))
    assert feature_shifts(many, 3)[:4] == feature_shifts(few, 3)
    assert len({shift.transform for shift in feature_shifts(many, 3)}) == 12
    assert [shift.cluster for shift in feature_shifts(many, 3)] == list(range(12))
    assert feature_shifts(many, 4)[:4] != feature_shifts(few, 3)


@pytest.mark.parametrize("clusters", [0, 5, 7])
def test_mixed_uses_every_kind_in_turn(clusters):
    shifts = feature_shifts(configured(10, 0, feature_shift="mixed", feature_shift_clusters=clusters), 2)
    kinds = {shift.cluster: shift.transform.kind for shift in shifts}
    counts = Counter(kinds.values())
    assert set(counts) == set(TRANSFORMS)
    assert max(counts.values()) - min(counts.values()) <= 1
    other = feature_shifts(configured(10, 0, feature_shift="mixed", feature_shift_clusters=clusters), 3)
    assert {shift.cluster: shift.transform.kind for shift in other} != kinds


@settings(derandomize=True, deadline=None, max_examples=40)
@given(classes=st.integers(2, 12), clusters=st.integers(1, 6), seed=st.integers(0, 50))
def test_label_permutations_are_bijective_and_distinct(classes, clusters, seed):
    clusters = min(clusters, math.factorial(classes))
    asked = configured(concept_shift_clusters=clusters)
    by_cluster = {shift.cluster: shift.labels for shift in concept_shifts(asked, classes, seed)}
    assert all(sorted(labels) == list(range(classes)) for labels in by_cluster.values())
    assert by_cluster[0] == tuple(range(classes))
    assert len(set(by_cluster.values())) == len(by_cluster) == clusters


def test_too_many_clusters_are_refused():
    with pytest.raises(DataError, match="feature-shift-clusters=9 and there are 8 training clients"):
        feature_shifts(configured(feature_shift="blur", feature_shift_clusters=9), 0)
    with pytest.raises(DataError, match="concept-shift-clusters=9 and there are 8 training clients"):
        concept_shifts(configured(concept_shift_clusters=9), 10, 0)
    with pytest.raises(DataError, match="labels of 2 classes have only 2 permutations"):
        concept_shifts(configured(concept_shift_clusters=3), 2, 0)


# --- pools ----------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data(), owners=st.integers(1, 5), seed=st.integers(0, 50))
def test_each_image_of_a_pool_goes_through_its_owners_transform(data, owners, seed):
    kinds = data.draw(st.lists(st.sampled_from(list(TRANSFORMS)), min_size=owners, max_size=owners))
    # Few seeds, so that some owners have equal transforms and go together.
    transforms = [drawn(kind, seed + index % 2) for index, kind in enumerate(kinds)]
    pool = images(30, 3, 8, 8, seed=seed)
    owner = np.random.default_rng(seed).integers(owners, size=30)
    chosen = np.array(data.draw(st.lists(st.integers(0, 29), max_size=20)), dtype=np.int64)
    shifted = Shift(transforms, owner)(pool[chosen], chosen)
    assert (shifted.shape, shifted.dtype) == ((len(chosen), 3, 8, 8), torch.uint8)
    for row, index in zip(shifted, chosen, strict=True):
        expected = transforms[owner[index]](pool[index : index + 1])[0]
        assert (row.int() - expected.int()).abs().max() <= 1
