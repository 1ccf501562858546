"""From a configuration to what each client holds, whatever the kind of data."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from framp_core.config import GRAPH_DATA, FrampConfig
from framp_core.data.examples import ClientData
from framp_core.data.image_folder import require_outside
from framp_core.data.images import image_client, image_partition
from framp_core.data.partition import Partition
from framp_core.data.sources import ImageData
from framp_core.errors import DataError

if TYPE_CHECKING:
    from framp_core.data.graph import GraphData

logger = logging.getLogger("flwr.framp.data")

# framp_core.data.graph is imported where a graph is asked for: what it needs is an optional extra.


def load_partition(config: FrampConfig, partitions: int) -> "tuple[ImageData | GraphData, Partition]":
    """Load the data and the partition of a run; kept for the life of the process.

    Args:
        config: of the run; ``partition`` is scaled to ``partitions`` nodes by ``PartitionConfig.for_nodes``.
        partitions: number of nodes, >= 1.

    Raises:
        DataError: the data cannot be read, or the partition leaves a client without data.
        ConfigError: the graph libraries are not installed.
    """
    if config.data.name in GRAPH_DATA:
        from framp_core.data.graph import load_graph_partition

        return load_graph_partition(config, partitions)
    return image_partition(config, partitions)


def require_output_outside(config: FrampConfig) -> None:
    """Check that a run is not written where its own images are read, :func:`require_outside`, before it is begun.

    Raises:
        DataError: it would be.
    """
    if config.data.name == "image-folder" and config.data.root and config.output.folder:
        require_outside(Path(config.data.root), Path(config.output.folder), "the run folder")


def warn_of_notes(data: "ImageData | GraphData") -> dict[str, str]:
    """Log, in one line, what was left out of the data or read otherwise than may be expected; return it, too."""
    notes = dict(data.notes)
    if notes:
        logger.warning("data: %s", "; ".join(f"{about}: {said}" for about, said in notes.items()))
    return notes


def load_client(config: FrampConfig, partition_id: int, partitions: int) -> ClientData:
    """Load one client of the run's partition.

    Args:
        config: of the run.
        partition_id: index of the client, in [0, partitions).
        partitions: number of nodes of the federation, training and unseen clients together.

    Raises:
        DataError: ``partition_id`` is out of range, or :func:`load_partition` fails.
    """
    if not 0 <= partition_id < partitions:
        raise DataError(
            f"partition-id {partition_id} is outside [0, {partitions}); give every node its own partition-id "
            f"and all the same num-partitions"
        )
    if config.data.name in GRAPH_DATA:
        from framp_core.data.graph import client_data

        return client_data(config, partition_id, partitions)
    return image_client(config, partition_id, partitions)
