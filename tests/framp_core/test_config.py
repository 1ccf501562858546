import os
import tomllib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framp_core.config import FrampConfig
from framp_core.config_values import Scalar, parse_capacity, parse_override
from framp_core.data.partition import make_partition
from framp_core.errors import ConfigError

ROOT = Path(__file__).parents[2]
GRAPH = {"data.name": "cora", "model.name": "gcn", "partition.scheme": "metis", "graph.neighbours": "15,10,5"}
PRESETS = sorted((ROOT / "presets").glob("*.toml"))


def test_flat_keys_and_toml_round_trip(tmp_path: Path) -> None:
    config = FrampConfig.from_flat({"seed": 7, "capacity.sizes": "1/8,1", "model.widths": "4,8"})
    assert FrampConfig.from_flat(config.to_flat()) == config
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert FrampConfig.load(file) == config
    assert config.capacity.sizes == (Fraction(1, 8), Fraction(1))


def test_flat_values_are_what_flower_takes() -> None:
    assert {type(value) for value in FrampConfig().to_flat().values()} <= {str, int, float, bool}


def test_pyproject_declares_exactly_the_defaults() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == FrampConfig().to_nested()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_differ_from_each_other(path: Path) -> None:
    others = {FrampConfig.load(other).digest() for other in PRESETS if other != path}
    assert FrampConfig.load(path).digest() not in others


def test_digits_preset_is_the_default() -> None:
    preset, default = FrampConfig.load(ROOT / "presets" / "digits.toml"), FrampConfig()
    assert preset.model_copy(update={"engine": default.engine}) == default


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_paper_presets_follow_fiarse(name: str, classes: int) -> None:
    config = FrampConfig.load(ROOT / "presets" / f"paper-{name}.toml")
    assert config.data.name == name
    protocol = (config.partition.clients, config.server.clients_per_round, config.rounds, config.local.steps)
    assert protocol == (100, 10, 800, 100)
    assert (config.local.batch_size, config.local.learning_rate, config.partition.alpha) == (20, 0.1, 0.3)
    assert (config.local.momentum, config.local.weight_decay, config.data.augment) == (0, 0, True)
    assert (config.model.name, config.model.widths) == ("resnet18", (64, 128, 256, 512))
    assert (config.partition.scheme, config.partition.test_split) == ("balanced-dirichlet", "independent")
    assert (config.partition.unseen_clients, config.partition.validation_fraction) == (0, 0)

    train, test = (np.repeat(np.arange(classes), images // classes) for images in (50_000, 10_000))
    clients = make_partition(config, train, test, classes).clients
    assert {(len(own.train), len(own.validation), len(own.test)) for own in clients} == {(500, 0, 100)}
    sizes = (Fraction(1, 64), Fraction(1, 16), Fraction(1, 4), Fraction(1))
    assert Counter(own.capacity for own in clients) == dict.fromkeys(sizes, 25)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server.client-per-round": 3}, "did you mean 'server.clients-per-round'"),
        ({"clients": 3}, "did you mean 'partition.clients'"),
        ({"capacity.sizes": "0,1"}, "outside (0, 1]"),
        ({"capacity.sizes": "1.5"}, "outside (0, 1]"),
        ({"capacity.sizes": "small"}, "not a capacity"),
        ({"capacity.sizes": ""}, "capacity"),
        ({"rounds": "two"}, "rounds"),
        ({"rounds": True}, "expected a int"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"data.augment": "yes"}, "true or false"),
        ({"data.root": "some/folder"}, "absolute"),
        ({"local.learning-rate": float("nan")}, "finite"),
        ({"data.name": "mnist"}, "image-folder"),
        ({"server.weighting": "uniform"}, "such as 'modulated'"),
        ({"server.shared-optimizer": "adam"}, "server.shared-optimizer='sgd'"),
        ({"local.optimizer": "adam", "local.momentum": 0.9}, "set momentum to 0"),
        ({"data.name": "cora"}, "is a graph, which model.name='conv' does not fit; choose gcn, sage, gat"),
        ({"data.name": "cora", "model.name": "gat"}, "'balanced-dirichlet' does not fit; choose metis, louvain"),
        ({"model.name": "gcn"}, "is images, which model.name='gcn' does not fit; choose conv"),
        ({"partition.scheme": "metis"}, "choose balanced-dirichlet"),
        ({"graph.train-share": 0.7, "graph.validation-share": 0.3}, "leave no test nodes"),
        ({"graph.neighbours": ""}, "neighbours"),
        ({**GRAPH, "graph.neighbours": "5"}, "graph.neighbours='5' and the model has 3 layers"),
        ({**GRAPH, "partition.alpha": 0.1}, "partition.alpha=0.1 means nothing"),
        ({**GRAPH, "partition.feature-shift": "rotation"}, "is a graph, for which partition.feature-shift='rotation'"),
        ({**GRAPH, "partition.validation-fraction": 0.0}, "validation-fraction=0.0 means nothing; leave it at 0.1"),
        ({**GRAPH, "data.augment": True}, "data.augment=True means nothing"),
        ({"partition.overlap": 5}, "is images, for which partition.overlap=5 means nothing"),
        ({"graph.hops": 1}, "graph.hops=1 means nothing"),
        (
            {"data.name": "own-images", "partition.alpha": 0.1},
            "nobody divides, for which partition.alpha=0.1 means nothing",
        ),
        ({"server.minimum-replies": 12, "server.over-sampling": 0.1}, "a round asks 11 clients"),
        ({"defence.trimmed-share": 0.5}, "less than 0.5"),
    ],
)
def test_bad_values_are_explained(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FrampConfig.from_flat(values)
    assert words in str(caught.value)


def test_hyphens_and_underscores_are_the_same_key() -> None:
    assert FrampConfig.from_flat({"local.learning_rate": "0.5"}) == FrampConfig.from_flat({"local.learning-rate": 0.5})


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "preset.toml"
    file.write_text("rounds = 5\n[local]\nsteps = 3\n")
    config = FrampConfig.load(file, {"rounds": "9"})
    assert (config.rounds, config.local.steps) == (9, 3)


def test_missing_file_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"digits\.toml"):
        FrampConfig.load(ROOT / "presets" / "digit.toml")


def test_broken_toml_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("rounds = = 3")
    with pytest.raises(ConfigError, match="TOML"):
        FrampConfig.load(file)


def test_override_needs_an_equals_sign() -> None:
    assert parse_override("a.b=c=d") == ("a.b", "c=d")
    with pytest.raises(ConfigError, match="key=value"):
        parse_override("rounds")


@given(st.fractions(min_value=0, max_value=2))
def test_capacity_is_accepted_exactly_in_its_range(value: Fraction) -> None:
    if 0 < value <= 1:
        assert parse_capacity(str(value)) == value
    else:
        with pytest.raises(ConfigError):
            parse_capacity(str(value))


def test_digest_ignores_where_and_how_but_not_what(tmp_path: Path) -> None:
    base = FrampConfig()
    where: dict[str, Scalar] = {"output.folder": str(tmp_path), "data.root": str(tmp_path)}
    same = FrampConfig.from_flat({"engine.workers": 0, "engine.ray-address": "head:6379", **where})
    assert same.digest() == base.digest()
    assert FrampConfig.from_flat({"seed": 1}).digest() != base.digest()


@pytest.mark.parametrize("address", ["head", ":6379", "head:", "head:0", "head:65536", "ray://head:10001", "head:x"])
def test_a_ray_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        FrampConfig.from_flat({"engine.ray-address": address})


def test_a_cluster_decides_on_its_own_number_of_actors() -> None:
    with pytest.raises(ConfigError, match="num-cpus"):
        FrampConfig.from_flat({"engine.ray-address": "head:6379", "engine.workers": 2})


@given(st.integers(1, 200))
def test_partition_follows_the_number_of_nodes(nodes: int) -> None:
    partition = FrampConfig().partition.for_nodes(nodes)
    assert partition.nodes == nodes
    assert partition.clients >= 1
    assert abs(partition.unseen_clients - nodes * 4 / 24) <= 0.5


def test_prior_strengths_are_a_sorted_set_and_may_be_empty() -> None:
    for text, expected in (("1,0,0.25,1", (0.0, 0.25, 1.0)), ("", ()), ("0.1234567", (0.1234567,))):
        config = FrampConfig.from_flat({"evaluation.prior-strengths": text})
        assert config.evaluation.prior_strengths == expected
        assert FrampConfig.from_flat(config.to_flat()) == config
    for wrong in ("-1", "0,much"):
        with pytest.raises(ConfigError, match="prior-strengths"):
            FrampConfig.from_flat({"evaluation.prior-strengths": wrong})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffrounds = 7", {"rounds": 7}),
        ("[capacity]\nsizes = 0.25", {"capacity.sizes": "1/4"}),
        ("[capacity]\nsizes = [0.25, '1/2', 1]", {"capacity.sizes": "1/4,1/2,1"}),
        ("[capacity]\nsizes = '[0.25, 1]'", {"capacity.sizes": "1/4,1"}),
        ("[capacity]\nsizes = ' [\"1/4\", 1] '", {"capacity.sizes": "1/4,1"}),
        ("[model]\nwidths = 8", {"model.widths": "8"}),
        ("[model]\nwidths = '[8,16]'", {"model.widths": "8,16"}),
        ("[model]\nwidths = [8, 16]", {"model.widths": "8,16"}),
        ("[evaluation]\nprior-strengths = 0.5", {"evaluation.prior-strengths": "0.5"}),
        ("[evaluation]\nprior-strengths = []", {"evaluation.prior-strengths": ""}),
        ("[evaluation]\nprior-strengths = '[]'", {"evaluation.prior-strengths": ""}),
        ("[data]\naugment = 'True'", {"data.augment": True}),
        ("[evaluation]\nunion-prior-strength = -0.0", {}),
    ],
)
def test_what_is_meant_is_taken(text: str, expected: dict[str, Scalar], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    assert FrampConfig.load(file).digest() == FrampConfig.from_flat(expected).digest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity.sizes": "16"}, "capacity.sizes='16': capacity 16 is outside (0, 1]; it is the fraction of the"),
        ({"capacity.sizes": 16}, "capacity.sizes=16: capacity 16 is outside (0, 1]; it is the fraction of the"),
        ({"capacity.sizes": []}, "capacity.sizes=[]: is empty; give one value or more"),
        ({"model.widths": [True]}, "model.widths=[True]: true and false are no numbers; write"),
        ({"model.widths": "0"}, "model.widths='0': Input should be greater"),
        ({"data.augment": "yes"}, "data.augment='yes': write true or false"),
        ({"rounds": "x" * 10**6}, "rounds='xxx"),
        (
            {"output.folder": "/w\udcff"},
            "output.folder='/w\\udcff': is not UTF-8, in which the configuration is kept; rename",
        ),
    ],
)
def test_one_mistake_has_one_short_message(values: dict[str, Scalar], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FrampConfig.from_flat(values)
    assert str(caught.value).startswith(message)
    assert ";" not in str(caught.value).removeprefix(message)
    assert len(str(caught.value)) < 250


FLOATS = sorted(key for key, value in FrampConfig().to_flat().items() if isinstance(value, float))


@given(
    st.sampled_from([*FLOATS, "evaluation.prior-strengths"]),
    st.sampled_from(["1.7e308", "1e300", "3.5e38", "1e-39", "5e-324", "nan", "inf", "-inf", "-1e300"]),
)
def test_no_number_is_taken_that_training_cannot_hold(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}="):
        FrampConfig.from_flat({key: value})
    assert FrampConfig.from_flat({"partition.alpha": "3.4e38", "local.learning-rate": 2.0**-126})


@pytest.mark.parametrize("value", [2**63, -(2**64), "9" * 400])
def test_no_integer_is_taken_that_flower_cannot_send(value: Scalar) -> None:
    for key in ("seed", "rounds"):
        with pytest.raises(ConfigError, match=f"{key}="):
            FrampConfig.from_flat({key: value})
    assert FrampConfig.from_flat({"seed": 2**63 - 1}).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rounds = 3".encode("utf-16"), "UTF-16"),
        ("rounds = 3".encode("utf-16-be"), "UTF-16"),
        ("seed = 1\ndata.root = '/é'".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
        (b"a = " + b"[" * 50_000, "nested too deeply"),
        (b".".join([b"a"] * 900) + b" = 1", "lies in more tables"),
        (b".".join([b"a"] * 3000) + b" = 1", "a line has more than 1,000 dots"),
        (b"seed = " + b"9" * 5000, "cannot be read as TOML"),
        (b"#" * 2**21, "2,097,152 bytes"),
        (b"[local]\nbatch-size = 3\nbatch_size = 4", "local.batch-size is given twice"),
        (b"\x89PNG\r\n\x1a\n\0\0", "no text at all"),
    ],
)
def test_what_is_no_configuration_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        FrampConfig.load(file)
    assert words in str(caught.value)


def test_pipes_devices_and_folders_are_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "nan.toml").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    for path, words in (
        (tmp_path / "pipe.toml", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path / "run", f"framp run --resume {tmp_path / 'run'}"),
        (tmp_path, f"is a folder; give a configuration file; in {str(tmp_path)!r} lie nan.toml, pipe.toml"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(ConfigError) as caught:
            FrampConfig.load(path)
        assert words in str(caught.value)


def test_a_missing_file_names_the_nearest_or_few(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"setting-{number:02}.toml").touch()
    for name, words in (("seting-07.toml", "; did you mean '"), ("zzz.toml", "setting-02.toml and 47 more")):
        with pytest.raises(ConfigError) as caught:
            FrampConfig.load(tmp_path / name)
        assert words in str(caught.value)
        assert str(caught.value).count("setting-") <= 3
