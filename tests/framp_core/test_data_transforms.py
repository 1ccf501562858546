import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.data.transforms import Augmentation, Normaliser


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    chunk=st.integers(1, 8),
    seed=st.integers(0, 50),
)
def test_normaliser_measures_what_numpy_measures_and_standardises(shape, chunk, seed):
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    normaliser = Normaliser.of(images, chunk=chunk)
    assert normaliser == Normaliser.of(images)
    std = (images / 255).std(axis=(0, 2, 3))
    np.testing.assert_allclose(normaliser.mean, (images / 255).mean(axis=(0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(normaliser.std, np.where(std > 0, std, 1), atol=1e-12)
    batch = normaliser(torch.from_numpy(images))
    assert batch.dtype == torch.float32
    assert batch.shape == images.shape
    np.testing.assert_allclose(batch.mean(dim=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(batch.std(dim=(0, 2, 3), correction=0), np.where(std > 0, 1, 0), atol=1e-4)


def test_a_constant_channel_becomes_zero():
    images = np.full((3, 1, 2, 2), 128, dtype=np.uint8)
    normaliser = Normaliser.of(images)
    assert normaliser.std == (1.0,)
    np.testing.assert_allclose(normaliser(torch.from_numpy(images)), 0, atol=1e-6)


def all_crops(image):
    """Every crop that augmentation may give of one image (C, H, W), by plain loops."""
    _, height, width = image.shape
    vertical, horizontal = height // 8, width // 8
    padded = np.pad(image, ((0, 0), (vertical, vertical), (horizontal, horizontal)))
    for top in range(2 * vertical + 1):
        for left in range(2 * horizontal + 1):
            crop = padded[:, top : top + height, left : left + width]
            yield crop.tobytes()
            yield crop[:, :, ::-1].tobytes()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 8), (2, 4, 24)])
def test_every_augmented_image_is_a_crop_of_its_own_image_and_all_crops_occur(shape):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (2, *shape), dtype=np.uint8)
    repeated = torch.from_numpy(np.repeat(images, 400, axis=0))
    result = Augmentation.draw(repeated.shape, rng)(repeated)
    assert result.dtype == torch.uint8
    assert result.shape == repeated.shape
    for image, augmented in zip(images, (result[:400], result[400:]), strict=True):
        assert {own.numpy().tobytes() for own in augmented} == set(all_crops(image))


def test_augmentation_is_a_function_of_its_stream_and_keeps_its_input():
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8))
    before = batch.clone()
    first = Augmentation.draw(batch.shape, np.random.default_rng(1))(batch)
    assert torch.equal(first, Augmentation.draw(batch.shape, np.random.default_rng(1))(batch))
    assert not torch.equal(first, Augmentation.draw(batch.shape, np.random.default_rng(2))(batch))
    assert torch.equal(batch, before)
    assert Augmentation.draw(batch[:0].shape, np.random.default_rng(1))(batch[:0]).shape == (0, 3, 16, 16)
