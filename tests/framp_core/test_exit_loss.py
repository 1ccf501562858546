"""The local loss over the exits of a network."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from framp_core.config import FrampConfig, LocalConfig
from framp_core.config_values import Scalar
from framp_core.data import ClientData, LabelledImages
from framp_core.data.examples import batch_positions
from framp_core.data.transforms import Normaliser
from framp_core.layout import ParameterLayout
from framp_core.local_training import LocalResult, distillation_loss, train_locally
from framp_core.models import FlatModel, build_model, initial_parameters

SHAPE, CLASSES = (3, 8, 8), 5
HELD = [0, 1, 3]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def some_client() -> ClientData:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, size=(20, *SHAPE), dtype=np.uint8)
    normaliser = Normaliser((0.5,) * 3, (0.25,) * 3)
    train = LabelledImages(pool, np.array(HELD)[rng.integers(0, 3, size=20)], np.arange(13), normaliser)
    nothing = replace(train, indices=np.arange(0))
    return ClientData("client-0000", "train", Fraction(1), CLASSES, SHAPE, train, nothing, nothing, nothing, train, "")


def config_of(**values: Scalar) -> FrampConfig:
    small: dict[str, Scalar] = {
        "model.widths": "8,16,16",
        "model.groups": 4,
        "model.exits": 0,
        "local.steps": 4,
        "local.batch-size": 5,
        "local.device": "cpu",
        "local.prior-strength": 0,
    }
    return FrampConfig.from_flat(small | {key.replace("__", "."): value for key, value in values.items()})


def trained(config: FrampConfig) -> LocalResult:
    model = FlatModel(build_model(config.model, SHAPE, CLASSES))
    start = initial_parameters(model.model, 3).numpy()
    return train_locally(model, start, None, some_client(), config, np.random.default_rng(7), None)


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    exponentials = [math.exp(logit / temperature) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def loss_by_loops(exits: list[list[list[float]]], labels: list[int], weight: float) -> float:
    """sum_j j (CE_j + [j < m] gamma T^2 KL_j) / (m (m + 1) / 2); CE a mean over images, KL over images and classes."""
    total, count = 0.0, len(exits)
    for depth, rows in enumerate(exits, start=1):
        entropy = divergence = 0.0
        for row, deepest, label in zip(rows, exits[-1], labels, strict=True):
            entropy -= math.log(softmax(row)[label])
            for teacher, student in zip(softmax(deepest, 3.0), softmax(row, 3.0), strict=True):
                divergence += teacher * math.log(teacher / student)
        value = entropy / len(labels)
        if depth < count:
            value += weight * 9 * divergence / (len(labels) * len(rows[0]))
        total += depth * value
    return total / (count * (count + 1) / 2)


def exits_as_lists(model, batch: torch.Tensor) -> list[list[list[float]]]:
    return [logits.tolist() for logits in model.all_exits(batch)[0]]


@pytest.mark.parametrize("weight", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("exits", [1, 2, 3])
def test_loss_is_that_of_a_loop_over_exits_and_images(exits, weight):
    settings_ = {"model.exits": exits, "local.distillation-weight": weight, "local.learning-rate": 1e-12}
    config, data, losses = config_of(**settings_), some_client(), []
    model = build_model(config.model, SHAPE, CLASSES)
    vector_to_parameters(initial_parameters(model, 3), model.parameters())
    for positions in batch_positions(13, 5, config.local.steps, np.random.default_rng(7)):
        batch, labels = data.train.batch(positions)
        losses.append(loss_by_loops(exits_as_lists(model, data.train.normaliser(batch)), labels.tolist(), weight))
    assert trained(config).loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_training_over_exits_is_ordinary_autograd_on_the_written_loss():
    config, data = config_of(**{"local.distillation-weight": 2.0}), some_client()
    model = build_model(config.model, SHAPE, CLASSES)
    start = initial_parameters(model, 3)
    vector_to_parameters(start.clone(), model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=config.local.learning_rate)
    for positions in batch_positions(13, 5, config.local.steps, np.random.default_rng(7)):
        batch, labels = data.train.batch(positions)
        first, second, last = model.all_exits(data.train.normaliser(batch))[0]
        teacher = (last / 3).softmax(1)
        kl = [
            F.kl_div((exit_ / 3).log_softmax(1), teacher, reduction="sum") / exit_.numel() for exit_ in (first, second)
        ]
        entropy = [F.cross_entropy(exit_, labels) for exit_ in (first, second, last)]
        optimizer.zero_grad()
        ((entropy[0] + 18 * kl[0]) / 6 + (entropy[1] + 18 * kl[1]) / 3 + entropy[2] / 2).backward()
        optimizer.step()
    expected = (parameters_to_vector(model.parameters()).detach() - start).numpy()
    np.testing.assert_allclose(trained(config).delta, expected, rtol=0, atol=1e-6)
    assert np.abs(trained(config_of()).delta - expected).max() > 1e-4


def test_one_exit_is_plain_cross_entropy_whatever_the_distillation():
    plain, distilled = (config_of(**{"model.exits": 1, "local.distillation-weight": weight}) for weight in (0, 9))
    np.testing.assert_array_equal(trained(distilled).delta, trained(plain).delta)
    weight_matters = [trained(config_of(**{"local.distillation-weight": weight})).delta for weight in (0, 9)]
    assert not np.array_equal(*weight_matters)


def test_every_tensor_of_the_network_gets_a_gradient():
    config = config_of()
    layout = ParameterLayout.of(build_model(config.model, SHAPE, CLASSES))
    for slot, part in zip(layout.slots, layout.split(torch.from_numpy(trained(config).delta)), strict=True):
        assert part.abs().max() > 0, slot.name


def test_distillation_of_equal_exits_is_nothing_and_the_teacher_is_moved_too():
    student = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    teacher = (2 * student.detach()).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert teacher.grad.abs().max() > 0
    assert LocalConfig().distillation_weight == 0
