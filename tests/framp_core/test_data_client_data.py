from fractions import Fraction

import numpy as np
import pytest
import torch

from framp_core.config import FrampConfig
from framp_core.data import LabelledImages, load_client, load_images, load_partition, summarise_data
from framp_core.data.inspect import shares_text
from framp_core.errors import DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return FrampConfig.from_flat({"data.cache": str(tmp_path_factory.mktemp("cache")), "seed": 5})


def test_batches_index_into_the_selection():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    labels = np.array([5, 4, 3, 2, 1, 0])
    selection = LabelledImages(images, labels, np.array([4, 0, 5]))
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
        assert (client.classes, client.shape, client.normaliser) == (10, (1, 8, 8), images.normaliser)
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
