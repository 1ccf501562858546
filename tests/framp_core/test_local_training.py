import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import ClientData, LabelledImages
from framp_core.data.examples import batch_positions
from framp_core.data.transforms import Augmentation, Normaliser
from framp_core.errors import ConfigError, ModelError
from framp_core.local_training import (
    INFERENCE_BATCH,
    LocalResult,
    client_prototypes,
    evaluate,
    log_prior,
    no_prototypes,
    penultimate_features,
    resolve_device,
    train_locally,
)
from framp_core.models import FlatModel, build_model, initial_parameters
from framp_core.prototypes import Prototypes
from framp_core.randomness import stream

CLASSES = 4
SHAPE = (1, 8, 8)
NORMALISER = Normaliser((0.5,), (0.25,))
HELD = [0, 1, 3]  # class 2 has no image


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


def config_of(**values: Scalar) -> FrampConfig:
    small: dict[str, Scalar] = {
        "model.widths": "4,6",
        "model.groups": 2,
        "local.steps": 6,
        "local.batch-size": 5,
        "local.nested-share": 0.0,
        "local.device": "cpu",
    }
    return FrampConfig.from_flat(small | {key.replace("__", "."): value for key, value in values.items()})


def some_images(count: int, seed: int = 0) -> LabelledImages:
    """A selection of ``count`` images, in shuffled order, from a pool twice as large."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, 256, size=(2 * count, *SHAPE), dtype=np.uint8)
    labels = np.array(HELD, dtype=np.int64)[rng.integers(0, len(HELD), size=2 * count)]
    return LabelledImages(pool, labels, rng.permutation(2 * count)[:count], NORMALISER)


def some_client(train: int = 13) -> ClientData:
    own = some_images(train)
    return ClientData(
        name="client-0000",
        role="train",
        capacity=Fraction(1, 4),
        classes=CLASSES,
        shape=SHAPE,
        train=own,
        validation=some_images(0),
        test=some_images(6, seed=2),
        union_test=some_images(9, seed=3),
        known=own,
        partition_digest="",
    )


def flat_model(config: FrampConfig) -> FlatModel:
    return FlatModel(build_model(config.model, SHAPE, CLASSES))


def initial(config: FrampConfig) -> np.ndarray:
    return initial_parameters(build_model(config.model, SHAPE, CLASSES), seed=3).numpy()


def random_mask(config: FrampConfig, density: float) -> np.ndarray:
    layout = flat_model(config).layout
    return ~layout.maskable | (np.random.default_rng(1).random(layout.size) < density)


def some_prototypes(seed: int = 0) -> Prototypes:
    means = np.random.default_rng(seed).normal(size=(2, 6)).astype(np.float32)
    return Prototypes(np.array([0, 3]), np.array([4, 5]), means)


def train(
    config: FrampConfig,
    mask: np.ndarray | None = None,
    prototypes: Prototypes | None = None,
    model: FlatModel | None = None,
    steps: int | None = None,
) -> LocalResult:
    rng = np.random.default_rng(7)
    return train_locally(
        model or flat_model(config), initial(config), mask, some_client(), config, rng, prototypes, steps
    )


def ordinary_training(config: FrampConfig, offset: torch.Tensor | None) -> np.ndarray:
    """What anyone would write: a module, its parameters, SGD."""
    data, local = some_client(), config.local
    network = build_model(config.model, SHAPE, CLASSES)
    start = torch.from_numpy(initial(config))
    vector_to_parameters(start.clone(), network.parameters())
    optimizer = torch.optim.SGD(
        network.parameters(), lr=local.learning_rate, momentum=local.momentum, weight_decay=local.weight_decay
    )
    rng = np.random.default_rng(7)
    for positions in batch_positions(len(data.train), local.batch_size, local.steps, rng):
        images, labels = data.train.batch(positions)
        if config.data.augment:
            images = Augmentation.draw(images.shape, rng)(images)
        logits, _ = network(data.train.normaliser(images))
        optimizer.zero_grad()
        F.cross_entropy(logits if offset is None else logits + offset, labels).backward()
        optimizer.step()
    return (parameters_to_vector(network.parameters()).detach() - start).numpy()


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_without_mask_it_is_ordinary_training_bit_for_bit(momentum: float, decay: float, augmented: bool) -> None:
    config = config_of(
        local__momentum=momentum, **{"local.weight-decay": decay, "local.prior-strength": 0.5}, data__augment=augmented
    )
    counts = np.bincount(some_client().train.selected_labels, minlength=CLASSES)
    frequencies = [count / 13 if count else config.local.absent_class_prior for count in counts]
    offset = 0.5 * torch.from_numpy(np.log(frequencies).astype(np.float32))
    expected = ordinary_training(config, offset)
    ones = np.ones(len(expected), dtype=np.bool_)
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(train(config).delta, expected)
    np.testing.assert_array_equal(train(config, ones).delta, expected)
    assert not np.array_equal(train(config, random_mask(config, 0.5)).delta, expected)


def test_prior_strength_zero_is_plain_cross_entropy() -> None:
    plain = config_of(**{"local.prior-strength": 0})
    adjusted = config_of(**{"local.prior-strength": 1})
    expected = ordinary_training(plain, None)
    np.testing.assert_array_equal(train(plain).delta, expected)
    assert not np.array_equal(train(adjusted).delta, expected)


MASKED: dict[str, Scalar] = {"local.masked-cross-entropy": True, "local.prior-strength": 0}


def test_masked_cross_entropy_counts_absent_classes_with_a_logit_of_zero() -> None:
    config = config_of(**MASKED, **{"local.learning-rate": 1e-12})  # so that each loss is that of the initial network
    data, network = some_client(), build_model(config.model, SHAPE, CLASSES)
    vector_to_parameters(torch.from_numpy(initial(config)), network.parameters())
    losses = []
    for positions in batch_positions(13, 5, config.local.steps, np.random.default_rng(7)):
        images, labels = data.train.batch(positions)
        rows = network(data.train.normaliser(images))[0].tolist()
        for row, label in zip(rows, labels.tolist(), strict=True):
            logits = [logit if held in HELD else 0.0 for held, logit in enumerate(row)]
            losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[label])
    assert train(config).loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    plain = config_of(**{"local.prior-strength": 0, "local.learning-rate": 1e-12})
    assert train(plain).loss != pytest.approx(train(config).loss, rel=1e-3)


def test_masked_cross_entropy_leaves_the_rows_of_absent_classes_alone() -> None:
    def head_movement(config: FrampConfig) -> np.ndarray:
        weight, bias = flat_model(config).layout.split(torch.from_numpy(train(config).delta))[-2:]
        return np.abs(np.column_stack([weight.numpy(), bias.numpy()])).max(axis=1)

    assert (head_movement(config_of(**MASKED)) > 0).tolist() == [held in HELD for held in range(CLASSES)]
    assert (head_movement(config_of(**{"local.prior-strength": 0})) > 0).all()


def test_masked_cross_entropy_of_a_client_with_all_classes_is_plain() -> None:
    complete = replace(some_client(), train=replace(some_images(13), labels=np.arange(26) % CLASSES))
    assert complete.class_counts().all()

    def delta(data: ClientData, **values: Scalar) -> np.ndarray:
        config = config_of(**values)
        return train_locally(
            flat_model(config), initial(config), None, data, config, np.random.default_rng(7), None
        ).delta

    plain: dict[str, Scalar] = {"local.prior-strength": 0}
    np.testing.assert_array_equal(delta(complete, **MASKED), delta(complete, **plain))
    assert not np.array_equal(delta(some_client(), **MASKED), delta(some_client(), **plain))


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_dropped_weights_stay_zero_and_kept_ones_move(momentum: float, decay: float) -> None:
    config = config_of(local__momentum=momentum, **{"local.weight-decay": decay})
    mask, model = random_mask(config, 0.3), flat_model(config)
    dropped = ~mask
    assert dropped.sum() > 100
    assert np.abs(initial(config)[dropped]).min() > 0  # the values handed in are not zero there
    result = train(config, mask, model=model)
    trained = model.flat.detach().numpy()
    assert not trained[dropped].any()
    assert not model.flat_gradient.numpy()[dropped].any()
    assert not result.delta[dropped].any()
    assert (result.delta[mask] != 0).mean() > 0.5
    np.testing.assert_array_equal(result.delta, trained - np.where(mask, initial(config), 0))


def test_a_weight_hidden_behind_a_mask_does_not_matter() -> None:
    config = config_of()
    mask, values = random_mask(config, 0.3), initial(config)
    full, cut = (
        train_locally(flat_model(config), start, mask, some_client(), config, np.random.default_rng(7), None)
        for start in (values, np.where(mask, values, 0).astype(np.float32))
    )
    np.testing.assert_array_equal(full.delta, cut.delta)


def test_alignment_weight_zero_ignores_the_prototypes() -> None:
    off = config_of(**{"local.alignment-weight": 0})
    on = config_of(**{"local.alignment-weight": 0.5})
    reference = train(off).delta
    np.testing.assert_array_equal(train(off, prototypes=some_prototypes()).delta, reference)
    np.testing.assert_array_equal(train(on).delta, reference)  # no prototypes, as in round 1
    aligned = train(on, prototypes=some_prototypes()).delta
    assert not np.array_equal(aligned, reference)
    assert not np.array_equal(aligned, train(on, prototypes=some_prototypes(1)).delta)


def test_prototypes_of_no_class_are_no_prototypes() -> None:
    config = config_of(**{"local.alignment-weight": 0.5})
    none = no_prototypes(flat_model(config))
    assert none.means.shape == (0, 6)
    np.testing.assert_array_equal(train(config, prototypes=none).delta, train(config).delta)


@pytest.mark.parametrize("distance", ["squared-l2", "cosine"])
def test_alignment_draws_features_to_the_prototypes(distance: str) -> None:
    config = config_of(**{"local.alignment-distance": distance, "local.learning-rate": 0.02, "local.steps": 150})
    heavy = FrampConfig.from_flat(config.to_flat() | {"local.alignment-weight": 20.0})
    without = FrampConfig.from_flat(config.to_flat() | {"local.alignment-weight": 0.0})
    target = np.abs(some_prototypes().means)  # features end in ReLU and an average, so they are not negative

    def remaining(config: FrampConfig) -> float:
        model = flat_model(config)
        train(config, prototypes=replace(some_prototypes(), means=target), model=model)
        own = client_prototypes(model, some_client())
        means = own.means[np.isin(own.classes, [0, 3])]
        if distance == "squared-l2":
            return float(np.square(means - target).mean())
        norms = np.linalg.norm(means, axis=1) * np.linalg.norm(target, axis=1)
        return float((1 - (means * target).sum(axis=1) / norms).mean())

    assert remaining(heavy) < 0.8 * remaining(without)


def test_result_says_what_was_done() -> None:
    config = config_of()
    result = train(config)
    assert (result.examples, result.steps) == (13, 6)
    assert result.delta.dtype == np.float32
    assert train(config, steps=2).steps == 2


def test_loss_is_the_mean_over_the_steps() -> None:
    config = config_of(**{"local.learning-rate": 1e-12})  # so that each loss is that of the initial network
    data, network = some_client(), build_model(config.model, SHAPE, CLASSES)
    vector_to_parameters(torch.from_numpy(initial(config)), network.parameters())
    prior = log_prior(data.class_counts(), config.local.absent_class_prior)
    losses = []
    for positions in batch_positions(13, 5, config.local.steps, np.random.default_rng(7)):
        images, labels = data.train.batch(positions)
        logits = network(data.train.normaliser(images))[0].detach()
        losses.append(float(F.cross_entropy(logits + prior, labels)))
    assert np.ptp(losses) > 0.1
    assert train(config).loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_training_lowers_the_loss() -> None:
    config = config_of(**{"local.steps": 150})
    data, model = some_client(), flat_model(config)
    prior = log_prior(data.class_counts(), config.local.absent_class_prior)
    model.load(torch.from_numpy(initial(config)))

    def loss() -> float:
        images, labels = data.train.batch(np.arange(len(data.train)))
        return float(F.cross_entropy(model(data.train.normaliser(images))[0].detach() + prior, labels))

    before = loss()
    train(config, model=model)
    assert loss() < 0.7 * before


def test_divergence_is_an_error_that_names_the_learning_rate() -> None:
    config = config_of(**{"local.learning-rate": 1e30})
    with pytest.raises(ModelError, match=r"client-0000 diverged.*local\.learning-rate=1e\+30"):
        train(config)


@pytest.mark.parametrize(("steps", "said"), [(1, "step 1 of 1"), (3, "step 2 of 3")])
def test_divergence_names_the_first_bad_step(steps: int, said: str) -> None:
    # The first loss is finite; the weights overflow in its step, and the second loss is not a number.
    config = config_of(**{"local.learning-rate": 3e38, "local.alignment-weight": 1e4})
    with pytest.raises(ModelError, match=said):
        train(config, prototypes=some_prototypes(), steps=steps)


@settings(derandomize=True, deadline=None)
@given(examples=st.integers(1, 12), batch_size=st.integers(1, 15), steps=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_batches_are_full_and_go_through_all_images(examples: int, batch_size: int, steps: int, seed: int) -> None:
    batches = batch_positions(examples, batch_size, steps, np.random.default_rng(seed))
    assert batches.shape == (steps, min(batch_size, examples))
    order = batches.reshape(-1)
    for first in range(0, len(order) - examples + 1, examples):
        assert sorted(order[first : first + examples]) == list(range(examples))
    assert np.bincount(order, minlength=examples).max() <= -(-len(order) // examples)


def test_epochs_are_reshuffled() -> None:
    batches = batch_positions(50, 50, 2, np.random.default_rng(0))
    assert not np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], np.arange(50))


def test_log_prior_by_hand() -> None:
    prior = log_prior(np.array([6, 0, 1, 1]), absent=1e-4)
    np.testing.assert_allclose(prior.numpy(), np.log([0.75, 1e-4, 0.125, 0.125]), rtol=1e-6)
    assert prior.dtype == torch.float32
    np.testing.assert_allclose(log_prior(np.zeros(2, np.int64), 0.01).numpy(), np.log([0.01, 0.01]), rtol=1e-6)


def test_prototypes_are_class_means_of_a_clean_pass_after_training() -> None:
    config = config_of(data__augment=True)
    data, model = some_client(), flat_model(config)
    model.load(torch.from_numpy(initial(config)))
    untrained = client_prototypes(model, data)
    train(config, model=model)
    result = client_prototypes(model, data)
    assert result.classes.tolist() == HELD
    assert not np.allclose(result.means, untrained.means)

    network = build_model(config.model, SHAPE, CLASSES)
    vector_to_parameters(model.flat.detach(), network.parameters())
    for held, count, mean in zip(result.classes, result.counts, result.means, strict=True):
        indices = [index for index in data.train.indices if data.train.labels[index] == held]
        images = torch.from_numpy(data.train.images[indices])
        with torch.no_grad():
            _, features = network((images.float() / 255 - 0.5) / 0.25)
        assert count == len(indices)
        np.testing.assert_allclose(mean, features.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_features_come_in_the_order_of_the_images() -> None:
    config = config_of()
    images, model = some_images(INFERENCE_BATCH + 44), flat_model(config)
    model.load(torch.from_numpy(initial(config)))
    features, labels = penultimate_features(model, images)
    assert features.shape == (INFERENCE_BATCH + 44, 6)
    assert labels.tolist() == images.selected_labels.tolist()
    single, _ = penultimate_features(model, replace(images, indices=images.indices[100:101]))
    np.testing.assert_allclose(features[100], single[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2 * INFERENCE_BATCH, 2 * INFERENCE_BATCH + 3])
@pytest.mark.parametrize("with_offset", [False, True])
def test_evaluation_counts_like_a_loop(count: int, with_offset: bool) -> None:
    config = config_of()
    images, model = some_images(count), flat_model(config)
    model.load(torch.from_numpy(initial(config)))
    offset = torch.tensor([0.0, 1.0, -9.0, 0.3]) if with_offset else torch.zeros(CLASSES)
    correct = 0
    for position in range(count):
        image, label = images.batch(np.array([position]))
        with torch.no_grad():
            logits = model(NORMALISER(image))[0][0].double()
        correct += int((logits + offset).argmax() == label[0])
    (result,) = evaluate(model, images, offset[None])
    assert (result.correct, result.total) == (correct, count)


def test_an_offset_can_rule_a_class_out() -> None:
    config = config_of()
    images, model = some_images(40), flat_model(config)
    model.load(torch.from_numpy(initial(config)))
    found = evaluate(model, images, 1e6 * torch.eye(CLASSES))
    assert [each.correct for each in found] == np.bincount(images.selected_labels, minlength=CLASSES).tolist()


def test_several_offsets_are_as_many_evaluations_in_one_pass() -> None:
    images, model = some_images(INFERENCE_BATCH + 3), flat_model(config_of())
    model.load(torch.from_numpy(initial(config_of())))
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    offsets = torch.from_numpy(np.random.default_rng(0).normal(size=(5, CLASSES)).astype(np.float32))
    together = evaluate(model, images, offsets, INFERENCE_BATCH)
    assert len(passes) == 2  # batches
    assert together == tuple(evaluate(model, images, row[None])[0] for row in offsets)
    assert len({each.correct for each in together}) > 1


def test_same_stream_same_result() -> None:
    config, data = config_of(data__augment=True), some_client()

    def delta(server_round: int) -> np.ndarray:
        rng = stream(0, "local-training", data.name, server_round)
        return train_locally(flat_model(config), initial(config), None, data, config, rng, None).delta

    np.testing.assert_array_equal(delta(1), delta(1))
    assert not np.array_equal(delta(1), delta(2))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"local\.device='cuda'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("name", "repeatable"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_cuda_comes_with_repeatable_convolutions(name: str, repeatable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    resolve_device(name)  # type: ignore[arg-type]
    assert torch.backends.cudnn.deterministic is repeatable
    assert torch.backends.cudnn.benchmark is not repeatable


def clipped_by_torch(config: FrampConfig, mask: np.ndarray, limit: float) -> tuple[np.ndarray, list[float]]:
    """Delta of an ordinary module under PyTorch's own clipping, and the norms before it."""
    network, data = build_model(config.model, SHAPE, CLASSES), some_client()
    kept, start = torch.from_numpy(mask), torch.from_numpy(initial(config) * mask)
    vector_to_parameters(start.clone(), network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), config.local.learning_rate, momentum=config.local.momentum)
    held = torch.split(kept, [parameter.numel() for parameter in network.parameters()])
    norms = []
    for positions in batch_positions(len(data.train), 5, config.local.steps, np.random.default_rng(7)):
        images, labels = data.train.batch(positions)
        optimizer.zero_grad()
        F.cross_entropy(network(NORMALISER(images))[0], labels).backward()
        for parameter, part in zip(network.parameters(), held, strict=True):
            assert parameter.grad is not None
            parameter.grad *= part.view_as(parameter)
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), limit)))
        optimizer.step()
    return (parameters_to_vector(network.parameters()) - start).detach().numpy(), norms


def test_gradients_are_clipped_as_pytorch_clips_them() -> None:
    """What the mask drops has no part in the norm, and momentum follows the clipping."""
    plain: dict[str, Scalar] = {"local.momentum": 0.9, "local.prior-strength": 0.0, "local.alignment-weight": 0.0}
    config = config_of(**plain, **{"local.gradient-clip": 0.6})
    mask = random_mask(config, 0.5)
    expected, norms = clipped_by_torch(config, mask, 0.6)
    assert min(norms) < 0.6 < max(norms), "it must bite in some steps and not in others"
    np.testing.assert_allclose(train(config, mask).delta, expected, rtol=0, atol=1e-6)
    assert np.abs(train(config_of(**plain), mask).delta - expected).max() > 1e-3
    loose = config_of(**plain, **{"local.gradient-clip": 2 * max(norms) + 10})
    np.testing.assert_array_equal(train(loose, mask).delta, train(config_of(**plain), mask).delta)
