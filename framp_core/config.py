"""Configuration of a run: frozen models, TOML presets, and the flat dotted keys of Flower's run config.

The defaults are the ``digits`` preset; a preset file holds what differs. Files and flat keys are written with
hyphens (``server.clients-per-round``) and use only strings, integers, floats and booleans, which is all that
Flower's run config takes; lists are comma-separated strings (``"1/64,1/16,1/4,1"``).
"""

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from framp_core.config_values import (
    Capacities,
    Counts,
    Scalar,
    Strengths,
    check_boolean,
    check_value,
    explain,
    flatten,
    hyphenated,
    read_toml,
    unknown_key,
)
from framp_core.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: object) -> object:
        check_value(value)
        return value + 0.0 if isinstance(value, float) else value  # Makes -0.0 the zero that it is.


GRAPH_DATA = ("graph-digits", "cora", "citeseer", "pubmed", "ogbn-arxiv", "graph-file")
"""Data sets whose examples are the nodes of a graph."""
GRAPH_MODELS = ("gcn", "sage", "gat")
"""Architectures that read a graph."""
_OF_IMAGES = (
    *("data.image_size", "data.normalisation", "data.augment"),
    *("partition.alpha", "partition.classes_per_client", "partition.test_split", "partition.validation_fraction"),
    *("partition.feature_shift", "partition.feature_shift_clusters", "partition.quantity_skew"),
    *("evaluation.union_by_client", "evaluation.augment"),
)
"""Settings without a meaning for graphs, whose parts follow from their edges and whose nodes are not transformed."""
_OF_GRAPHS = (
    *("graph.undirected", "graph.largest_component", "graph.split", "graph.train_share", "graph.validation_share"),
    *("graph.full_batch_nodes", "graph.neighbours", "graph.hops", "partition.overlap", "model.dropout"),
)
"""Settings without a meaning for images."""
_OF_DIVIDED = (
    *("partition.scheme", "partition.alpha", "partition.classes_per_client", "partition.test_split"),
    *("partition.feature_shift", "partition.feature_shift_clusters", "partition.concept_shift_clusters"),
    *("partition.quantity_skew", "evaluation.union_by_client"),
)
"""Settings without a meaning for images that lie on the devices and are divided by nobody."""
PLACES = ("data.root", "data.cache")
"""Keys that say where data lie, which never change the numbers."""


class DataConfig(_Section):
    """Which images or which graph, from where."""

    name: Literal[
        "digits",
        "cifar10",
        "cifar100",
        "image-folder",
        "own-images",
        "graph-digits",
        "cora",
        "citeseer",
        "pubmed",
        "ogbn-arxiv",
        "graph-file",
    ] = Field(
        "digits",
        description="digits and graph-digits are embedded in scikit-learn and need no download; own-images: an image "
        "folder on each device, whose images are all its own",
    )
    root: str = Field(
        "", description="absolute folder of the data set, or for graph-file the file; unused for the digits"
    )
    image_size: int = Field(
        0, ge=0, le=8192, description="images are resized to this side, in pixels; 0 keeps their own size"
    )
    normalisation: Literal["measured", "published"] = Field(
        "measured", description="mean and deviation of the training pixels, or the constants of CIFAR recipes"
    )
    augment: bool = Field(False, description="random crop (padding of an eighth) and horizontal flip")
    cache: str = Field("", description="absolute folder of decoded data; empty: the user's cache folder")

    @property
    def title(self) -> str:
        """What reports call the data: the data set's name, or that of the user's own file."""
        return Path(self.root).stem if self.name == "graph-file" and self.root else self.name


class GraphConfig(_Section):
    """How a graph is read, split and sampled; for data sets whose examples are nodes."""

    undirected: bool = Field(True, description="add the reverse of every edge; false keeps the directions given")
    largest_component: bool = Field(False, description="keep the largest connected component alone (FedSheafHN)")
    split: Literal["random", "file"] = Field(
        "random",
        description="who trains, validates and tests: nodes drawn at random by the shares, or the data set's own split "
        "(masks of a graph-file, public splits of Planetoid and ogbn-arxiv)",
    )
    train_share: float = Field(0.4, gt=0, lt=1, description="share of the nodes that are training data")
    validation_share: float = Field(0.3, ge=0, lt=1, description="share for validation; the rest is test data")
    full_batch_nodes: int = Field(
        20_000,
        ge=1,
        description="a client trains on all its training nodes at each step if it holds at most so many nodes, "
        "else on local.batch-size of them with sampled neighbours",
    )
    neighbours: Counts = Field(
        (15, 10), description="neighbours sampled per node and layer, from the training nodes outwards"
    )
    hops: int = Field(2, ge=0, description="steps of parameter-free propagation before descriptors look at features")

    @model_validator(mode="after")
    def _shares_are_of_the_random_split(self) -> Self:
        for name in ("train_share", "validation_share") if self.split == "file" else ():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"graph.split='file' takes the data set's own split, for which "
                    f"graph.{name.replace('_', '-')}={value:g} means nothing; leave it at {default:g}"
                )
        return self

    @model_validator(mode="after")
    def _some_are_tested(self) -> Self:
        if self.train_share + self.validation_share >= 1:
            raise ValueError(
                f"graph.train-share={self.train_share:g} and graph.validation-share={self.validation_share:g} leave "
                f"no test nodes; their sum must be below 1"
            )
        return self


class PartitionConfig(_Section):
    """Who holds which images or nodes (DESIGN section 5)."""

    clients: int = Field(20, ge=1, description="clients that train")
    unseen_clients: int = Field(4, ge=0, description="further clients that are evaluated and never train")
    scheme: Literal["balanced-dirichlet", "dirichlet", "classes-per-client", "iid", "metis", "louvain"] = Field(
        "balanced-dirichlet", description="metis and louvain cut graphs, the others deal out images"
    )
    overlap: int = Field(
        1, ge=1, description="clients that share a part of the graph, each with a random half of its nodes; 1: disjoint"
    )
    alpha: float = Field(0.3, gt=0, description="concentration of the Dirichlet prior; smaller is more skewed")
    classes_per_client: int = Field(2, ge=1, description="for scheme classes-per-client")
    test_split: Literal["matched", "independent"] = Field(
        "matched", description="test labels follow the client's training labels, or a new draw of the scheme"
    )
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of a client's training data")
    feature_shift: Literal["none", "rotation", "colour", "contrast", "blur", "resolution", "mixed"] = Field(
        "none", description="one fixed transform of all images of a client or cluster; mixed: the kinds in turn"
    )
    feature_shift_clusters: int = Field(
        0, ge=0, description="clusters that share a transform; 0: each client has its own"
    )
    concept_shift_clusters: int = Field(
        0, ge=0, description="clusters with a permutation of the labels each, the first with none; 0: off"
    )
    quantity_skew: float = Field(
        0.0, ge=0, description="standard deviation of the log-normal client sizes (balanced-dirichlet, iid); 0: off"
    )

    @property
    def nodes(self) -> int:
        """Number of simulated nodes: training and unseen clients together."""
        return self.clients + self.unseen_clients

    def for_nodes(self, nodes: int) -> Self:
        """The same partition over another number of nodes, in the same ratio of unseen clients."""
        if nodes == self.nodes:
            return self
        unseen = min(round(nodes * self.unseen_clients / self.nodes), nodes - 1)
        return self.model_copy(update={"clients": nodes - unseen, "unseen_clients": unseen})


class CapacityConfig(_Section):
    """Which fraction gamma of the maskable weights each client can hold."""

    sizes: Capacities = Field(
        (Fraction(1, 64), Fraction(1, 16), Fraction(1, 4), Fraction(1)), description="gamma in (0, 1]"
    )
    assignment: Literal["blocks", "shuffled"] = Field(
        "blocks", description="equal shares of the sizes, by client index or shuffled with the seed"
    )


class ModelConfig(_Section):
    """Client architecture."""

    name: Literal["conv", "resnet18", "mlp", "gcn", "sage", "gat"] = Field(
        "conv", description="gcn, sage and gat read a graph and have one layer per width"
    )
    widths: Counts = (16, 32, 64)
    normalisation: Literal["group", "batch-statistics", "none"] = Field(
        "group",
        description="group: GroupNorm over the channels of an image or a node; batch-statistics: batch norm by the "
        "batch at hand, in training and in test (FIARSE), images only; none: no normalisation, as in every mlp",
    )
    groups: int = Field(8, ge=1, description="groups of GroupNorm")
    heads: int = Field(8, ge=1, description="attention heads of a layer (gat)")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the inputs of each layer and of the head that training drops (graphs)"
    )
    exits: int = Field(
        1,
        ge=0,
        description="the last so many stages end in a classifier (ScaleFL); 1: the head alone, 0: every stage",
    )
    initialisation: Literal["he", "uniform"] = Field("he", description="uniform: PyTorch's own, biases too (FIARSE)")
    slim_width: Literal["root", "budget"] = Field(
        "root",
        description="width of a slim network (HeteroFL, FedRolex): the root of the capacity, as published, or what "
        "holds nearest to capacity x n weights; the root holds several times that where inputs are wide",
    )
    maskable_head_bias: bool = Field(False, description="rank and mask the head's bias like a weight (FIARSE)")

    @model_validator(mode="after")
    def _fits_the_architecture(self) -> Self:
        if self.dropout and self.name not in GRAPH_MODELS:
            raise ValueError(
                f"model.dropout={self.dropout:g} is for graphs, and model.name={self.name!r} reads images; set it to 0"
            )
        if self.normalisation == "batch-statistics" and self.name in GRAPH_MODELS:
            raise ValueError(
                f"model.normalisation='batch-statistics' is for images, and model.name={self.name!r} reads a graph, "
                f"whose nodes would then depend on which others are sampled; use 'group' or 'none'"
            )
        return self

    @property
    def batch_statistics(self) -> bool:
        """Whether the result for an image depends on the images beside it; an mlp has no normalisation."""
        return self.normalisation == "batch-statistics" and self.name in ("conv", "resnet18")

    @field_validator("normalisation", mode="before")
    @classmethod
    def _no_running_statistics(cls, value: object) -> object:
        if value == "batch":
            reason = "running statistics of different submodels describe different activations and do not mix"
            raise ValueError(f"{reason}; use 'group' or 'batch-statistics'")
        return value


class DescriptorConfig(_Section):
    """Compact summary v_i of a client's data."""

    name: Literal["class-moments", "moments", "histogram", "warmup"] = Field(
        "class-moments",
        description="class shares and class means of a frozen encoder's features; class histogram and moments of its "
        "features over all classes, and degrees in a graph; the histogram alone; mean penultimate features after local "
        "warm-up",
    )
    encoder_width: int = Field(
        32,
        ge=1,
        description="w, features of the frozen encoder; class-moments has C (1 + w) floats, moments C + 2 w (+ 4)",
    )
    warmup_steps: int = Field(20, ge=1, description="local steps before the features are averaged (warmup)")


class GeneratorConfig(_Section):
    """h(v; phi): from descriptor to full model (DESIGN section 3)."""

    name: Literal["mixture", "modulated", "low-rank", "chunked", "dense", "shared"] = "mixture"
    hidden: int = Field(64, ge=1, description="hidden units of the descriptor network")
    experts: int = Field(4, ge=1, description="K, experts B_k (mixture)")
    expert_scope: Literal["head", "all"] = Field(
        "head", description="what the experts cover (mixture): the head, or the whole network, each as large as it"
    )
    rank: int = Field(1, ge=1, description="rank of the generated factors (low-rank)")
    chunk_size: int = Field(3072, ge=1, description="parameters per generated chunk (chunked)")
    chunk_embedding: int = Field(64, ge=1, description="floats that identify a chunk (chunked)")
    max_parameters: int = Field(
        100_000_000, ge=1, description="larger generators are refused; bounds memory at 4 bytes each and more"
    )


class ExtractionConfig(_Section):
    """How a full model is cut to a client's capacity."""

    name: Literal["global-top-k", "layer-top-k", "full"] = "global-top-k"
    fan_in_exponent: float = Field(
        0.0,
        ge=0,
        le=1,
        description="score = |theta| * fan_in ** exponent; 0.5 undoes the initialisation's scale",
    )


class LocalConfig(_Section):
    """Training on the client."""

    steps: int = Field(10, ge=1, description="K, local steps per round")
    batch_size: int = Field(20, ge=1, description="examples per step; see graph.full-batch-nodes for nodes")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="its state lasts for a round")
    reshuffle: bool = Field(True, description="a new order in every epoch; false: always the same batches (FIARSE)")
    learning_rate: float = Field(0.1, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(
        0.0, ge=0, description="largest L2 norm of the gradient of a step (HeteroFL's and FedRolex's code: 1); 0: off"
    )
    prior_strength: float = Field(
        1.0, ge=0, description="tau of the logit adjustment by the client's class prior in the loss; 0: off"
    )
    absent_class_prior: float = Field(1e-4, gt=0, lt=1, description="prior of a class that the client lacks")
    alignment_weight: float = Field(0.1, ge=0, description="lambda of the prototype-alignment loss; 0: off")
    alignment_distance: Literal["squared-l2", "cosine"] = "squared-l2"
    nested_share: float = Field(
        0.5, ge=0, le=1, description="share of the steps that train a smaller submodel inside the own one; 0: off"
    )
    masked_cross_entropy: bool = Field(False, description="HeteroFL: logits of classes the client lacks are set to 0")
    mask: Literal["fixed", "following", "threshold-controlled"] = Field(
        "fixed",
        description="while a client trains: as received; or after the weights, which drop out below the round's "
        "threshold (FIARSE's released code); or also differentiated (FIARSE's paper: gradient scaled by 1 to 1.5)",
    )
    distillation_weight: float = Field(
        0.0, ge=0, description="ScaleFL: gamma of the distillation from the deepest exit into the earlier ones; 0: off"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of convolutions and matrix products; weights and gradients stay float32"
    )
    threads: int = Field(1, ge=1, description="torch threads per client; part of the numbers, not of the machine")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> Self:
        if self.optimizer == "adam" and self.momentum:
            raise ValueError(
                f"local.momentum={self.momentum:g} is SGD's and local.optimizer is 'adam'; set momentum to 0"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> Self:
        if self.nested_share and self.mask != "fixed":
            raise ValueError(
                f"local.nested-share={self.nested_share:g} and local.mask={self.mask!r} exclude each other; "
                f"set local.nested-share to 0 or local.mask to 'fixed'"
            )
        return self


class ServerConfig(_Section):
    """Sampling, update of the generator, patience."""

    clients_per_round: int = Field(10, ge=1)
    over_sampling: float = Field(
        0.0,
        ge=0,
        description="share of clients asked beyond those, so that a round has enough although some fail; it ends once "
        "clients-per-round have answered",
    )
    shared_optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="for the shared vector theta_0 and a mixture's experts"
    )
    shared_learning_rate: float = Field(1.0, gt=0)
    shared_momentum: float = Field(0.5, ge=0, lt=1)
    personal_optimizer: Literal["sgd", "adam"] = Field("adam", description="for all other generator parameters")
    personal_learning_rate: float = Field(1e-3, gt=0)
    weighting: Literal["coverage", "non-zero", "uniform", "examples"] = Field(
        "coverage",
        description="mean over the clients that hold a coordinate, that moved it (FIARSE's code), all, or by examples",
    )
    expert_memory: float = Field(
        10.0, gt=0, description="rounds over which a difference between the clusters of a mixture lasts"
    )
    averaging_decay: float = Field(0.8, ge=0, lt=1, description="averaged generator for evaluation; 0: off")
    prototype_decay: float = Field(0.5, ge=0, lt=1, description="moving average of prototypes over rounds; 0: off")
    minimum_replies: int = Field(1, ge=1, description="valid replies below which a round changes nothing")
    empty_rounds: int = Field(5, ge=1, description="rounds in a row that may learn nothing before the run fails")
    round_deadline: float = Field(600.0, gt=0, description="seconds to wait for the replies of a round")
    discovery_deadline: float = Field(120.0, gt=0, description="seconds to wait for clients at the start")

    @property
    def clients_asked(self) -> int:
        """Clients that a round asks to train, over-sampling included."""
        return round(self.clients_per_round * (1 + self.over_sampling))

    @model_validator(mode="after")
    def _can_reach_the_minimum(self) -> Self:
        if self.minimum_replies > self.clients_asked:
            raise ValueError(
                f"server.minimum-replies={self.minimum_replies} can never be reached: a round asks "
                f"{self.clients_asked} clients (server.clients-per-round, server.over-sampling); lower it"
            )
        return self


class DefenceConfig(_Section):
    """Against clients that fail or lie (:mod:`framp_core.defence`, docs/robustness.md)."""

    largest_norm: float = Field(
        1000.0,
        ge=0,
        description="a delta longer than so many times the freshly initialised network is refused; 0: none is",
    )
    largest_prototype: float = Field(
        20.0,
        ge=0,
        description="features in prototypes, root mean square, above so many times the larger of the median client's "
        "and 1 are refused; 0: none are",
    )
    norm_bound: float = Field(
        0.0, ge=0, description="deltas are shortened to so many times the median length of their round; 0: off"
    )
    screening: Literal["none", "cosine"] = Field(
        "none", description="cosine: deltas that do not go the way of the round's others are left out"
    )
    screening_threshold: float = Field(
        0.5, ge=-1, le=1, description="agreement below which a client is left out; the median client's is 1"
    )
    screening_memory: float = Field(0.7, ge=0, lt=1, description="share of the past in a client's agreement")
    prototypes: Literal["mean", "median", "trimmed-mean"] = Field(
        "mean", description="prototypes of a round: mean by examples, or coordinate by coordinate over the clients"
    )
    trimmed_share: float = Field(
        0.2, ge=0, lt=0.5, description="left out at each end by trimmed-mean, and of the cosines of a client"
    )


class EvaluationConfig(_Section):
    """What is measured, and when."""

    every: int = Field(10, ge=1, description="rounds between evaluations; the last round is always evaluated")
    union_examples: int = Field(
        0, ge=0, description="random examples of the union, the same for all clients and rounds; 0: all"
    )
    union_by_client: bool = Field(False, description="union client after client, so that batches are skewed (FIARSE)")
    batch_size: int = Field(
        0, ge=0, description="images per test batch; accuracy depends on it in batch statistics; 0: as many as are fast"
    )
    augment: bool = Field(False, description="crop and flip the client's own test images, Local and Unseen (FIARSE)")
    local_prior_strength: float = Field(1.0, ge=0, description="class prior added to the logits, Local and Unseen")
    union_prior_strength: float = Field(0.0, ge=0, description="class prior added to the logits, Union")
    prior_strengths: Strengths = Field(
        (0.0, 0.25, 0.5, 1.0),
        description="the last evaluation also counts at each of these strengths, Local, Union and Unseen; empty: off",
    )
    fine_tune_steps: int = Field(0, ge=0, description="local steps before a second measurement at the end; 0: off")


class WireConfig(_Section):
    """How tensors travel."""

    values: Literal["float32", "bfloat16", "int8"] = "float32"


class EngineConfig(_Section):
    """How the in-process engine spreads the clients of a round, ``workers`` also for Ray's client actors.

    The number of workers never changes the numbers. A cohort, and who is in it, changes the order of additions, that is
    the last bits.
    """

    workers: int = Field(
        1, ge=0, description="processes; 1: in this process, 0: as many as the cores have room for, 1 on a GPU"
    )
    cohort: int = Field(
        1, ge=0, description="clients that train as one program; 1: one by one, 0: as a short measurement says"
    )
    compile: bool = Field(
        False, description="let torch.compile turn a cohort's step into one program, on a GPU a CUDA graph"
    )
    ray_address: str = Field(
        "",
        description="HOST:PORT of a running Ray cluster that `framp run --engine flower` joins, with an actor on each "
        "of its cores; empty: a Ray of the run's own",
    )

    @field_validator("ray_address")
    @classmethod
    def _is_host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and "/" not in host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"engine.ray-address={value!r} is not HOST:PORT, as `ray start --head` prints it")
        return value

    @model_validator(mode="after")
    def _a_cluster_has_its_own_cores(self) -> Self:
        if self.ray_address and self.workers > 1:
            raise ValueError(
                f"engine.workers={self.workers} is for a Ray of the run's own, and a cluster has an actor on each of "
                f"its cores; leave it out, and start the nodes with `ray start --num-cpus=N`"
            )
        return self


class OutputConfig(_Section):
    """Where the run folder goes."""

    folder: str = Field("", description="absolute, must not exist; empty: a new folder below ~/framp-runs")
    resume: str = Field(
        "", description="absolute folder of an unfinished run to go on with, instead of a new one; empty: a new run"
    )
    checkpoint_every: int = Field(10, ge=1, description="rounds between checkpoints; the last round always has one")
    checkpoints_kept: int = Field(2, ge=1, description="the newest so many checkpoints are kept")
    tensorboard: bool = Field(False, description="also write TensorBoard scalars")


class FrampConfig(_Section):
    """The whole configuration of a run."""

    method: Literal["framp", "fiarse", "fiarse-released", "heterofl", "fedrolex", "scalefl", "local"] = Field(
        "framp", description="the strategy; what its paper fixes besides stands in framp_core/methods.py"
    )
    seed: int = Field(0, ge=0, description="root of every random stream")
    rounds: int = Field(100, ge=1)
    data: DataConfig = DataConfig()
    graph: GraphConfig = GraphConfig()
    partition: PartitionConfig = PartitionConfig()
    capacity: CapacityConfig = CapacityConfig()
    model: ModelConfig = ModelConfig()
    descriptor: DescriptorConfig = DescriptorConfig()
    generator: GeneratorConfig = GeneratorConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    local: LocalConfig = LocalConfig()
    server: ServerConfig = ServerConfig()
    defence: DefenceConfig = DefenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wire: WireConfig = WireConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _experts_learn(self) -> Self:
        server = self.server
        if self.generator.name == "mixture" and (server.weighting, server.shared_optimizer) != ("coverage", "sgd"):
            raise ValueError(
                f"generator.name='mixture' learns with server.weighting='coverage' and server.shared-optimizer='sgd'; "
                f"given are {server.weighting!r} and {server.shared_optimizer!r}. Change them, or choose another "
                f"generator, such as 'modulated'"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_data(self) -> Self:
        graph = self.data.name in GRAPH_DATA
        kind, models = ("a graph", GRAPH_MODELS) if graph else ("images", ("conv", "resnet18", "mlp"))
        schemes = ("metis", "louvain") if graph else ("balanced-dirichlet", "dirichlet", "classes-per-client", "iid")
        for key, value, fitting in (
            ("model.name", self.model.name, models),
            ("partition.scheme", self.partition.scheme, schemes),
        ):
            if value not in fitting:
                raise ValueError(
                    f"data.name={self.data.name!r} is {kind}, which {key}={value!r} does not fit; "
                    f"choose {', '.join(fitting)}"
                )
        meaningless: tuple[str, ...] = _OF_IMAGES if graph else _OF_GRAPHS
        if self.data.name == "own-images":
            kind, meaningless = "images that nobody divides", (*meaningless, *_OF_DIVIDED)
        for name in meaningless:
            section, _, field = name.partition(".")
            values: _Section = getattr(self, section)
            value, default = getattr(values, field), type(values).model_fields[field].default
            if value != default:
                key = name.replace("_", "-")
                raise ValueError(
                    f"data.name={self.data.name!r} is {kind}, for which {key}={value!r} means nothing; leave it at "
                    f"{default!r}"
                )
        return self

    @model_validator(mode="after")
    def _neighbours_for_every_layer(self) -> Self:
        given, layers = self.graph.neighbours, len(self.model.widths)
        if self.data.name in GRAPH_DATA and len(given) < layers:
            raise ValueError(
                f"graph.neighbours={','.join(map(str, given))!r} and the model has {layers} layers (model.widths); "
                f"give {layers} numbers, the first for the neighbours of the training nodes themselves"
            )
        return self

    @model_validator(mode="after")
    def _absolute_paths(self) -> Self:
        for key, path in (
            ("data.root", self.data.root),
            ("data.cache", self.data.cache),
            ("output.folder", self.output.folder),
            ("output.resume", self.output.resume),
        ):
            if path and not Path(path).is_absolute():
                raise ValueError(
                    f"{key}={path!r} is a relative path; Flower's processes work in folders of their own, "
                    f"so give an absolute one, such as {str(Path.cwd() / path)!r}"
                )
        if self.output.folder and self.output.resume:
            raise ValueError(
                f"output.folder={self.output.folder!r} asks for a new run and output.resume={self.output.resume!r} "
                f"goes on with an old one in its own folder; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _usable_batches(self) -> Self:
        if self.model.batch_statistics and 1 in (self.local.batch_size, self.evaluation.batch_size):
            raise ValueError(
                "model.normalisation='batch-statistics' needs local.batch-size and evaluation.batch-size of 2 or more"
            )
        if self.evaluation.union_by_client and self.evaluation.union_examples:
            raise ValueError("evaluation.union-by-client leaves no random sample to take; set union-examples=0")
        return self

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar]) -> Self:
        """Build from flat dotted keys, as in Flower's run config or ``-o key=value``.

        Hyphens and underscores are both read. Missing keys take their defaults. Strings are read as the type of
        the field, except that a boolean field takes ``true`` and ``false`` alone, in any case.

        Raises:
            ConfigError: an unknown key (the nearest valid one is named), or a value out of range.
        """
        nested: dict[str, Any] = {}
        defaults = cls().to_flat()
        for given, value in values.items():
            key = given.replace("_", "-")
            if key not in defaults:
                raise ConfigError(unknown_key(given, defaults))
            check_boolean(key, value, defaults[key])
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(explain(error)) from error

    @classmethod
    def load(cls, path: Path | None = None, overrides: Mapping[str, Scalar] | None = None) -> Self:
        """Read a TOML file and lay overrides (flat dotted keys) on it.

        Raises:
            ConfigError: the file is missing or is not TOML, or :meth:`from_flat` refuses it.
        """
        return cls.from_flat({**(read_toml(path) if path else {}), **hyphenated(overrides or {})})

    def to_flat(self) -> dict[str, Scalar]:
        """Flat dotted, hyphenated keys and scalar values: the argument of :meth:`from_flat`."""
        return flatten(self.to_nested())

    def to_nested(self) -> dict[str, Any]:
        """Nested tables with hyphenated keys and scalar values."""
        return self.model_dump(mode="json", by_alias=True)

    def to_toml(self) -> str:
        """The effective configuration as a TOML file that :meth:`load` reads."""
        return tomli_w.dumps(self.to_nested())

    def differences(self, other: Mapping[str, Scalar]) -> list[str]:
        """The keys that can change the numbers and have another value in ``other``, both values beside them.

        Args:
            other: flat keys of another configuration, such as those that :meth:`to_flat` gave when it was stored.
        """
        here = {key: value for key, value in self.to_flat().items() if not _says_where(key)}
        there = {key: value for key, value in other.items() if not _says_where(key)}
        return [
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in {**here, **there}
            if there.get(key) != here.get(key)
        ]

    def digest(self) -> str:
        """SHA-256 over everything that can change the numbers (not engine and output folders)."""
        nested = self.to_nested()
        del nested["engine"], nested["output"], nested["data"]["root"], nested["data"]["cache"]
        return hashlib.sha256(json.dumps(nested, sort_keys=True).encode()).hexdigest()


def _says_where(key: str) -> bool:
    """Whether a flat key says where and how a run works rather than what it computes."""
    return key.startswith(("engine.", "output.")) or key in PLACES
