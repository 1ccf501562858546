"""Networks with batch statistics: the layer, training and evaluation around it, slim networks."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from framp_core.config import FrampConfig, ModelConfig
from framp_core.config_values import Scalar
from framp_core.data import Augmentation, ClientData, LabelledImages, Normaliser
from framp_core.errors import ConfigError, ModelError
from framp_core.layout import ParameterLayout
from framp_core.local_training import (
    INFERENCE_BATCH,
    client_prototypes,
    evaluate,
    penultimate_features,
    train_locally,
)
from framp_core.models import BatchStatistics, FlatModel, build_model, initial_parameters

CLASSES = 3
NORMALISER = Normaliser((0.5,), (0.25,))
CPU = torch.device("cpu")
ARCHITECTURES = {
    "conv": ModelConfig(name="conv", widths=(4, 6), groups=2, normalisation="batch-statistics"),
    "resnet18": ModelConfig(name="resnet18", widths=(4, 4, 6, 6), groups=2, normalisation="batch-statistics"),
}
every_architecture = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


def grouped(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"normalisation": "group"})


def random_network(config: ModelConfig, kept: tuple[int, ...] | None = None) -> nn.Module:
    """A network whose gains and biases are random too."""
    model = build_model(config, (1, 8, 8), CLASSES, kept)
    size = ParameterLayout.of(model).size
    vector_to_parameters(0.5 * torch.randn(size, generator=torch.Generator().manual_seed(0)), model.parameters())
    return model


def inputs(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1))


def by_hand(layer: BatchStatistics, given: Tensor) -> Tensor:
    """Channel by channel, in double precision."""
    columns = []
    for channel, (gain, bias) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)):
        values = given[:, channel].double()
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        columns.append((values - mean) / (variance + layer.eps).sqrt() * gain + bias)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("training", [True, False])
@every_architecture
def test_every_norm_takes_the_statistics_of_the_batch(config: ModelConfig, training: bool) -> None:
    seen: list[tuple[BatchStatistics, Tensor, Tensor]] = []
    model = random_network(config).train(training)
    for layer in model.modules():
        if isinstance(layer, BatchStatistics):
            layer.register_forward_hook(lambda layer, given, out: seen.append((layer, given[0], out)))
    model(inputs(5))
    assert len(seen) == (2 if config.name == "conv" else 1 + 8 * 2 + 3)
    for layer, given, out in seen:
        torch.testing.assert_close(out.double(), by_hand(layer, given), atol=1e-4, rtol=1e-4)
        assert not list(layer.buffers()), "nothing is kept between batches"


@every_architecture
def test_an_image_depends_on_those_beside_it_and_with_group_norm_it_does_not(config: ModelConfig) -> None:
    def logits(config: ModelConfig, count: int) -> Tensor:
        return random_network(config).eval()(inputs(count))[0][:3].detach()

    torch.testing.assert_close(logits(grouped(config), 3), logits(grouped(config), 6), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(config, 3), logits(config, 6), atol=1e-3)


@every_architecture
def test_the_parameters_are_those_of_group_norm(config: ModelConfig) -> None:
    own, other = (ParameterLayout.of(build_model(which, (1, 8, 8), CLASSES)) for which in (config, grouped(config)))
    assert own == other
    norms = [slot for slot in own.slots if len(slot.shape) == 1 and not slot.name.startswith("head")]
    assert norms
    assert not any(slot.maskable for slot in norms)


@every_architecture
def test_slim_networks_are_the_corner_of_the_full_one(config: ModelConfig) -> None:
    """With the other channels' weights at zero, the kept channels of the full network see what the slim one sees."""
    kept = tuple(width // 2 for width in config.widths)
    slim = random_network(config, kept)
    full = build_model(config, (1, 8, 8), CLASSES)
    with torch.no_grad():
        for wide, narrow in zip(full.parameters(), slim.parameters(), strict=True):
            wide.zero_()
            wide[tuple(slice(length) for length in narrow.shape)] = narrow
    torch.testing.assert_close(full(inputs(4))[0], slim(inputs(4))[0], atol=1e-4, rtol=1e-4)
    assert not [layer for layer in slim.modules() if isinstance(layer, nn.GroupNorm)]
    assert slim.batch_statistics


def test_one_image_of_one_pixel_has_no_statistics() -> None:
    model = random_network(ARCHITECTURES["resnet18"])  # four stages take 8x8 to 1x1
    model(inputs(2))
    with pytest.raises(ModelError, match=r"one image of one pixel.*model\.normalisation='group'"):
        model(inputs(1))
    model(inputs(1, size=16))
    random_network(grouped(ARCHITECTURES["resnet18"]))(inputs(1))


def test_an_mlp_has_no_normalisation() -> None:
    config = ModelConfig(name="mlp", widths=(5,), normalisation="batch-statistics")
    assert not config.batch_statistics
    assert not build_model(config, (1, 8, 8), CLASSES).batch_statistics


# --- batches -------------------------------------------------------------------------------------------------------


def some_images(count: int, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, size=(2 * count + 1, 1, 2, 2), dtype=np.uint8)
    pool = patches.repeat(4, axis=2).repeat(4, axis=3)  # so that pooling does not make all images alike
    labels = rng.integers(0, CLASSES, size=2 * count + 1)
    return LabelledImages(pool, labels, rng.permutation(2 * count + 1)[:count], NORMALISER)


def network(name: str = "conv") -> FlatModel:
    flat = FlatModel(build_model(ARCHITECTURES[name], (1, 8, 8), CLASSES))
    flat.load(parameters_to_vector(random_network(ARCHITECTURES[name]).parameters()).detach())
    return flat


def centred(model: FlatModel, images: LabelledImages) -> Tensor:
    """An offset without which the random network would say one class for all."""
    return -model(NORMALISER(images.batch(np.arange(len(images)))[0]))[0].detach().mean(dim=0)


@pytest.mark.parametrize(
    ("count", "size", "lone", "expected"),
    [
        (0, 4, False, []),
        (1, 4, False, [1]),
        (8, 4, False, [4, 4]),
        (9, 4, False, [4, 5]),
        (9, 4, True, [4, 4, 1]),
        (10, 4, False, [4, 4, 2]),
        (3, 1, False, [1, 2]),
    ],
)
def test_a_last_image_alone_joins_the_batch_before(count: int, size: int, lone: bool, expected: list[int]) -> None:
    images = some_images(count)
    batches = list(images.ordered_batches(size, CPU, lone_example=lone))
    assert [len(labels) for _, labels in batches] == expected
    assert [int(label) for _, labels in batches for label in labels] == images.selected_labels.tolist()


@pytest.mark.parametrize(("memory", "expected"), [(10 * 4 * 64, [10, 10, 5]), (4 * 64, [8, 8, 8, 1]), (2**18, [25])])
def test_without_a_batch_size_a_batch_fills_a_cache_or_holds_eight(
    monkeypatch: pytest.MonkeyPatch, memory: int, expected: list[int]
) -> None:
    monkeypatch.setattr("framp_core.data.images.IN_CACHE_BYTES", memory)
    images = some_images(25)
    assert [len(labels) for _, labels in images.ordered_batches(0, CPU)] == expected


def test_test_batches_are_those_of_the_batch_size() -> None:
    images, model = some_images(45), network()
    offset = centred(model, images)
    correct = {}
    for size in (5, 20, 256):
        correct[size] = 0
        for first in range(0, 45, size):
            batch, labels = images.batch(np.arange(first, min(first + size, 45)))
            correct[size] += int(((model(NORMALISER(batch))[0] + offset).argmax(dim=1) == labels).sum())
        assert evaluate(model, images, offset[None], size)[0].correct == correct[size]
    assert len(set(correct.values())) > 1, "the size of the batch must matter"


def test_evaluation_and_features_of_images_that_shrink_to_a_pixel() -> None:
    model = network("resnet18")
    assert evaluate(model, some_images(21), torch.zeros(1, 3), 20)[0].total == 21
    assert penultimate_features(model, some_images(257))[0].shape == (257, 6)
    with pytest.raises(ModelError, match="single image"):
        evaluate(model, some_images(1), torch.zeros(1, 3), 20)


def test_augmented_evaluation_sees_crops_of_its_stream() -> None:
    images, model = some_images(40), network()
    offset = centred(model, images)
    drawn = np.random.default_rng(3)
    correct = 0
    for first in (0, 20):
        batch, labels = images.batch(np.arange(first, first + 20))
        correct += int(
            (
                (model(NORMALISER(Augmentation.draw(batch.shape, drawn)(batch)))[0] + offset).argmax(dim=1) == labels
            ).sum()
        )

    def counted(seed: int) -> int:
        return evaluate(model, images, offset[None], 20, np.random.default_rng(seed))[0].correct

    assert counted(3) == correct
    others = {counted(seed) for seed in range(8)}
    assert len(others) > 1


# --- training ------------------------------------------------------------------------------------------------------


def settings(**values: Scalar) -> FrampConfig:
    small: dict[str, Scalar] = {
        "model.widths": "4,6",
        "model.groups": 2,
        "model.normalisation": "batch-statistics",
        "local.steps": 5,
        "local.batch-size": 4,
        "local.device": "cpu",
        "local.prior-strength": 0.0,
    }
    return FrampConfig.from_flat(small | {key.replace("__", "."): value for key, value in values.items()})


def client(train: int = 12) -> ClientData:
    images = some_images(train)
    return ClientData(
        "client-0000", "train", Fraction(1), CLASSES, (1, 8, 8), images, images, images, images, images, ""
    )


def trained(config: FrampConfig, data: ClientData) -> np.ndarray:
    model = FlatModel(build_model(config.model, (1, 8, 8), CLASSES))
    start = initial_parameters(model.model, 0).numpy()
    return train_locally(model, start, None, data, config, np.random.default_rng(0), None).delta


def test_without_reshuffling_the_batches_are_the_images_in_order() -> None:
    config = settings(local__reshuffle=False)
    data = client()
    model = build_model(config.model, (1, 8, 8), CLASSES)
    start = initial_parameters(model, 0)
    vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first in (0, 4, 8, 0, 4):
        batch, labels = data.train.batch(np.arange(first, first + 4))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(NORMALISER(batch))[0], labels).backward()
        optimizer.step()
    expected = (parameters_to_vector(model.parameters()).detach() - start).numpy()
    np.testing.assert_array_equal(trained(config, data), expected)
    assert not np.array_equal(trained(settings(), data), expected)


def test_a_client_with_one_image_trains_unless_it_shrinks_to_a_pixel() -> None:
    alone = client(train=1)
    assert np.abs(trained(settings(), alone)).max() > 0
    with pytest.raises(ModelError, match="single image"):
        trained(settings(model__name="resnet18", model__widths="4,4,6,6"), alone)


def test_prototypes_take_batches_of_the_constant_size() -> None:
    count = INFERENCE_BATCH + 44
    data, model = replace(client(), train=some_images(count)), network()
    features = []
    for first, last in ((0, INFERENCE_BATCH), (INFERENCE_BATCH, count)):
        features.append(model(NORMALISER(data.train.batch(np.arange(first, last))[0]))[1].detach())
    labels = data.train.selected_labels
    means = client_prototypes(model, data).means
    for held in range(CLASSES):
        np.testing.assert_allclose(means[held], torch.cat(features)[labels == held].mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["local.batch-size", "evaluation.batch-size"])
def test_batches_of_one_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"batch-size of 2 or more"):
        FrampConfig.from_flat({"model.normalisation": "batch-statistics", key: 1})
    FrampConfig.from_flat({key: 1})


def test_running_statistics_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"different submodels.*do not mix; use 'group' or 'batch-statistics'"):
        FrampConfig.from_flat({"model.normalisation": "batch"})


def test_a_union_by_client_cannot_be_sampled() -> None:
    with pytest.raises(ConfigError, match="union-examples=0"):
        FrampConfig.from_flat({"evaluation.union-by-client": True, "evaluation.union-examples": 5})
