"""FedRolex (Alam et al., NeurIPS 2022): a window of channels that rolls over one global model."""

from server_app.strategies.heterofl import HeteroFLStrategy


class FedRolexStrategy(HeteroFLStrategy):
    """HeteroFL whose slices start one channel further in every round and wrap around.

    All clients share the offset, ``(round - 1) mod C`` in a layer of C channels, so that every channel is trained by
    the smallest clients once in C rounds. An evaluation after a round cuts the window of that round.

    Every element is the plain mean over its holders, and the window rolls upwards, as in the paper. The released code,
    besides what HeteroFL's docstring says of clipping, scaler and recipe, rolls the other way: it rolls the list of
    channels, so that its window starts at ``-(round - 1) mod C``. It averages convolutions as here, but norm
    parameters, biases and the head with a weight that depends on a client's place in the list: the weight is to count
    how often the element was updated before, which would cancel, but after the first tensor the counter is incremented
    within the loop over the clients that reads it. And it measures the full model alone.
    """

    def shift(self, server_round: int) -> int:
        """``round - 1``: the window of round 1 is HeteroFL's."""
        return server_round - 1
