"""FIARSE, as in its paper and as its released code runs, written out slowly, against whole runs of both strategies."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from framp.engines import run_local
from framp_core.config import FrampConfig
from framp_core.config_values import Scalar
from framp_core.data import Augmentation, ClientData, LabelledImages, load_client
from framp_core.layout import ParameterLayout
from framp_core.methods import METHODS
from framp_core.models import FeaturesAndHead, build_model, initial_parameters
from framp_core.randomness import stream
from framp_core.run_folder import RunFolder

Build = Callable[..., FrampConfig]

PROTOCOL: dict[str, Scalar] = {
    "data.augment": True,
    "partition.unseen-clients": 0,
    "partition.scheme": "balanced-dirichlet",
    "partition.test-split": "independent",
    "partition.validation-fraction": 0.0,
    "capacity.sizes": "1,1/4,1/16,1/64",
    "model.normalisation": "batch-statistics",
    "model.initialisation": "uniform",
    "model.maskable-head-bias": True,
    "local.steps": 5,
    "local.batch-size": 20,
    "local.reshuffle": False,
    "server.clients-per-round": 4,
    "server.weighting": "non-zero",
    "evaluation.union-by-client": True,
    "evaluation.batch-size": 20,
    "evaluation.augment": True,
    "evaluation.local-prior-strength": 0.0,
}
PUBLISHED: dict[str, Scalar] = {**METHODS["fiarse-released"].settings, **PROTOCOL}
PAPER: dict[str, Scalar] = {**METHODS["fiarse"].settings, **PROTOCOL}


@pytest.fixture(autouse=True)
def _on_one_thread() -> None:
    torch.set_num_threads(1)


class BoolMask(torch.autograd.Function):
    """1[s >= theta] as a tensor of bool, to which autograd gives no derivative, whatever ``backward`` says."""

    @staticmethod
    def forward(context: Any, scores: Tensor, threshold: Tensor) -> Tensor:
        context.save_for_backward(scores, threshold)
        return scores >= threshold

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        scores, threshold = context.saved_tensors
        return gradient * torch.where(scores >= threshold, 2 * threshold / (scores + threshold) ** 2, 0.0), None


class FloatMask(BoolMask):
    """The same numbers as floats, so that the slope 2 theta / (s + theta)^2 acts where it is 1."""

    @staticmethod
    def forward(context: Any, scores: Tensor, threshold: Tensor) -> Tensor:
        return BoolMask.forward(context, scores, threshold).float()


MaskOf = Callable[[Tensor, Tensor, Tensor], Tensor]
MASKS: dict[str, MaskOf] = {
    "following": lambda value, _, threshold: BoolMask.apply(value.abs(), threshold),
    "threshold-controlled": lambda value, _, threshold: FloatMask.apply(value.abs(), threshold),
    "fixed": lambda _, start, threshold: start.abs() >= threshold,
}
"""Of a tensor as it is and as it was when the round began, by ``local.mask``."""


def is_ranked(name: str, model: FeaturesAndHead) -> bool:
    """Convolution and linear weights, and the head's bias."""
    return name == "head.bias" or dict(model.named_parameters())[name].dim() > 1


def threshold_of(parameters: dict[str, Tensor], model: FeaturesAndHead, data: ClientData) -> Tensor:
    sizes = torch.cat([value.abs().flatten() for name, value in parameters.items() if is_ranked(name, model)])
    return sizes.sort(descending=True).values[math.floor(data.capacity * len(sizes)) - 1]


def masked(
    parameters: dict[str, Tensor], start: dict[str, Tensor], model: FeaturesAndHead, threshold: Tensor, mask: MaskOf
) -> dict[str, Tensor]:
    return {
        name: value * mask(value, start[name], threshold) if is_ranked(name, model) else value
        for name, value in parameters.items()
    }


def batches(images: LabelledImages, data: ClientData, rng: np.random.Generator | None) -> Iterator[tuple[Tensor, ...]]:
    for first in range(0, len(images), 20):
        pixels, labels = images.batch(np.arange(first, min(first + 20, len(images))))
        yield data.train.normaliser(pixels if rng is None else Augmentation.draw(pixels.shape, rng)(pixels)), labels


def client_delta(
    start: dict[str, Tensor],
    model: FeaturesAndHead,
    data: ClientData,
    config: FrampConfig,
    server_round: int,
    mask: MaskOf,
) -> dict[str, Tensor]:
    threshold = threshold_of(start, model, data)
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.SGD(weights.values(), config.local.learning_rate)
    rng = stream(config.seed, "local-training", data.name, server_round)
    order = np.tile(np.arange(len(data.train)), 5)
    for step in range(config.local.steps):
        pixels, labels = data.train.batch(order[20 * step : 20 * step + 20])
        images = data.train.normaliser(Augmentation.draw(pixels.shape, rng)(pixels))
        logits, _ = torch.func.functional_call(model, masked(weights, start, model, threshold, mask), (images,))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: weights[name].detach() - start[name] for name in start}


def accuracy(
    parameters: dict[str, Tensor], model: FeaturesAndHead, images: LabelledImages, data: ClientData, rng: Any
) -> int:
    shown = masked(parameters, parameters, model, threshold_of(parameters, model, data), MASKS["fixed"])
    correct = 0
    for pixels, labels in batches(images, data, rng):
        logits, _ = torch.func.functional_call(model, shown, (pixels,))
        correct += int((logits.argmax(dim=1) == labels).sum())
    return correct


def by_hand(config: FrampConfig, mask: str = "") -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """The global model after all rounds, and each client's correct answers, local and union.

    ``mask`` stands in for the configuration's ``local.mask``.
    """
    mask_of = MASKS[mask or config.local.mask]
    clients = [load_client(config, index, config.partition.nodes) for index in range(config.partition.nodes)]
    model = build_model(config.model, clients[0].shape, clients[0].classes)
    layout = ParameterLayout.of(model)
    theta = initial_parameters(model, config.seed, "uniform")

    def named() -> dict[str, Tensor]:
        shaped = zip(layout.slots, layout.split(theta), strict=True)
        return {slot.name: value.view(slot.shape) for slot, value in shaped}

    for server_round in range(1, config.rounds + 1):
        deltas = [client_delta(named(), model, data, config, server_round, mask_of) for data in clients]
        stacked = torch.stack([torch.cat([part.flatten() for part in delta.values()]) for delta in deltas])
        theta = theta + (stacked.sum(dim=0) / (stacked != 0).sum(dim=0)).nan_to_num(0.0)
    weights = named()
    counts = {}
    for data in clients:
        rng = stream(config.seed, "test-augmentation", data.name, config.rounds)
        local = accuracy(weights, model, data.test, data, rng)
        counts[data.name] = local, accuracy(weights, model, data.union_test, data, None)
    return theta, counts


def measured(run: RunFolder) -> dict[str, tuple[int, int]]:
    rows = [event for event in run.events() if event["kind"] == "evaluate"][-1]["accuracies"]
    correct = {(row["client"], row["population"]): row["correct"] for row in rows}
    return {name: (correct[name, "local"], correct[name, "union"]) for name, _ in correct}


def test_a_run_is_the_papers_method(tiny: Build) -> None:
    config = tiny(PAPER)
    theta, counts = by_hand(config)
    run = run_local(config)
    found = run.read_checkpoint()[0]["generator.theta_0"]
    torch.testing.assert_close(found, theta, atol=2e-4, rtol=1e-3)
    for name, pair in measured(run).items():
        np.testing.assert_allclose(pair, counts[name], atol=1)  # a tie within rounding may fall either way


def test_a_run_is_the_released_code_bit_for_bit(tiny: Build) -> None:
    config = tiny({**PUBLISHED, "rounds": 4})
    theta, counts = by_hand(config)
    run = run_local(config)
    found = run.read_checkpoint()[0]["generator.theta_0"]
    assert torch.equal(found, theta)
    assert measured(run) == counts
    for other in ("threshold-controlled", "fixed"):
        assert (found - by_hand(config, other)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.normalisation", "group"),
        ("model.maskable-head-bias", False),
        ("local.reshuffle", True),
        ("server.weighting", "coverage"),
    ],
)
def test_every_setting_of_the_published_method_matters(tiny: Build, key: str, value: Scalar) -> None:
    theta, _ = by_hand(tiny(PUBLISHED))
    found = run_local(tiny({**PUBLISHED, key: value})).read_checkpoint()[0]["generator.theta_0"]
    assert (found - theta).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [("evaluation.batch-size", 256), ("evaluation.union-by-client", False), ("evaluation.augment", False)],
)
def test_every_setting_of_the_published_evaluation_matters(tiny: Build, key: str, value: Scalar) -> None:
    published, other = (measured(run_local(tiny({**PUBLISHED, **more}, str(more)))) for more in ({}, {key: value}))
    changed = {
        population for name in other for population in (0, 1) if other[name][population] != published[name][population]
    }
    assert (
        changed == {"evaluation.batch-size": {0, 1}, "evaluation.union-by-client": {1}, "evaluation.augment": {0}}[key]
    )


@pytest.mark.parametrize("method", ["framp", "heterofl", "local"])
def test_batch_statistics_serve_every_method(tiny: Build, method: str) -> None:
    values: dict[str, Scalar] = {
        **METHODS[method].settings,
        "model.name": "resnet18",
        "model.widths": "4,4,6,6",  # 8x8 images shrink to 1x1
        "model.normalisation": "batch-statistics",
        "evaluation.batch-size": 20,
        "evaluation.union-examples": 41,  # the last image would be a batch alone
        "evaluation.fine-tune-steps": 1,
        "evaluation.augment": True,
    }
    run = run_local(tiny(values))
    events = list(run.events())
    assert not [row for event in events for row in event.get("refused", [])]
    rows = [event for event in events if event["kind"] == "evaluate"][-1]["accuracies"]
    assert {row["total"] for row in rows if row["population"] == "union"} == {41}
    assert {row["moment"] for row in rows} == {"before", "after"}
