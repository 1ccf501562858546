import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from framp_core.config import FrampConfig
from framp_core.data.partition import (
    ClientSplit,
    Partition,
    _cumulative,
    _drawn_class,
    _matched_counts,
    _turns,
    largest_remainder,
    make_partition,
)
from framp_core.errors import DataError

SCHEMES = ["balanced-dirichlet", "dirichlet", "classes-per-client", "iid"]


def config(**values):
    names = {"seed": "seed", "sizes": "capacity.sizes", "assignment": "capacity.assignment"}
    flat = {names.get(key, f"partition.{key.replace('_', '-')}"): value for key, value in values.items()}
    return FrampConfig.from_flat(flat)


def shuffled_labels(counts, seed):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def class_counts(labels, indices, classes):
    return np.bincount(labels[indices], minlength=classes)


def training_counts(partition, labels, classes):
    """(clients, C), validation included."""
    return np.stack([class_counts(labels, np.concatenate([c.train, c.validation]), classes) for c in partition.clients])


@st.composite
def problems(draw, schemes=SCHEMES, test_splits=("matched", "independent")):
    classes = draw(st.integers(2, 5))
    train = draw(st.lists(st.integers(4, 40), min_size=classes, max_size=classes))
    test = draw(st.lists(st.integers(2, 15), min_size=classes, max_size=classes))
    seed = draw(st.integers(0, 100))
    settings_ = config(
        seed=seed,
        clients=draw(st.integers(1, 6)),
        unseen_clients=draw(st.integers(0, 3)),
        scheme=draw(st.sampled_from(schemes)),
        alpha=draw(st.sampled_from([0.05, 0.3, 1.0, 100.0])),
        classes_per_client=draw(st.integers(1, classes)),
        test_split=draw(st.sampled_from(test_splits)),
        validation_fraction=draw(st.sampled_from([0.0, 0.1, 0.5])),
        sizes=draw(st.sampled_from(["1/64,1/16,1/4,1", "1/2,1", "1"])),
        assignment=draw(st.sampled_from(["blocks", "shuffled"])),
    )
    return settings_, shuffled_labels(train, seed), shuffled_labels(test, seed + 1), classes


def made(problem):
    try:
        return make_partition(*problem)
    except DataError:
        reject()


@settings(derandomize=True, deadline=None, max_examples=150)
@given(problems())
def test_clients_are_disjoint_complete_and_never_empty(problem):
    settings_, train_labels, test_labels, _ = problem
    partition = made(problem)
    used_train = np.concatenate([np.concatenate([c.train, c.validation]) for c in partition.clients])
    used_test = np.concatenate([c.test for c in partition.clients])
    assert len(np.unique(used_train)) == len(used_train)
    assert len(np.unique(used_test)) == len(used_test)
    assert all(len(client.train) and len(client.test) for client in partition.clients)
    fraction = settings_.partition.validation_fraction
    for client in partition.clients:
        assert len(client.validation) == int(fraction * (len(client.train) + len(client.validation)))
        for indices in (client.train, client.validation, client.test):
            assert indices.dtype == np.int64
            np.testing.assert_array_equal(indices, np.sort(indices))
    held = range(problem[3])
    if settings_.partition.scheme == "classes-per-client":
        held = np.unique(train_labels[used_train])
        if settings_.partition.test_split == "independent":
            assert set(used_test) == set(np.flatnonzero(np.isin(test_labels, np.unique(test_labels[used_test]))))
            return
    assert set(used_train) == set(np.flatnonzero(np.isin(train_labels, held)))
    assert set(used_test) == set(np.flatnonzero(np.isin(test_labels, held)))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(problems(schemes=["balanced-dirichlet", "iid"]))
def test_balanced_sizes_are_equal_within_one(problem):
    settings_, train_labels, _, classes = problem
    partition = made(problem)
    sizes = training_counts(partition, train_labels, classes).sum(axis=1)
    nodes = settings_.partition.nodes
    assert sorted(sizes) == sorted(len(train_labels) // nodes + (i < len(train_labels) % nodes) for i in range(nodes))
    if settings_.partition.test_split == "independent":
        assert np.ptp([len(client.test) for client in partition.clients]) <= 1


def slow_largest_remainder(total, weights):
    exact = [Fraction(total * int(weight), int(sum(weights))) for weight in weights]
    counts = [int(share) for share in exact]
    while sum(counts) < total:
        winner = max(range(len(counts)), key=lambda i: (exact[i] - counts[i], -i))
        counts[winner] += 1
    return counts


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 50), st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any))
def test_largest_remainder_equals_exact_fractions(total, weights):
    assert largest_remainder(total, np.array(weights)).tolist() == slow_largest_remainder(total, weights)


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3))
def test_largest_remainder_of_real_shares_is_within_one_of_them(total, weights):
    counts = largest_remainder(total, np.array(weights))
    assert counts.sum() == total
    assert np.all(np.abs(counts - total * np.array(weights) / sum(weights)) < 1 + 1e-9)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(problems(test_splits=["matched"]))
def test_matched_test_data_follow_the_training_counts(problem):
    _, train_labels, test_labels, classes = problem
    partition = made(problem)
    train = training_counts(partition, train_labels, classes).tolist()
    expected = [[0] * classes for _ in train]
    for label in range(classes):
        weights = [counts[label] for counts in train]
        if any(weights):
            shares = slow_largest_remainder(int((test_labels == label).sum()), weights)
            for client, share in enumerate(shares):
                expected[client][label] = share
    for client, own in enumerate(expected):
        if not any(own):
            _, donor, label = max(
                (expected[donor][label], -donor, -label)
                for donor in range(len(train))
                for label in range(classes)
                if train[client][label] and sum(expected[donor]) > 1
            )
            expected[-donor][-label] -= 1
            own[-label] += 1
    assert [class_counts(test_labels, c.test, classes).tolist() for c in partition.clients] == expected


def test_matched_gives_a_client_that_rounding_left_out_one_image_of_its_own_class():
    # Client 1 rounds to zero in both of its classes; client 3 has most to give, of a class that client 1 lacks.
    train, test = np.array([[20, 1, 0], [1, 1, 0], [1, 20, 0], [0, 0, 50]]), np.array([4, 4, 9])
    rounded = np.stack([largest_remainder(count, train[:, label]) for label, count in enumerate(test)], axis=1)
    assert rounded.tolist() == [[4, 0, 0], [0, 0, 0], [0, 4, 0], [0, 0, 9]]
    assert _matched_counts(train, test).tolist() == [[3, 0, 0], [1, 0, 0], [0, 4, 0], [0, 0, 9]]


def test_matched_is_refused_where_nobody_can_give():
    # Two training images each, so six test images go one by one to six of ten clients, who keep their only one.
    labels = np.zeros(20, dtype=np.int64)
    asked = config(clients=10, unseen_clients=0, scheme="iid")
    with pytest.raises(DataError, match="client-0006 and 3 other clients would have no test image"):
        make_partition(asked, labels, np.zeros(6, dtype=np.int64), 1)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(problems())
def test_same_seed_same_partition(problem):
    settings_, *rest = problem
    partition = made(problem)
    assert make_partition(settings_, *rest).digest == partition.digest


@pytest.mark.parametrize("scheme", ["balanced-dirichlet", "dirichlet", "classes-per-client", "iid"])
def test_every_seed_has_its_own_partition(scheme):
    train, test = shuffled_labels([40, 40, 40], 0), shuffled_labels([20, 20, 20], 1)
    partitions = [
        make_partition(config(clients=4, unseen_clients=1, scheme=scheme, alpha=5.0, seed=seed), train, test, 3)
        for seed in range(5)
    ]
    assert len({partition.digest for partition in partitions}) == 5


def test_digest_sees_labels_capacities_and_indices():
    train, test = shuffled_labels([20, 20], 0), shuffled_labels([10, 10], 1)
    digests = {
        make_partition(config(scheme="iid", clients=4, unseen_clients=0, **change), train, labels, 2).digest
        for change, labels in (
            ({}, test),
            ({"sizes": "1/2,1"}, test),
            ({"seed": 1}, test),
            ({"validation_fraction": 0.5}, test),
            ({}, np.roll(test, 1)),
        )
    }
    assert len(digests) == 5


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    clients=st.integers(1, 30),
    unseen=st.integers(0, 12),
    sizes=st.sampled_from(["1/64,1/16,1/4,1", "1/3,1/2,1", "1"]),
    assignment=st.sampled_from(["blocks", "shuffled"]),
)
def test_capacities_come_in_equal_shares_in_each_role(clients, unseen, sizes, assignment):
    labels = np.zeros(clients + unseen, dtype=np.int64)
    asked = config(clients=clients, unseen_clients=unseen, scheme="iid", sizes=sizes, assignment=assignment)
    partition = make_partition(asked, labels, labels, 1)
    assert [client.role for client in partition.clients] == ["train"] * clients + ["unseen"] * unseen
    assert [client.name for client in partition.clients][:2] == ["client-0000", "client-0001"][: clients + unseen]
    for role, count in (("train", clients), ("unseen", unseen)):
        own = [client.capacity for client in partition.clients if client.role == role]
        shares = [own.count(size) for size in asked.capacity.sizes]
        assert sum(shares) == count
        assert max(shares) - min(shares) <= 1
        if assignment == "blocks":
            assert own == sorted(own)


def test_shuffled_capacities_differ_from_blocks():
    labels = np.zeros(40, dtype=np.int64)
    own = {
        assignment: [
            client.capacity
            for client in make_partition(
                config(clients=40, unseen_clients=0, scheme="iid", assignment=assignment), labels, labels, 1
            ).clients
        ]
        for assignment in ("blocks", "shuffled")
    }
    assert own["blocks"] != own["shuffled"]
    assert sorted(own["blocks"]) == sorted(own["shuffled"])


def skew(**values):
    """Mean share of a client's most frequent class; 0.1 at best with ten classes."""
    train, test = shuffled_labels([200] * 10, 0), shuffled_labels([50] * 10, 1)
    partition = make_partition(config(clients=16, unseen_clients=4, **values), train, test, 10)
    counts = training_counts(partition, train, 10)
    return (counts.max(axis=1) / counts.sum(axis=1)).mean()


@pytest.mark.parametrize("scheme", ["balanced-dirichlet", "dirichlet"])
def test_small_alpha_is_skewed_large_alpha_is_not(scheme):
    assert skew(scheme=scheme, alpha=0.1) > 0.4
    assert skew(scheme=scheme, alpha=1000.0) < 0.2
    assert skew(scheme="iid") < 0.2


def test_late_clients_are_not_left_with_the_remains():
    """Drawn client by client, the last ones would hold only the few classes that the others had not exhausted."""
    train, test = shuffled_labels([200] * 10, 0), shuffled_labels([50] * 10, 1)
    held = []
    for seed in range(20):
        asked = config(seed=seed, clients=20, unseen_clients=0, alpha=0.3)
        counts = training_counts(make_partition(asked, train, test, 10), train, 10)
        held.append((counts > 0).sum(axis=1))
    early, late = np.mean(held, axis=0)[:3].mean(), np.mean(held, axis=0)[-3:].mean()
    assert abs(early - late) < 1.5


def test_classes_per_client_holds_that_many_shared_equally():
    train, test = shuffled_labels([60] * 10, 0), shuffled_labels([20] * 10, 1)
    asked = config(clients=12, unseen_clients=3, scheme="classes-per-client", classes_per_client=2)
    counts = training_counts(make_partition(asked, train, test, 10), train, 10)
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert ((counts > 0).sum(axis=0) == 3).all()  # 15 clients, 2 classes each, 10 classes
    assert set(counts[counts > 0]) == {20}


def test_independent_test_data_do_not_follow_the_training_prior():
    train, test = shuffled_labels([200] * 10, 0), shuffled_labels([100] * 10, 1)
    correlation = {}
    for split in ("matched", "independent"):
        asked = config(clients=20, unseen_clients=0, alpha=0.1, test_split=split)
        partition = make_partition(asked, train, test, 10)
        ours = training_counts(partition, train, 10).ravel()
        theirs = np.stack([class_counts(test, c.test, 10) for c in partition.clients]).ravel()
        correlation[split] = np.corrcoef(ours, theirs)[0, 1]
    assert correlation["matched"] > 0.99
    assert abs(correlation["independent"]) < 0.3


def test_the_manifest_rebuilds_the_split():
    train, test = shuffled_labels([30] * 4, 0), shuffled_labels([10] * 4, 1)
    original = make_partition(config(clients=5, unseen_clients=2, seed=3), train, test, 4)
    manifest = json.loads(json.dumps(original.manifest()))

    indices = {"train", "validation", "test"}
    clients = tuple(
        ClientSplit(
            **{key: np.array(value, dtype=np.int64) if key in indices else value for key, value in client.items()}
        )
        for client in manifest["clients"]
    )
    rebuilt = Partition(clients, manifest["data_digests"], manifest["seed"], {})
    assert rebuilt.digest == original.digest == manifest["digest"]
    for ours, theirs in zip(rebuilt.clients, original.clients, strict=True):
        np.testing.assert_array_equal(ours.train, theirs.train)
        assert Fraction(ours.capacity) == theirs.capacity

    content = {key: manifest[key] for key in ("data_digests", "clients")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["digest"]
    for part, labels in (("training data", train), ("test data", test)):
        stated = f"<i8({len(labels)},)".encode() + labels.astype("<i8").tobytes()
        assert hashlib.sha256(stated).hexdigest() == manifest["data_digests"][part]

    flat = {"seed": manifest["seed"]}
    for section in ("partition", "capacity"):
        flat |= {f"{section}.{key}": value for key, value in manifest[section].items()}
    assert make_partition(FrampConfig.from_flat(flat), train, test, 4).digest == manifest["digest"]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(problems())
def test_without_shifts_the_digest_is_that_of_the_indices_alone(problem):
    partition = made(problem)
    clients = [
        {
            "name": client.name,
            "role": client.role,
            "capacity": str(client.capacity),
            "train": client.train.tolist(),
            "validation": client.validation.tolist(),
            "test": client.test.tolist(),
        }
        for client in partition.clients
    ]
    content = {"data_digests": partition.data_digests, "clients": clients}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == partition.digest


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_clients_take_turns(sizes):
    left, expected = list(sizes), []
    while any(left):
        for client, remaining in enumerate(left):
            if remaining:
                expected.append(client)
                left[client] -= 1
    assert _turns(np.array(sizes)).tolist() == expected


@settings(derandomize=True, deadline=None, max_examples=60)
@given(problems(schemes=["balanced-dirichlet", "iid"]), st.sampled_from([0.3, 1.0, 3.0, 1000.0]))
def test_skewed_sizes_use_every_image_and_leave_nobody_without(problem, skew):
    settings_, train_labels, test_labels, classes = problem
    skewed = settings_.model_copy(update={"partition": settings_.partition.model_copy(update={"quantity_skew": skew})})
    try:
        partition = make_partition(skewed, train_labels, test_labels, classes)
    except DataError:
        assert settings_.partition.test_split == "matched" or settings_.partition.nodes > len(test_labels)
        return
    sizes = training_counts(partition, train_labels, classes).sum(axis=1)
    assert sizes.sum() == len(train_labels)
    assert sizes.min() >= 1
    assert sum(len(client.test) for client in partition.clients) == len(test_labels)


@pytest.mark.parametrize("scheme", ["balanced-dirichlet", "iid"])
def test_skewed_sizes_are_log_normal(scheme):
    train, test = shuffled_labels([4000] * 5, 0), shuffled_labels([1000] * 5, 1)
    spread = {}
    for skew in (0.0, 0.5, 1.0):
        asked = config(clients=200, unseen_clients=0, scheme=scheme, alpha=100.0, quantity_skew=skew)
        counts = training_counts(make_partition(asked, train, test, 5), train, 5)
        spread[skew] = np.log(counts.sum(axis=1)).std()
    assert spread[0.0] < 1e-12
    # The estimate from 200 clients has a standard error of 5 %; the image that everybody gets shrinks it a little.
    assert spread[0.5] == pytest.approx(0.5, rel=0.15)
    assert spread[1.0] == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("scheme", ["dirichlet", "classes-per-client"])
def test_quantity_skew_is_refused_where_sizes_follow_from_the_scheme(scheme):
    labels = shuffled_labels([50] * 4, 0)
    with pytest.raises(DataError, match=f"quantity-skew=0.5 with scheme '{scheme}'.*balanced-dirichlet"):
        make_partition(config(clients=4, scheme=scheme, quantity_skew=0.5), labels, labels, 4)


def test_shifts_are_in_the_manifest_and_rebuild_it():
    train, test = shuffled_labels([30] * 4, 0), shuffled_labels([10] * 4, 1)
    asked = config(
        clients=5,
        unseen_clients=2,
        seed=3,
        feature_shift="colour",
        feature_shift_clusters=2,
        concept_shift_clusters=3,
        quantity_skew=0.4,
    )
    manifest = json.loads(json.dumps(make_partition(asked, train, test, 4).manifest()))
    flat = {"seed": manifest["seed"]}
    for section in ("partition", "capacity"):
        flat |= {f"{section}.{key}": value for key, value in manifest[section].items()}
    assert make_partition(FrampConfig.from_flat(flat), train, test, 4).digest == manifest["digest"]
    for client in manifest["clients"]:
        assert set(client["feature_shift"]) == {
            *("cluster", "kind", "order", "gain_red", "gain_green", "gain_blue", "negative")
        }
        assert sorted(client["concept_shift"]["labels"]) == [0, 1, 2, 3]
    content = {key: manifest[key] for key in ("data_digests", "clients")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == manifest["digest"]


def test_a_client_without_images_is_refused_with_advice():
    few = np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(DataError, match=r"client-0006 and 1 other .* no training image .*fewer partition.clients"):
        make_partition(config(clients=6, unseen_clients=2, scheme="iid"), few, few, 2)
    with pytest.raises(DataError, match=r"client-\d{4} .* larger partition.alpha"):
        make_partition(config(clients=20, unseen_clients=0, scheme="dirichlet", alpha=0.01), few, few, 2)


def test_more_classes_per_client_than_classes_is_refused():
    labels = shuffled_labels([10, 10], 0)
    with pytest.raises(DataError, match="classes-per-client=3 and the data set has 2 classes"):
        make_partition(config(scheme="classes-per-client", classes_per_client=3, clients=2), labels, labels, 2)


def test_a_prior_without_mass_on_what_is_left_takes_from_what_is_left():
    labels = shuffled_labels([50, 1, 1], 0)
    asked = config(clients=4, unseen_clients=0, alpha=1e-3, test_split="independent")
    counts = training_counts(make_partition(asked, labels, labels, 3), labels, 3)
    assert counts.sum(axis=0).tolist() == [50, 1, 1]
    assert counts.sum(axis=1).tolist() == [13] * 4


# --- extreme concentrations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [8, 19])
def test_priors_near_the_smallest_float_stay_within_the_classes(seed):
    """At alpha 1e-3 what a prior leaves of its mass may be 5e-324, and a part of that rounds up to all of it."""
    labels, test_labels = np.repeat(np.arange(10), 144), np.repeat(np.arange(10), 36)
    partition = make_partition(config(seed=seed, alpha=1e-3), labels, test_labels, 10)
    assert sum(len(client.train) + len(client.validation) for client in partition.clients) == len(labels)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.sampled_from(SCHEMES),
    st.floats(-6, 6).map(lambda exponent: 10**exponent),
    st.integers(0, 10_000),
    st.integers(2, 60),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_every_concentration_gives_every_image_one_owner(scheme, alpha, seed, classes, per_class, clients):
    labels = shuffled_labels([per_class] * classes, seed)
    settings_ = config(scheme=scheme, alpha=alpha, seed=seed, clients=clients, unseen_clients=1)
    held = made((settings_, labels, labels, classes)).clients
    for pool in ([[*client.train, *client.validation] for client in held], [client.test for client in held]):
        owned = np.concatenate(pool)
        assert len(np.unique(owned)) == len(owned)
        if scheme != "classes-per-client":
            assert len(owned) == len(labels)


def test_a_class_that_is_gone_is_never_drawn_from_tiny_masses():
    tiny = 5e-324
    for masses in ([0.0, tiny, 0.0], [tiny, tiny, 0.0], [0.0, 2 * tiny, tiny, 0.0, 0.0], [1.0, tiny, 0.0]):
        (own,) = _cumulative(np.array([masses]), [1] * len(masses))
        for draw in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
            label = _drawn_class(own, draw)
            assert masses[label] > 0, (masses, draw, label)
