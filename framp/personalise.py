"""A model for a client from its descriptor alone: nothing is trained, and the client need not have been in the run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from client_app.client import Client
from client_app.held_reference import HeldReference
from framp_core.checkpoints import Checkpoint
from framp_core.codec import Encoded, encode_submodel
from framp_core.config import GRAPH_DATA, FrampConfig
from framp_core.data import ClientData, DataFacts, load_client, load_partition, own_client
from framp_core.errors import ConfigError, DataError, RunFolderError
from framp_core.local_training import log_prior
from framp_core.models import FlatModel, build_model
from framp_core.personal_model import PersonalModel, require_new, save
from framp_core.run_folder import MANIFEST, RunFolder
from framp_core.threads import torch_threads
from server_app.registry import ABSENT, ClientRecord
from server_app.strategies import STRATEGIES, FrampStrategy


@dataclass(frozen=True)
class Personalised:
    """A client's model, and what came of it on the client's own test examples.

    Attributes:
        model: the model as it was measured last.
        client: name.
        train_examples: that the descriptor was made of.
        test_examples: measured on; 0 if there are none, and then all accuracies are None.
        plain: accuracy without a class prior.
        accuracy: with the class prior of ``evaluation.local-prior-strength``: Local or Unseen in a run's table.
        tuned: the same after fine-tuning, None without.
        notes: what was left out of the client's folder, or read otherwise than may be expected.
    """

    model: PersonalModel
    client: str
    train_examples: int
    test_examples: int
    plain: float | None
    accuracy: float | None
    tuned: float | None
    notes: Mapping[str, str]

    def rows(self) -> dict[str, str]:
        """What to show, by heading."""
        layout, mask = self.model.network.layout, self.model.mask
        parts, origin = self.model.message, self.model.origin
        held = f"{int(mask.sum()):,} of {layout.size:,} parameters at capacity {self.model.capacity}"
        message = f"{sum(parts.values()):,} bytes, of which the mask takes {parts['mask']:,}"
        rows = {
            "client": self.client,
            "server": f"{origin['method']}, after round {origin['round']} of {origin['rounds']}",
            "submodel": held,
            "message": message,
            "training examples": f"{self.train_examples:,} in the descriptor",
            "test examples": f"{self.test_examples:,}" if self.test_examples else "none, so that nothing is measured",
            "accuracy, no prior": _percent(self.plain),
            f"accuracy, class prior {self.model.prior_strength:g}": _percent(self.accuracy),
        }
        if origin["fine_tuning_steps"]:
            rows[f"after {origin['fine_tuning_steps']} local steps, same prior"] = _percent(self.tuned)
        return {**rows, **self.notes}


def personalise(
    folder: Path,
    data: Path | None = None,
    client: str | None = None,
    capacity: Fraction | None = None,
    steps: int = 0,
    out: Path | None = None,
) -> Personalised:
    """Give a client the model that the newest checkpoint of a run has for it.

    The generator is frozen: it makes a model from the client's descriptor, which is cut to the capacity, and with
    ``steps`` the kept weights alone are trained on the client's own data. With a client of the run, the numbers are
    those that the run recorded for it, ``evaluation.fine-tune-steps`` included.

    Args:
        folder: of a run of FRAMP, or of FIARSE or FedAvg, whose generator gives all clients the same model.
        data: the client's own images, ``train/CLASS/*`` and maybe ``test/CLASS/*``, classes named as in the run.
        client: in their place a client of the run's own partition, by name.
        capacity: gamma; None for a client of the run: its own.
        steps: local steps of fine-tuning; 0: none.
        out: file for the model; None: none is written.

    Raises:
        ConfigError: neither or both of ``data`` and ``client``, no capacity, or a method that has no such generator.
        DataError: the data cannot be read, or do not fit the run.
        RunFolderError: no run, no checkpoint, or ``out`` cannot be written.
    """
    if (data is None) == (client is None):
        raise ConfigError("give the client's images with --data, or with --client the name of a client of the run")
    if out is not None:
        require_new(out)
    run = RunFolder.open(folder)
    server, checkpoint = _server(run)
    held = _own_images(run, data, capacity) if data is not None else _of_the_run(server, str(client), capacity)
    with torch_threads(run.config.local.threads):
        worker = Client(_measuring(run.config, steps), held, server.registry.expected, HeldReference(RecordDict()))
        encoded, mask = _submodel(server, worker, checkpoint)
        counts = worker.evaluate(encoded.blob, checkpoint.round, final=True)
    origin = {
        "client": held.name,
        "method": run.config.method,
        "round": checkpoint.round,
        "rounds": run.config.rounds,
        "fine_tuning_steps": steps,
        "config_digest": run.config.digest(),
    }
    model = PersonalModel(
        network=_copy(worker),
        mask=mask,
        log_prior=log_prior(held.class_counts(), run.config.local.absent_class_prior),
        prior_strength=run.config.evaluation.local_prior_strength,
        facts=_facts(run),
        capacity=held.capacity,
        message=encoded.parts,
        origin=origin,
    )
    if out is not None:
        save(model, run.config.model, out)
    return _result(model, held, counts)


def _server(run: RunFolder) -> tuple[FrampStrategy, Checkpoint]:
    """The server of a run as its newest checkpoint has it, without any client connected."""
    kind = STRATEGIES[run.config.method]
    if not issubclass(kind, FrampStrategy) or kind.slim:
        raise ConfigError(
            f"the run in {str(run.path)!r} is of method={run.config.method!r}, which has no generator that makes "
            f"a model from a descriptor; personalise a run of 'framp' (or of 'fiarse', which gives all the same model)"
        )
    checkpoint = run.newest_checkpoint()
    if checkpoint is None:
        raise RunFolderError(f"{str(run.path)!r} holds no checkpoint: the run stopped before its first one")
    wanted = f"{kind.__module__}.{kind.__qualname__}"
    if checkpoint.state["strategy"] != wanted:
        raise ConfigError(
            f"the run in {str(run.path)!r} is of the strategy {checkpoint.state['strategy']}, and only {wanted} can be "
            f"built again by its method's name"
        )
    server = kind(run.config, run)
    with run.restoring():
        server.reload(checkpoint)
    return server, checkpoint


def _facts(run: RunFolder) -> DataFacts:
    try:
        return DataFacts.from_dict(run.json(MANIFEST)["data"])
    except KeyError as error:
        raise RunFolderError(
            f"{MANIFEST} in {str(run.path)!r} does not name the classes and the normalisation of the data: the server "
            f"could not read the data, or the run is of an older version. Run it again where data.root can be read"
        ) from error


def _own_images(run: RunFolder, root: Path, capacity: Fraction | None) -> ClientData:
    if run.config.data.name in GRAPH_DATA:
        raise DataError(
            f"--data reads folders of images, and the run in {str(run.path)!r} is about the graph "
            f"{run.config.data.title!r}, where a client is a part of it; name one with --client"
        )
    if capacity is None:
        raise ConfigError("give the client's --capacity, such as 1/16: the run does not know how much it can hold")
    return own_client(run.config, _facts(run), root, capacity, run.json(MANIFEST)["digest"])


def _of_the_run(server: FrampStrategy, name: str, capacity: Fraction | None) -> ClientData:
    """A client of the run's partition; its capacity is the one that the server knew, if it met the client."""
    nodes = server.registry.expected
    _, partition = load_partition(server.config, nodes)
    names = [each.name for each in partition.clients]
    if name not in names:
        raise DataError(f"the run has no client {name!r}; its clients are {names[0]} to {names[-1]}")
    data, known = load_client(server.config, names.index(name), nodes), server.registry.clients.get(name)
    return replace(data, capacity=capacity or (known.capacity if known else data.capacity))


def _measuring(config: FrampConfig, steps: int) -> FrampConfig:
    """The configuration of the last evaluation, at two strengths of the prior: none, and that of Local."""
    strengths = (0.0, config.evaluation.local_prior_strength)
    wanted = {"prior_strengths": strengths, "fine_tune_steps": steps}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=wanted)})


def _submodel(server: FrampStrategy, worker: Client, checkpoint: Checkpoint) -> tuple[Encoded, np.ndarray]:
    """The message that the server would send to this client for its evaluation, and the mask in it."""
    payload = ConfigRecord({"payload": worker.describe()})
    record = ClientRecord.read(ABSENT, RecordDict({"client": ConfigRecord(worker.card()), "framp": payload}))
    if record.task != checkpoint.state["task"]:
        raise DataError(f"the client has {record.task}; the run is about {checkpoint.state['task']}")
    theta = server.generate(record, evaluation=True)
    mask = server.extract(theta, record, checkpoint.round)
    return encode_submodel(theta[mask], mask, None, server.layout, server.config.wire.values), mask


def _copy(worker: Client) -> FlatModel:
    """What was measured last, in a network of its own: the client's is overwritten by whatever comes next."""
    network = FlatModel(build_model(worker.config.model, worker.data.shape, worker.data.classes))
    network.load(worker.model.flat.detach().cpu())
    return network


def _result(model: PersonalModel, held: ClientData, counts: Mapping[str, Any]) -> Personalised:
    total = counts["local-total"]
    plain, accuracy = counts["local-prior-correct"]
    tuned = counts.get("local-correct-tuned")
    plain, accuracy, tuned = (
        count / total if total and count is not None else None for count in (plain, accuracy, tuned)
    )
    return Personalised(model, held.name, len(held.train), total, plain, accuracy, tuned, held.notes)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
