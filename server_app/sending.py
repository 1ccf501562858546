"""From generated models to the messages that carry submodels, in little more memory than the messages take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Metadata

from framp_core.codec import Encoded, ValueFormat, assemble_slim, assemble_submodel, encode_kept
from framp_core.layout import ParameterLayout
from framp_core.mask_references import MaskReferences
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import Prototypes
from framp_core.spans import span
from server_app.registry import ClientRecord


@dataclass(frozen=True)
class Cut:
    """A client's submodel that waits for the masks of the round to vote: its weights as they will travel."""

    client: ClientRecord
    values: bytes
    mask: PackedMask


@dataclass(frozen=True)
class Outgoing:
    """What the server remembers of a message: to whom, with which mask, at which cost.

    Of the message itself it keeps the metadata, into which Flower writes the id on sending; the content is as large as
    the replies to come, and Flower lets go of it once it is sent.

    ``mask_alone`` is what the mask would have cost without a reference.
    """

    metadata: Metadata
    client: ClientRecord
    mask: PackedMask
    parts: dict[str, int]
    mask_alone: int


class SubmodelEncoder:
    """Submodels as bytes.

    Args:
        layout: description of the full vector.
        value_format: how weights are written.
        references: what masks are coded against; None for submodels of whole channels, which name those instead.
    """

    def __init__(self, layout: ParameterLayout, value_format: ValueFormat, references: MaskReferences | None) -> None:
        self._layout = layout
        self._value_format = value_format
        self._references = references

    @span("server.encode")
    def cut(self, client: ClientRecord, theta: np.ndarray, mask: np.ndarray) -> Cut:
        """Take the kept weights out of a full model."""
        return Cut(client, encode_kept(theta[mask], mask, self._layout, self._value_format), PackedMask.of(mask))

    def renew_references(self, server_round: int, cuts: Sequence[Cut]) -> None:
        """Let the masks of this round vote on what later masks are coded against."""
        if self._references is not None:
            maskable = self._layout.maskable
            self._references.renew(server_round, ((cut.client.capacity, cut.mask.kept()[maskable]) for cut in cuts))

    @span("server.encode")
    def encode(self, cut: Cut, prototypes: Prototypes | None) -> tuple[Encoded, int]:
        """The message, and the bytes of its mask without a reference."""
        mask = cut.mask.kept()
        if self._references is None:
            slim = assemble_slim(cut.values, mask, self._layout, self._value_format)
            return slim, slim.parts["mask"]
        coded = self._references.code(cut.client.name, cut.client.capacity, mask[self._layout.maskable])
        encoded = assemble_submodel(cut.values, mask, prototypes, self._layout, self._value_format, coded.code)
        return encoded, coded.alone


def drained(cuts: list[Cut]) -> Iterator[Cut]:
    """Take cuts from the list in order, so that each can go once its message is made."""
    cuts.reverse()
    while cuts:
        yield cuts.pop()
