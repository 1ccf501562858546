import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from framp_core.config import FrampConfig
from framp_core.data import LabelledImages, load_client, load_images, load_partition, summarise_data
from framp_core.data.inspect import shares_text
from framp_core.data.shift import TRANSFORMS
from framp_core.data.transforms import Normaliser
from framp_core.errors import DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return FrampConfig.from_flat({"data.cache": str(tmp_path_factory.mktemp("cache")), "seed": 5})


def shifted(config, **values):
    return config.model_copy(update={"partition": config.partition.model_copy(update=values)})


def everything(images):
    return images.batch(np.arange(len(images)))


def test_batches_index_into_the_selection():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    labels = np.array([5, 4, 3, 2, 1, 0])
    selection = LabelledImages(images, labels, np.array([4, 0, 5]), Normaliser((0.5,), (0.25,)))
    assert len(selection) == 3
    assert selection.selected_labels.tolist() == [1, 5, 0]
    batch, batch_labels = selection.batch(np.array([2, 0, 0]))
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, 1, 1, 1)
    assert batch.flatten().tolist() == [5, 4, 4]
    assert batch_labels.dtype == torch.int64
    assert batch_labels.tolist() == [0, 1, 1]
    batch.fill_(9)
    assert images.max() == 5


def test_clients_hold_their_part_of_the_partition(config):
    nodes = config.partition.nodes
    images, partition = load_partition(config, nodes)
    clients = [load_client(config, index, nodes) for index in range(nodes)]
    for client, split in zip(clients, partition.clients, strict=True):
        assert (client.name, client.role, client.capacity) == (split.name, split.role, split.capacity)
        assert (client.classes, client.shape, client.train.normaliser) == (10, (1, 8, 8), images.normaliser)
        assert client.partition_digest == partition.digest
        np.testing.assert_array_equal(client.train.indices, split.train)
        np.testing.assert_array_equal(client.validation.indices, split.validation)
        np.testing.assert_array_equal(client.test.indices, split.test)
        pixels, labels = client.test.batch(np.arange(len(client.test)))
        np.testing.assert_array_equal(pixels, images.test_images[split.test])
        np.testing.assert_array_equal(labels, images.test_labels[split.test])
        expected = [int((images.train_labels[split.train] == label).sum()) for label in range(10)]
        assert client.class_counts().tolist() == expected
        assert client.class_counts().dtype == np.int64
    assert any(0 in client.class_counts() for client in clients)


def test_the_union_is_the_test_data_of_the_training_clients_in_random_order(config):
    nodes = config.partition.nodes
    clients = [load_client(config, index, nodes) for index in range(nodes)]
    expected = np.concatenate([client.test.indices for client in clients if client.role == "train"])
    union = clients[0].union_test
    assert sorted(union.indices) == sorted(expected)
    assert not set(union.indices) & set(np.concatenate([c.test.indices for c in clients if c.role == "unseen"]))
    for client in clients:
        np.testing.assert_array_equal(client.union_test.indices, union.indices)
    assert not np.array_equal(union.indices, np.sort(union.indices))
    assert not np.array_equal(union.indices, expected)


@pytest.mark.parametrize("clusters", [0, 3])
def test_all_images_of_a_client_go_through_the_transform_of_the_manifest(config, clusters):
    asked = shifted(config, feature_shift="mixed", feature_shift_clusters=clusters)
    images, partition = load_partition(asked, 24)
    manifest = json.loads(json.dumps(partition.manifest()))
    for index, entry in enumerate(manifest["clients"]):
        client = load_client(asked, index, 24)
        label = entry["feature_shift"]
        assert label.pop("cluster") in range(clusters or 24)
        transform = TRANSFORMS[label.pop("kind")](**label)
        for kind, pool in (("train", "train"), ("validation", "train"), ("test", "test")):
            pixels, labels = everything(getattr(client, kind))
            original = torch.from_numpy(getattr(images, f"{pool}_images")[entry[kind]])
            assert torch.equal(pixels, transform(original))
            np.testing.assert_array_equal(labels, getattr(images, f"{pool}_labels")[entry[kind]])


def test_the_union_shows_each_image_as_its_owner_sees_it(config):
    asked = shifted(config, feature_shift="mixed", concept_shift_clusters=3)
    clients = [load_client(asked, index, 24) for index in range(24)]
    own = {}
    for client in clients:
        for index, pixels, label in zip(client.test.indices, *everything(client.test), strict=True):
            own[index] = pixels, label
    union = clients[3].union_test
    plain = everything(load_client(config, 3, 24).union_test)
    pixels, labels = everything(union)
    for index, image, label in zip(union.indices, pixels, labels, strict=True):
        # Not always bit for bit: how sums are ordered may depend on the batch.
        assert (image.int() - own[index][0].int()).abs().max() <= 1
        assert label == own[index][1]
    assert (labels == torch.from_numpy(union.selected_labels)).all()
    assert not torch.equal(pixels, plain[0])
    assert 0.1 < (labels == plain[1]).float().mean() < 0.9
    first = replace(union, indices=union.indices[:40])
    assert (everything(first)[0].int() - pixels[:40].int()).abs().max() <= 1
    assert torch.equal(everything(first)[1], labels[:40])


def test_concept_shift_renames_the_classes_of_a_client_everywhere(config):
    asked = shifted(config, concept_shift_clusters=3)
    _, partition = load_partition(asked, 24)
    moved = 0
    for index, split in enumerate(partition.clients):
        plain, client = load_client(config, index, 24), load_client(asked, index, 24)
        renamed = np.array(split.concept_shift.labels)
        for kind in ("train", "validation", "test"):
            ours, theirs = getattr(client, kind), getattr(plain, kind)
            np.testing.assert_array_equal(ours.selected_labels, renamed[theirs.selected_labels])
            np.testing.assert_array_equal(everything(ours)[1], ours.selected_labels)
            assert torch.equal(everything(ours)[0], everything(theirs)[0])
        np.testing.assert_array_equal(client.class_counts()[renamed], plain.class_counts())
        moved += not np.array_equal(client.class_counts(), plain.class_counts())
    assert moved == sum(split.concept_shift.cluster > 0 for split in partition.clients) == 16


def test_without_shifts_nothing_lies_between_the_pool_and_the_batch(config):
    client = load_client(config, 2, 24)
    images, partition = load_partition(config, 24)
    assert client.train.shift is client.test.shift is client.union_test.shift is None
    np.testing.assert_array_equal(client.train.labels, images.train_labels)
    alone = load_client(shifted(config, concept_shift_clusters=1), 2, 24)
    np.testing.assert_array_equal(alone.train.labels, client.train.labels)
    assert not any("shift" in key for split in partition.clients for key in split.to_dict())


def test_the_shifts_compose_and_leave_the_split_alone(config):
    asked = shifted(config, feature_shift="rotation", feature_shift_clusters=4, concept_shift_clusters=2)
    digests = {load_client(config, 0, 24).partition_digest}
    for values in (
        {"feature_shift": "rotation", "feature_shift_clusters": 4},
        {"feature_shift": "rotation"},
        {"feature_shift": "blur"},
        {"concept_shift_clusters": 2},
        {"concept_shift_clusters": 3},
    ):
        digests.add(load_client(shifted(config, **values), 0, 24).partition_digest)
    digests.add(load_client(asked, 0, 24).partition_digest)
    assert len(digests) == 7
    plain = load_partition(config, 24)[1]
    for ours, theirs in zip(load_partition(asked, 24)[1].clients, plain.clients, strict=True):
        for kind in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(ours, kind), getattr(theirs, kind))
        assert ours.capacity == theirs.capacity


PRINT_CLIENT = """
import hashlib, sys
import numpy as np
from framp_core.config import FrampConfig
from framp_core.data import load_client
config = FrampConfig.from_flat(dict(pair.split("=") for pair in sys.argv[1:]))
client = load_client(config, 7, 24)
print(client.partition_digest)
for images in (client.train, client.union_test):
    for part in images.batch(np.arange(len(images))):
        print(hashlib.sha256(part.numpy().tobytes()).hexdigest())
"""


def test_another_process_sees_the_same_shifted_images(config):
    asked = shifted(config, feature_shift="mixed", feature_shift_clusters=5, concept_shift_clusters=2)
    flat = [f"{key}={value}" for key, value in asked.to_flat().items() if str(value) not in ("True", "False")]
    other = subprocess.run([sys.executable, "-c", PRINT_CLIENT, *flat], capture_output=True, text=True, check=True)
    client = load_client(asked, 7, 24)
    expected = [client.partition_digest]
    for images in (client.train, client.union_test):
        expected += [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in everything(images)]
    assert other.stdout.split() == expected


def test_another_number_of_nodes_keeps_the_ratio_of_unseen_clients(config):
    clients = [load_client(config, index, 12) for index in range(12)]
    assert [client.role for client in clients] == ["train"] * 10 + ["unseen"] * 2
    assert sum(len(client.train) + len(client.validation) for client in clients) == len(
        load_images(config.data, config.seed).train_labels
    )
    assert clients[0].partition_digest != load_client(config, 0, 24).partition_digest


def test_other_sections_of_the_configuration_do_not_change_the_data(config):
    other = config.model_copy(update={"rounds": config.rounds + 1})
    assert load_client(other, 3, 24).partition_digest == load_client(config, 3, 24).partition_digest


@pytest.mark.parametrize("index", [-1, 24])
def test_a_partition_id_out_of_range_is_refused(config, index):
    with pytest.raises(DataError, match=rf"partition-id {index} is outside \[0, 24\)"):
        load_client(config, index, 24)


def test_the_summary_states_what_the_clients_hold(config):
    summary = summarise_data(config)
    images = load_images(config.data, config.seed)
    clients = [load_client(config, index, config.partition.nodes) for index in range(config.partition.nodes)]
    assert summary.digest == clients[0].partition_digest
    assert summary.class_names == tuple("0123456789")
    for row, client in zip(summary.clients, clients, strict=True):
        assert (row.client, row.role, Fraction(row.capacity)) == (client.name, client.role, client.capacity)
        assert (row.train, row.validation, row.test) == (len(client.train), len(client.validation), len(client.test))
        assert row.class_counts == tuple(client.class_counts())
        held = {name: count for name, count in zip(summary.class_names, row.class_counts, strict=True) if count}
        largest = sorted(held.items(), key=lambda entry: -entry[1])[:3]
        assert row.classes == len(held)
        assert [name for name, _ in row.most_frequent] == [name for name, _ in largest]
        assert [share * row.train for _, share in row.most_frequent] == pytest.approx([count for _, count in largest])
    facts = {row["fact"]: row["value"] for row in summary.facts}
    counts = np.bincount(images.train_labels)
    assert facts["data set"] == "digits"
    assert facts["image"] == "8x8, grey"
    assert facts["train images"] == f"{len(images.train_labels)} ({counts.min()} to {counts.max()} per class)"
    assert facts["channel mean"] == f"{(images.train_images / 255).mean():.4f}"
    assert not any("shift" in fact or "skew" in fact for fact in facts)
    assert {row.feature_shift + row.concept_shift for row in summary.clients} == {""}


def test_the_summary_states_the_shifts(config):
    values = {"feature_shift": "rotation", "feature_shift_clusters": 4, "concept_shift_clusters": 2}
    asked = shifted(config, **values, quantity_skew=0.5)
    summary = summarise_data(asked)
    facts = {row["fact"]: row["value"] for row in summary.facts}
    assert facts["feature shift"] == "rotation, 4 clusters"
    assert facts["feature cluster 1"] == "rotation, degrees 90.0; 6 clients"
    splits = load_partition(asked, 24)[1].clients
    (renamed,) = {split.concept_shift.labels for split in splits if split.concept_shift.cluster == 1}
    moved = sum(renamed[label] != label for label in range(10))
    assert facts["concept shift"] == "2 clusters"
    assert facts["concept cluster 0"] == "0 of 10 labels moved; 12 clients"
    assert facts["concept cluster 1"] == f"{moved} of 10 labels moved; 12 clients"
    sizes = [len(split.train) + len(split.validation) for split in splits]
    assert facts["quantity skew"] == f"0.5 ({min(sizes)} to {max(sizes)} images per client)"
    for index, (row, split) in enumerate(zip(summary.clients, splits, strict=True)):
        cluster = split.feature_shift.cluster
        assert row.feature_shift == f"cluster {cluster}: rotation, degrees {90.0 * cluster}"
        assert row.concept_shift.startswith(f"cluster {split.concept_shift.cluster}: ")
        assert row.class_counts == tuple(load_client(asked, index, 24).class_counts())
    own = summarise_data(shifted(config, feature_shift="blur"))
    assert {"fact": "feature shift", "value": "blur, one per client"} in own.facts
    assert own.clients[3].feature_shift.startswith("cluster 3: blur, sigma 0.0")


@pytest.mark.parametrize(
    ("shares", "width", "text"),
    [
        ([("7", 0.45), ("1", 0.3), ("3", 0.12)], 22, "7 45 %, 1 30 %, 3 12 %"),
        ([("automobile", 1.0)], 80, "automobile 100 %"),
        ([("automobile", 0.5), ("truck", 0.004), ("cat", 0.2)], 30, "automobile 50 %, truck <1 %, cat 20 %"),
        ([], 22, ""),
    ],
)  # fmt: skip
def test_shares_fit_on_a_line(shares, width, text):
    assert shares_text(shares, max(width, len(text))) == text
    cut = shares_text(shares, width)
    assert len(cut) <= width
    assert [part.split()[1:] for part in cut.split(", ")] == [part.split()[1:] for part in text.split(", ")]


def test_names_are_cut_from_the_longest_and_not_below_four_characters():
    shares = [("automobile", 0.5), ("truck", 0.3), ("cat", 0.2)]
    assert shares_text(shares, 34) == "automobile 50 %, truck 30 %, cat 20 %".replace("automobile", "automo…")
    assert shares_text(shares, 30) == "aut… 50 %, tru… 30 %, cat 20 %"
    assert shares_text(shares, 29) == "automobile 50 %, truck 30 %"
    assert shares_text(shares, 1) == "aut… 50 %"


READING = {
    "batch statistics": {"model.normalisation": "batch-statistics"},
    "fixed batches": {"local.reshuffle": False},
}


@pytest.mark.parametrize("values", READING.values(), ids=READING)
def test_where_neighbours_matter_images_are_read_in_one_random_order(config, values):
    asked = FrampConfig.from_flat({**config.to_flat(), **values})
    plain, own, again = load_client(config, 3, 24), load_client(asked, 3, 24), load_client(asked, 3, 24)
    for use in ("train", "validation", "test"):
        before, after = getattr(plain, use).indices, getattr(own, use).indices
        np.testing.assert_array_equal(before, np.sort(before))
        np.testing.assert_array_equal(np.sort(after), before)
        assert len(after) < 3 or not np.array_equal(after, before)
        np.testing.assert_array_equal(after, getattr(again, use).indices)
    np.testing.assert_array_equal(own.union_test.indices, plain.union_test.indices)
    assert own.partition_digest == plain.partition_digest


@pytest.mark.parametrize("values", [{}, *READING.values()], ids=["plain", *READING])
def test_the_union_can_be_client_after_client(config, values):
    asked = FrampConfig.from_flat({**config.to_flat(), **values, "evaluation.union-by-client": True})
    clients = [load_client(asked, index, 24) for index in range(24)]
    expected = np.concatenate([client.test.indices for client in clients if client.role == "train"])
    for client in clients:
        np.testing.assert_array_equal(client.union_test.indices, expected)
