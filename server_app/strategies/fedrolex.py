"""FedRolex (Alam et al., NeurIPS 2022): a window of channels that rolls over one global model."""

from server_app.strategies.heterofl import HeteroFLStrategy


class FedRolexStrategy(HeteroFLStrategy):
    """HeteroFL whose slices start one channel further in every round and wrap around.

    As in the released code all clients share the offset, ``(round - 1) mod C`` in a layer of C channels, so that every
    channel is trained by the smallest clients once in C rounds. An evaluation after a round cuts the window of that
    round. The released code averages convolutions over their holders, as here, and weights norm parameters, biases
    and the head by how often each was updated so far; here they are plain means over their holders, too.
    """

    def shift(self, server_round: int) -> int:
        """``round - 1``: the window of round 1 is HeteroFL's."""
        return server_round - 1
