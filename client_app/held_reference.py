"""The reference mask that a client holds from one message to the next, in Flower's state of its node."""

from collections.abc import Sequence

from flwr.app import ConfigRecord, RecordDict

from framp_core.codec import Reference, decode_mask, encode_mask
from framp_core.errors import ProtocolError

RECORD = "framp-reference"


class HeldReference:
    """Reads and writes one record of ``Context.state``.

    The mask is kept as it travels alone: its plain bits would take more room than the weights of the smallest
    submodels.

    Args:
        state: the node's state, which Flower carries from one message of a run to the next.
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    @property
    def name(self) -> int | None:
        """The reference's name, which the server is told with every reply; None if the node holds none."""
        record = self._state.get(RECORD)
        name = record.get("name") if isinstance(record, ConfigRecord) else None
        return name if isinstance(name, int) else None

    def read(self, sizes: Sequence[int]) -> Reference | None:
        """The reference, None if the node holds none over tensors of these sizes."""
        record = self._state.get(RECORD)
        mask = record.get("mask") if isinstance(record, ConfigRecord) else None
        if not isinstance(mask, bytes):
            return None
        try:
            return Reference.of(decode_mask(mask, sizes))
        except ProtocolError:
            return None

    def write(self, reference: Reference | None, sizes: Sequence[int]) -> None:
        """Hold this one from now on; without one, nothing changes."""
        if reference is not None and reference.name != self.name:
            mask = encode_mask(reference.kept(), sizes)
            self._state[RECORD] = ConfigRecord({"name": reference.name, "mask": mask})
