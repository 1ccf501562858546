"""Experts learn what tells their cluster from the others, as far as it is more than noise."""

import numpy as np
import pytest
import torch

from framp_core.config import GeneratorConfig, ModelConfig, ServerConfig
from framp_core.deltas import KeptDeltas
from framp_core.errors import ModelError
from framp_core.expert_update import SMOOTHING, ExpertUpdate
from framp_core.generators import Generator, Mixture, build_generator
from framp_core.layout import ParameterLayout
from framp_core.models import build_model, initial_parameters
from framp_core.packed_mask import Masks, PackedMask
from framp_core.server_update import GeneratorUpdate

MODEL = build_model(ModelConfig(name="mlp", widths=(5,)), (1, 2, 2), 3)
LAYOUT = ParameterLayout.of(MODEL)
N, K = LAYOUT.size, 3
POINTS = torch.eye(K, 4)
PLAIN = {"shared_learning_rate": 1.0, "shared_momentum": 0.0, "averaging_decay": 0.0}


def mixture(scope: str = "all") -> Mixture:
    config = GeneratorConfig(name="mixture", experts=K, expert_scope=scope)
    generator = build_generator(config, LAYOUT, 4, initial_parameters(MODEL, 0), 0)
    assert isinstance(generator, Mixture)
    generator.centres.copy_(POINTS)
    return generator


def cohort(kinds: list[int], effect: float, seed: int = 0, density: float = 0.7):
    """Descriptors, deltas and masks of clients of these clusters; the head's deltas differ between clusters."""
    rng = np.random.default_rng(seed)
    means = np.zeros((K, N), dtype=np.float32)
    for slot in LAYOUT.slots:
        if slot.name.startswith("head"):
            means[:, slot.slice] = effect * np.random.default_rng(99).normal(size=(K, slot.size))
    masks = [rng.random(N) < density for _ in kinds]
    deltas = [
        np.where(mask, means[kind] + rng.normal(size=N), 0).astype(np.float32)
        for kind, mask in zip(kinds, masks, strict=True)
    ]
    return POINTS[kinds], deltas, masks


def by_hand(kinds, deltas, masks, memory, past=None):
    """Loops over tensors, coordinates and clients: differences (K, N), shares by name, running sums."""
    difference, shares, sums = np.zeros((K, N)), {}, {}
    for slot in LAYOUT.slots:
        between = within = 0.0
        for j in range(slot.offset, slot.offset + slot.size):
            groups = {k: [d[j] for d, m, own in zip(deltas, masks, kinds, strict=True) if m[j] and own == k]
                      for k in range(K)}  # fmt: skip
            groups = {k: np.array(values, dtype=float) for k, values in groups.items() if values}
            if not groups:
                continue
            overall = np.concatenate(list(groups.values())).mean()
            for k, values in groups.items():
                difference[k, j] = values.mean() - overall
            b, w = len(groups) - 1, sum(map(len, groups.values())) - len(groups)
            if b and w:
                between += sum(len(values) * (values.mean() - overall) ** 2 for values in groups.values())
                within += b / w * sum(((values - values.mean()) ** 2).sum() for values in groups.values())
        before = (past or {}).get(slot.name, (0.0, 0.0))
        sums[slot.name] = SMOOTHING * before[0] + between, SMOOTHING * before[1] + within
        ratio = sums[slot.name][0] / sums[slot.name][1] if sums[slot.name][1] else 1.0
        shares[slot.name] = 1 - 1 / (1 + memory * max(ratio - 1, 0))
    return difference, shares, sums


@pytest.mark.parametrize("kinds", [[0, 0, 1, 2, 2, 2], [1, 0, 2, 0, 1], [0, 1], [2, 2, 2]])
@pytest.mark.parametrize("effect", [0.0, 2.0])
def test_two_rounds_by_hand(kinds: list[int], effect: float) -> None:
    generator = mixture()
    update, past = ExpertUpdate(generator, memory=10.0), None
    for seed in range(2):
        descriptors, deltas, masks = cohort(kinds, effect, seed)
        found = update.set_gradient(descriptors, deltas, masks)
        difference, shares, past = by_hand(kinds, deltas, masks, 10.0, past)
        expected = np.concatenate([-shares[slot.name] * difference[:, slot.slice] for slot in LAYOUT.slots], axis=1)
        np.testing.assert_allclose(generator.experts.grad, expected, atol=1e-5)
        assert found == pytest.approx({f"expert_share.{name}": share for name, share in shares.items()}, abs=1e-5)


def test_the_tensors_that_differ_between_clusters_become_personal_and_no_others() -> None:
    update = ExpertUpdate(mixture(), memory=10.0)
    for seed in range(30):
        kinds = np.random.default_rng(seed).integers(K, size=10).tolist()
        shares = update.set_gradient(*cohort(kinds, effect=2.0, seed=seed))
    for name, share in shares.items():
        assert share > 0.9 if "head" in name else share < 0.6, (name, share)


def test_with_one_cluster_the_experts_never_move_and_theta_0_learns_as_without_them() -> None:
    generator, alone = (
        mixture(),
        build_generator(GeneratorConfig(name="shared"), LAYOUT, 4, initial_parameters(MODEL, 0), 0),
    )
    updates = [GeneratorUpdate(each, ServerConfig(**PLAIN)) for each in (generator, alone)]
    for seed in range(3):
        for update in updates:
            update.step(*cohort([1, 1, 1], 2.0, seed), [1, 1, 1])
    assert generator.experts.count_nonzero() == 0
    assert torch.equal(generator.theta_0, alone.theta_0)


def test_a_share_of_one_is_an_average_per_cluster() -> None:
    kinds = [0, 0, 1, 2]
    descriptors, deltas, masks = cohort(kinds, 2.0, density=1.0)
    generator = mixture()
    start = generator.theta_0.detach().clone()
    GeneratorUpdate(generator, ServerConfig(expert_memory=1e12, **PLAIN)).step(descriptors, deltas, masks, [1] * 4)
    head = next(slot for slot in LAYOUT.slots if slot.name == "head.weight")
    models = generator.generate(POINTS)
    for kind in range(K):
        own = np.mean([delta for delta, each in zip(deltas, kinds, strict=True) if each == kind], axis=0)
        assert np.allclose((models[kind] - start)[head.slice], own[head.slice], atol=1e-4)


def test_saved_sums_of_another_network_are_refused() -> None:
    update = ExpertUpdate(mixture(), memory=10.0)
    with pytest.raises(ModelError, match="another network"):
        update.load_state_dict({"between": torch.zeros(1), "within": torch.zeros(1)})


def test_experts_of_the_head_are_the_last_part_of_experts_of_everything() -> None:
    cohort_of = cohort([0, 0, 1, 2, 2], 2.0)
    everything, head = mixture(), mixture("head")
    start = next(slot.offset for slot in LAYOUT.slots if slot.name == "head.weight")
    assert head.experts.shape == (K, N - start)
    for generator in (everything, head):
        ExpertUpdate(generator, 10.0).set_gradient(*cohort_of)
    assert torch.equal(head.experts.grad, everything.experts.grad[:, start:])
    with torch.no_grad():
        head.experts.normal_(generator=torch.Generator().manual_seed(0))
    models = head.generate(POINTS)
    assert torch.equal(models[:, :start], head.theta_0[:start].expand(K, -1))
    assert torch.allclose(models[:, start:], head.theta_0[start:] + head.experts)


def test_a_network_without_a_head_is_told_to_take_experts_of_everything() -> None:
    layout = ParameterLayout.of(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ModelError, match="expert-scope='all'"):
        build_generator(GeneratorConfig(name="mixture"), layout, 4, torch.zeros(layout.size), 0)


def test_blocks_of_coordinates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors, deltas, masks = cohort([0, 0, 1, 2, 1], 2.0, seed=3)
    found = []
    for block in (N, 4):
        monkeypatch.setattr("framp_core.expert_update.BLOCK", block)
        generator = mixture()
        update = ExpertUpdate(generator, 10.0)
        shares = update.set_gradient(descriptors, deltas, masks)
        found.append((generator.experts.grad, shares, update.within.tolist()))
    assert max(LAYOUT.sizes) > 4
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-6)
    assert found[0][0].count_nonzero()


@pytest.mark.parametrize("weighting", ["coverage", "examples"])
def test_deltas_that_are_made_dense_when_needed_give_the_same_step(weighting: str) -> None:
    descriptors, deltas, masks = cohort([0, 0, 1, 2], 2.0, seed=0)
    generators, packed = [mixture(), mixture()], [PackedMask.of(mask) for mask in masks]
    kept = KeptDeltas([delta[mask] for delta, mask in zip(deltas, masks, strict=True)], packed)
    for generator, given in zip(generators, ((deltas, masks), (kept, Masks(packed))), strict=True):
        GeneratorUpdate(generator, ServerConfig(weighting=weighting, **PLAIN)).step(descriptors, *given, [1] * 4)
    assert torch.equal(generators[0].theta_0, generators[1].theta_0)
    assert torch.equal(generators[0].experts, generators[1].experts)
    assert generators[0].experts.count_nonzero()
    assert np.array_equal(np.stack(list(kept[1:])), np.stack(deltas[1:]))


def test_the_product_without_a_forward_pass_is_autograds_bit_for_bit() -> None:
    descriptors, deltas, _ = cohort([0, 0, 1, 2, 1], 2.0, seed=1)
    generator, cotangents = mixture(), torch.from_numpy(np.stack(deltas))
    with torch.no_grad():
        generator.experts.normal_(generator=torch.Generator().manual_seed(0))
    expected = Generator.vjp(generator, descriptors, cotangents)
    for given, wanted in zip(generator.vjp(descriptors, cotangents), expected, strict=True):
        assert torch.equal(given, wanted)
    assert torch.equal(generator.vjp(descriptors, cotangents, [generator.theta_0])[0], expected[0])
