"""Images and graphs, their partition over clients, and what one client sees of them."""

from framp_core.data.client_data import load_client, load_partition, require_output_outside, warn_of_notes
from framp_core.data.examples import ClientData, Examples
from framp_core.data.facts import DataFacts
from framp_core.data.images import LabelledImages, own_client
from framp_core.data.inspect import ClientRow, DataSummary, summarise_data
from framp_core.data.partition import ClientSplit, Partition, make_partition
from framp_core.data.sources import ImageData, load_images
from framp_core.data.transforms import Augmentation, Normaliser

__all__ = [
    "Augmentation",
    "ClientData",
    "ClientRow",
    "ClientSplit",
    "DataFacts",
    "DataSummary",
    "Examples",
    "ImageData",
    "LabelledImages",
    "Normaliser",
    "Partition",
    "load_client",
    "load_images",
    "load_partition",
    "make_partition",
    "own_client",
    "require_output_outside",
    "summarise_data",
    "warn_of_notes",
]
