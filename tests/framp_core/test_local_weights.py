"""Weights while they train: nested steps, and masks that follow the weights."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from framp_core.config import FrampConfig
from framp_core.data import ClientData, LabelledImages
from framp_core.data.examples import batch_positions
from framp_core.data.transforms import Normaliser
from framp_core.errors import ConfigError
from framp_core.local_training import LocalResult, train_locally
from framp_core.local_weights import FollowingWeights, ThresholdControlledWeights
from framp_core.masking import extract
from framp_core.models import FlatModel, build_model, initial_parameters

CLASSES, SHAPE, STEPS = 3, (1, 8, 8), 12


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


def config_of(share: float, sizes: str = "1/16,1/4,1", extraction: str = "global-top-k") -> FrampConfig:
    return FrampConfig.from_flat(
        {
            "capacity.sizes": sizes,
            "extraction.name": extraction,
            "model.widths": "4,6",
            "model.groups": 2,
            "local.steps": STEPS,
            "local.batch-size": 5,
            "local.prior-strength": 0.0,
            "local.nested-share": share,
            "local.device": "cpu",
        }
    )


def client_of(capacity: Fraction) -> ClientData:
    rng = np.random.default_rng(0)
    images = LabelledImages(
        rng.integers(0, 256, size=(20, *SHAPE), dtype=np.uint8),
        rng.integers(0, CLASSES, 20),
        np.arange(20),
        Normaliser((0.5,), (0.25,)),
    )
    return ClientData("client", "train", capacity, CLASSES, SHAPE, images, images, images, images, images, "")


def start_of(config: FrampConfig) -> np.ndarray:
    return initial_parameters(build_model(config.model, SHAPE, CLASSES), seed=3).numpy()


def masks_of(config: FrampConfig, sizes: tuple[Fraction, ...]) -> list[np.ndarray]:
    layout = FlatModel(build_model(config.model, SHAPE, CLASSES)).layout
    return [extract(start_of(config), layout, config.extraction, size) for size in sizes]


def train(config: FrampConfig, capacity: Fraction = Fraction(1)) -> tuple[LocalResult, FlatModel]:
    model = FlatModel(build_model(config.model, SHAPE, CLASSES))
    (mask,) = masks_of(config, (capacity,))
    rng = np.random.default_rng(7)
    return train_locally(model, start_of(config), mask, client_of(capacity), config, rng, None), model


@pytest.mark.parametrize("extraction", ["global-top-k", "layer-top-k"])
@pytest.mark.parametrize("capacity", [Fraction(1), Fraction(1, 4)])
def test_nested_steps_by_hand(capacity: Fraction, extraction: str) -> None:
    config = config_of(0.6, extraction=extraction)
    own, *smaller = masks_of(config, (capacity, *(size for size in config.capacity.sizes if size < capacity)))
    rng = np.random.default_rng(7)
    draws = np.random.default_rng(7).spawn(1)[0]
    network, normaliser = build_model(config.model, SHAPE, CLASSES), client_of(capacity).train.normaliser
    start = torch.from_numpy(start_of(config) * own)
    weights, chosen = start.clone(), []
    for positions in batch_positions(20, 5, STEPS, rng):
        mask = smaller[draws.integers(len(smaller))] if draws.random() < 0.6 else own
        chosen.append(int(mask.sum()))
        vector_to_parameters(weights * torch.from_numpy(mask), network.parameters())
        images, labels = client_of(capacity).train.batch(positions)
        network.zero_grad()
        F.cross_entropy(network(normaliser(images))[0], labels).backward()
        gradient = parameters_to_vector([parameter.grad for parameter in network.parameters()])
        weights = weights - config.local.learning_rate * gradient * torch.from_numpy(mask)
    assert len(set(chosen)) == 1 + len(smaller), "every size must occur"
    result, model = train(config, capacity)
    np.testing.assert_allclose(result.delta, (weights - start).numpy(), atol=1e-6)
    np.testing.assert_allclose(model.flat.detach().numpy(), weights.numpy(), atol=1e-6)


def test_a_share_of_one_never_moves_what_no_smaller_size_keeps() -> None:
    config = config_of(1.0, "1/4,1")
    (quarter,) = masks_of(config, (Fraction(1, 4),))
    assert np.flatnonzero(train(config)[0].delta[~quarter]).size == 0
    assert np.flatnonzero(train(config_of(0.5, "1/4,1"))[0].delta[~quarter]).size > 0


def test_the_smallest_client_trains_as_without_nesting_bit_for_bit() -> None:
    smallest = Fraction(1, 16)
    nested, plain = train(config_of(0.5), smallest)[0], train(config_of(0.0), smallest)[0]
    np.testing.assert_array_equal(nested.delta, plain.delta)
    assert not np.array_equal(train(config_of(0.5))[0].delta, train(config_of(0.0))[0].delta)


def test_a_client_without_a_mask_trains_as_without_nesting_bit_for_bit() -> None:
    deltas = []
    for share in (0.0, 0.5):
        config = config_of(share)
        model, rng = FlatModel(build_model(config.model, SHAPE, CLASSES)), np.random.default_rng(7)
        deltas.append(train_locally(model, start_of(config), None, client_of(Fraction(1)), config, rng, None).delta)
    np.testing.assert_array_equal(*deltas)


def test_sizes_of_the_run_that_are_not_smaller_play_no_part() -> None:
    with_larger, without = config_of(0.5, "1/16,1/4,1"), config_of(0.5, "1/16,1/4")
    quarter = Fraction(1, 4)
    np.testing.assert_array_equal(train(with_larger, quarter)[0].delta, train(without, quarter)[0].delta)


@pytest.mark.parametrize("mask", ["following", "threshold-controlled"])
def test_nesting_and_a_mask_that_moves_exclude_each_other(mask: str) -> None:
    with pytest.raises(ConfigError, match=rf"local.nested-share=0.5 and local.mask='{mask}' exclude"):
        FrampConfig.from_flat({"local.nested-share": 0.5, "local.mask": mask})
    assert FrampConfig.from_flat({"local.nested-share": 0.0, "local.mask": mask}).local.mask == mask


@pytest.mark.parametrize("block", [1, 97, 65_536])
@pytest.mark.parametrize("kind", [FollowingWeights, ThresholdControlledWeights])
def test_masks_in_blocks_are_those_of_whole_vectors_bit_for_bit(
    kind: type[FollowingWeights], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the weights moved: some fell below the threshold, some are exactly at it, some are 0."""
    monkeypatch.setattr("framp_core.local_weights.BLOCK", block)
    config = config_of(0.0)
    model, (mask,) = FlatModel(build_model(config.model, SHAPE, CLASSES)), masks_of(config, (Fraction(1, 4),))
    start, kept = torch.from_numpy(start_of(config) * mask), torch.from_numpy(mask)
    ranked = kept & torch.from_numpy(model.layout.maskable)
    weights, theta = kind(model, start[None], kept[None].float()), start[ranked].abs().min()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weights.latent.mul_(0.5 + torch.rand(len(start), generator=generator))
        weights.latent[ranked.nonzero()[:2, 0]] = torch.tensor([0.0, -float(theta)])
    gradient = torch.randn(len(start), generator=generator)
    size = weights.latent.detach().abs()
    above = ~ranked | (size >= theta)
    share = size / (size + theta)
    slope = 1 + 2 * share * (1 - share) if kind is ThresholdControlledWeights else torch.ones(len(start))
    assert 2 < int((ranked & ~above).sum()) < int(ranked.sum()) - 2

    model.flat_gradient.copy_(gradient)
    weights.show()
    weights.pull_back()
    torch.testing.assert_close(model.flat.detach(), weights.latent.detach() * above, rtol=0, atol=0)
    expected = gradient * kept * torch.where(ranked, above * slope, 1.0)
    torch.testing.assert_close(model.flat_gradient, expected, rtol=0, atol=0)
