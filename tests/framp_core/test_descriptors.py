import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import ClientData, LabelledImages
from framp_core.data.transforms import Normaliser
from framp_core.descriptors import MomentsDescriptor, Standardiser, build_descriptor
from framp_core.local_training import INFERENCE_BATCH

CLASSES = 4
SHAPE = (3, 8, 8)
NORMALISER = Normaliser((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NAMES = ["class-moments", "moments", "histogram", "warmup"]


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


def config_of(name: str, **values: Scalar) -> FrampConfig:
    return FrampConfig.from_flat(
        {
            "descriptor.name": name,
            "descriptor.encoder-width": 5,
            "descriptor.warmup-steps": 3,
            "model.widths": "4,6",
            "model.groups": 2,
            "local.device": "cpu",
            **values,
        }
    )


def client_of(counts: list[int], seed: int = 0, brightness: int = 256) -> ClientData:
    rng = np.random.default_rng(seed)
    total = sum(counts)
    pool = rng.integers(0, brightness, size=(total, *SHAPE), dtype=np.uint8)
    train = LabelledImages(pool, np.repeat(np.arange(CLASSES), counts), rng.permutation(total), NORMALISER)
    return ClientData(
        name="client-0000",
        role="train",
        capacity=Fraction(1),
        classes=CLASSES,
        shape=SHAPE,
        train=train,
        validation=train,
        test=train,
        union_test=train,
        known=train,
        partition_digest="",
    )


def describe(config: FrampConfig, data: ClientData) -> np.ndarray:
    """Build anew each time, as each client does."""
    return build_descriptor(config, SHAPE, CLASSES).describe(data)


@pytest.mark.parametrize(
    ("name", "size"),
    [("class-moments", CLASSES * 6), ("moments", CLASSES + 2 * 5), ("histogram", CLASSES), ("warmup", 6)],
)
def test_size_norm_and_bytes(name: str, size: int) -> None:
    config = config_of(name)
    descriptor = build_descriptor(config, SHAPE, CLASSES)
    vector = descriptor.describe(client_of([3, 0, 5, 1]))
    assert descriptor.size == size
    assert vector.shape == (size,)
    assert vector.dtype == np.float32
    assert descriptor.nbytes == vector.nbytes
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_all_clients_agree_on_the_frozen_weights(name: str) -> None:
    data = client_of([3, 0, 5, 1])
    np.testing.assert_array_equal(describe(config_of(name), data), describe(config_of(name), data))
    same = np.array_equal(describe(config_of(name), data), describe(config_of(name, seed=1), data))
    assert same == (name == "histogram")  # the only one without frozen weights


@pytest.mark.parametrize("name", NAMES)
def test_clients_with_different_data_differ(name: str) -> None:
    config = config_of(name)
    distance = np.linalg.norm(
        describe(config, client_of([3, 0, 5, 1])) - describe(config, client_of([0, 6, 0, 3], seed=1))
    )
    assert distance > 0.01


@pytest.mark.parametrize("name", ["class-moments", "moments", "histogram"])
def test_the_order_of_the_images_does_not_matter(name: str) -> None:
    config, data = config_of(name), client_of([200, 0, 90, 1])
    assert len(data.train) > INFERENCE_BATCH
    turned = replace(data, train=replace(data.train, indices=data.train.indices[::-1].copy()))
    np.testing.assert_allclose(describe(config, data), describe(config, turned), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_training_data_matters(name: str) -> None:
    config, data = config_of(name), client_of([3, 0, 5, 1])
    other = client_of([0, 6, 0, 3], seed=1).train
    changed = replace(data, name="client-0001", validation=other, test=other, union_test=other)
    np.testing.assert_array_equal(describe(config, data), describe(config, changed))


@pytest.mark.parametrize(("name", "share"), [("histogram", 1.0), ("moments", 3**-0.5)])
def test_the_histogram_comes_first_in_the_order_of_the_classes(name: str, share: float) -> None:
    counts = np.array([3, 0, 4, 12])  # norm 13
    block = describe(config_of(name), client_of(counts.tolist()))[:CLASSES]
    np.testing.assert_allclose(block, share * counts / 13, atol=1e-6)


def test_moments_by_hand() -> None:
    data, config = client_of([30, 0, 240, 10]), config_of("moments")
    descriptor = build_descriptor(config, SHAPE, CLASSES)
    assert isinstance(descriptor, MomentsDescriptor)
    rows = []
    for index in data.train.indices:
        image = torch.from_numpy(data.train.images[index][None]).float()
        with torch.no_grad():
            rows.append(descriptor.encoder((image / 255 - 0.5) / 0.25)[0].double().numpy())
    features = np.array(rows)
    mean = features.sum(axis=0) / len(rows)
    spread = np.sqrt(((features - mean) ** 2).sum(axis=0) / len(rows))
    expected = np.concatenate([block / np.linalg.norm(block) for block in (data.class_counts(), mean, spread)])
    np.testing.assert_allclose(descriptor.describe(data), expected / np.sqrt(3), atol=1e-5)


def test_moments_see_what_the_histogram_does_not() -> None:
    dark, bright = client_of([3, 0, 5, 1], brightness=100), client_of([3, 0, 5, 1], brightness=256)
    histogram, moments = config_of("histogram"), config_of("moments")
    np.testing.assert_array_equal(describe(histogram, dark), describe(histogram, bright))
    assert np.linalg.norm(describe(moments, dark) - describe(moments, bright)) > 0.01


def test_one_image_has_no_spread() -> None:
    vector = describe(config_of("moments"), client_of([0, 1, 0, 0]))
    np.testing.assert_array_equal(vector[-5:], np.zeros(5))
    np.testing.assert_allclose(vector[:CLASSES], [0, 2**-0.5, 0, 0], atol=1e-6)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_warmup_trains() -> None:
    data = client_of([3, 0, 5, 1])
    few, many = (describe(config_of("warmup", **{"descriptor.warmup-steps": steps}), data) for steps in (1, 5))
    assert not np.allclose(few, many)


def test_class_moments_by_hand() -> None:
    data = client_of([3, 0, 4, 2])
    descriptor = build_descriptor(config_of("class-moments"), SHAPE, CLASSES)
    assert isinstance(descriptor, MomentsDescriptor)
    rows: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: [], 3: []}
    for position in range(9):
        image, label = data.train.batch(np.array([position]))
        rows[int(label)].append(descriptor.encoder(data.train.normaliser(image)).detach().numpy()[0])
    roots = [math.sqrt(len(own) / 9) for own in rows.values()]
    means = [
        root * np.mean(own, axis=0) if own else np.zeros(5) for root, own in zip(roots, rows.values(), strict=True)
    ]
    expected = np.concatenate([roots, *means])
    np.testing.assert_allclose(descriptor.describe(data), expected / np.linalg.norm(expected), atol=1e-6)


def relabelled(data: ClientData, labels: list[int]) -> ClientData:
    renamed = np.array(labels)[data.train.labels]
    return replace(data, train=replace(data.train, labels=renamed))


def test_standardised_class_moments_group_clients_by_what_they_call_the_classes() -> None:
    config = config_of("class-moments")
    pool = np.random.default_rng(0).integers(0, 256, size=(CLASSES, *SHAPE), dtype=np.uint8)

    def client(counts: list[int], labels: list[int], seed: int) -> ClientData:
        """Images of a class are noisy copies of one pattern."""
        data = client_of(counts, seed)
        noise = np.random.default_rng(seed).integers(0, 60, size=data.train.images.shape)
        images = (0.7 * pool[data.train.labels] + noise).astype(np.uint8)
        return relabelled(replace(data, train=replace(data.train, images=images)), labels)

    counts = [[9, 3, 6, 5], [2, 8, 7, 4], [6, 6, 1, 9]]
    clients = [client(own, [0, 1, 2, 3], seed) for seed, own in enumerate(counts)]
    clients += [client(own, [2, 3, 1, 0], 10 + seed) for seed, own in enumerate(counts)]
    descriptors = np.stack([describe(config, data) for data in clients])
    points = Standardiser(build_descriptor(config, SHAPE, CLASSES), descriptors)(descriptors)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    kinds = np.repeat([0, 1], 3)
    same = kinds[:, None] == kinds[None]
    assert distances[same].max() < distances[~same].min()
    plain = np.linalg.norm(descriptors[:, None] - descriptors[None], axis=2)
    assert plain[same].max() > plain[~same].min(), "as they are, the descriptors differ by class shares more than that"


@pytest.mark.parametrize("name", NAMES)
def test_standardised_descriptors_are_centred_and_of_unit_size(name: str) -> None:
    config = config_of(name)
    rng = np.random.default_rng(0)
    clients = [client_of(rng.integers(1, 9, CLASSES).tolist(), seed) for seed in range(6)]
    descriptors = np.stack([describe(config, data) for data in clients])
    points = Standardiser(build_descriptor(config, SHAPE, CLASSES), descriptors)(descriptors)
    assert points.dtype == np.float32
    assert np.sqrt((points**2).sum(axis=1).mean()) == pytest.approx(1, abs=1e-3)
    if name != "class-moments":  # whose class means are centred weighted by their roots
        assert np.abs(points.mean(axis=0)).max() < 1e-5


def test_clients_that_are_all_alike_are_at_the_origin() -> None:
    config, data = config_of("class-moments"), client_of([3, 0, 5, 1])
    descriptors = np.stack([describe(config, data)] * 3)
    standardise = Standardiser(build_descriptor(config, SHAPE, CLASSES), descriptors)
    assert np.flatnonzero(standardise(descriptors)).size == 0
