"""Images, their partition over clients, and what one client sees of them."""

from framp_core.data.client_data import ClientData, LabelledImages, load_client, load_partition
from framp_core.data.inspect import ClientRow, DataSummary, summarise_data
from framp_core.data.partition import ClientSplit, Partition, make_partition
from framp_core.data.sources import ImageData, load_images
from framp_core.data.transforms import Normaliser, augment

__all__ = [
    "ClientData",
    "ClientRow",
    "ClientSplit",
    "DataSummary",
    "ImageData",
    "LabelledImages",
    "Normaliser",
    "Partition",
    "augment",
    "load_client",
    "load_images",
    "load_partition",
    "make_partition",
    "summarise_data",
]
