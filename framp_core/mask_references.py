"""The server's side of masks coded as flips: one reference per size and round, and who holds which.

Masks of one round and size are nearly the same for all clients, and drift from round to round. At named rounds the
majority over the masks that are about to be sent becomes their size's reference. A client that holds none is given the
newest one with its first mask; one that returns has its mask coded against the reference it holds, or is first brought
up to the newest one by flips. Per client the server keeps the name of a reference, not a mask, and forgets it whenever
a message may not have arrived.
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from framp_core.codec import Reference, encode_mask_part, expected_flips

KEPT_PER_SIZE = 32
"""References that the server keeps of each size; the holder of an older one is given the newest."""
RENEWAL_WORTH = 1.5
"""How many times a mask against the old reference the newest one and a mask may cost: the next masks gain by it."""
ROUNDS_PER_RETURN = 8
"""References made in the mean time between two visits of a client; a newer one would be little nearer to its mask."""


@dataclass(frozen=True)
class CodedMask:
    """A mask as it travels.

    Attributes:
        code: the form that was chosen.
        alone: bytes of the mask coded alone, for comparison.
    """

    code: bytes
    alone: int


class MaskReferences:
    """References by size, and the one that each client is known to hold.

    Args:
        sizes: weights of each maskable tensor, summing to m.
        visits: mean number of rounds between two visits of a client. References are made every
            ``visits / ROUNDS_PER_RETURN`` rounds, so that ``KEPT_PER_SIZE`` of them reach four visits back.
    """

    def __init__(self, sizes: Sequence[int], visits: float = 1.0) -> None:
        self._sizes = sizes
        self._every = max(1, round(visits / ROUNDS_PER_RETURN))
        self._kept: dict[Hashable, dict[int, Reference]] = {}
        self._newest: dict[Hashable, Reference] = {}
        self._held: dict[str, int] = {}

    def renew(self, server_round: int, masks: Iterable[tuple[Hashable, np.ndarray]]) -> None:
        """At a named round, make the majority of the masks of each size its newest reference; at others, its first.

        Full masks have none: coded alone they take two bytes.

        Args:
            server_round: the current round, from 1.
            masks: size and mask, bool ``(m,)``, of every client that is about to be sent one; looked at one by one.
        """
        votes: dict[Hashable, np.ndarray] = {}
        voters: dict[Hashable, int] = defaultdict(int)
        named = (server_round - 1) % self._every == 0
        for size, mask in masks:
            if not named and size in self._newest:
                continue
            votes.setdefault(size, np.zeros(mask.shape, np.uint16))[:] += mask
            voters[size] += 1
        for size, count in votes.items():
            majority = 2 * count > voters[size]
            if not majority.all():
                self._add(size, Reference.of(majority))

    def code(self, client: str, size: Hashable, kept: np.ndarray) -> CodedMask:
        """Code a client's mask, bool ``(m,)``, in the form that serves this message and those to come best."""
        alone = encode_mask_part(kept, self._sizes)
        new, held = self._newest.get(size), self._kept.get(size, {}).get(self._held.get(client, -1))
        if new is None:
            return CodedMask(alone, len(alone))
        if held is None:
            return CodedMask(encode_mask_part(kept, self._sizes, new=new), len(alone))
        if new.name == held.name:
            return CodedMask(encode_mask_part(kept, self._sizes, held), len(alone))
        if not _is_worth_moving(kept, held.kept(), new.kept()):
            return CodedMask(encode_mask_part(kept, self._sizes, held), len(alone))
        code = encode_mask_part(kept, self._sizes, held, new)
        if len(code) > len(alone):
            code = min(code, encode_mask_part(kept, self._sizes, new=new), key=len)
        return CodedMask(code, len(alone))

    def confirm(self, client: str, name: object) -> None:
        """Note which reference a client says it holds; anything but the name of a kept one counts as none."""
        if isinstance(name, int):
            self._held[client] = name
        else:
            self.forget(client)

    def forget(self, client: str) -> None:
        """Rely on no reference at this client: its message may not have arrived, or it could not read it."""
        self._held.pop(client, None)

    def keep_sizes(self, sizes: Collection[Hashable]) -> None:
        """Forget the references of all others: a client that tells a new size each time must not fill the memory."""
        self._kept = {size: kept for size, kept in self._kept.items() if size in sizes}
        self._newest = {size: newest for size, newest in self._newest.items() if size in sizes}

    def _add(self, size: Hashable, reference: Reference) -> None:
        """Keep a new reference, and of the others those that someone holds, the latest first."""
        held = set(self._held.values())
        known = {name: each for name, each in self._kept.get(size, {}).items() if name in held}
        known.pop(reference.name, None)
        latest = [*known.values(), reference][-KEPT_PER_SIZE:]
        self._kept[size] = {each.name: each for each in latest}
        self._newest[size] = reference


def _is_worth_moving(kept: np.ndarray, held: np.ndarray, new: np.ndarray) -> bool:
    """By lengths that are expected: coding each form to compare them would take most of the server's time."""
    return expected_flips(new, held) + expected_flips(kept, new) <= RENEWAL_WORTH * expected_flips(kept, held)
