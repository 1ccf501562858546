"""Messages that are made in two steps, against those made at once; and what the server keeps of them."""

import gc
import weakref
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import Message

from client_app.app import app as client_app
from framp.engines import InProcessGrid
from framp_core.codec import ValueFormat, decode_submodel, encode_slim, encode_submodel
from framp_core.config import FrampConfig, ModelConfig
from framp_core.layout import ParameterLayout
from framp_core.mask_references import MaskReferences
from framp_core.masking import global_top_k
from framp_core.models import build_model
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import Prototypes
from framp_core.structured import channel_mask, window
from server_app.app import serve
from server_app.registry import ClientRecord
from server_app.sending import SubmodelEncoder, drained
from server_app.strategies import FrampStrategy

Build = Callable[..., FrampConfig]
LAYOUT = ParameterLayout.of(build_model(ModelConfig(name="conv", widths=(8, 8), groups=4), (1, 8, 8), 10))
PROTOTYPES = Prototypes(np.arange(3), np.ones(3, np.int64), np.ones((3, 8), np.float32))
FORMATS: tuple[ValueFormat, ...] = ("float32", "bfloat16", "int8")


def record(name: str, capacity: str) -> ClientRecord:
    return ClientRecord(name, 0, "train", Fraction(capacity), (1, 8, 8), 10, 1, {}, 1, "", np.zeros(1, np.float32), 4)


def models(count: int) -> list[np.ndarray]:
    """Nearly the same model several times, as a round's models are."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(LAYOUT.size, dtype=np.float32)
    return [base + np.float32(0.02) * rng.standard_normal(LAYOUT.size, dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize("value_format", FORMATS)
def test_two_steps_give_the_bytes_of_one(value_format: ValueFormat) -> None:
    clients = [record(str(index), ("1/4", "1/16", "1")[index % 3]) for index in range(9)]
    ours, theirs = (MaskReferences(LAYOUT.maskable_sizes) for _ in range(2))
    encoder, forms = SubmodelEncoder(LAYOUT, value_format, ours), set()
    for server_round in (1, 2):
        thetas = models(len(clients))
        masks = [
            global_top_k(abs(theta), LAYOUT, LAYOUT.kept(client.capacity))
            for theta, client in zip(thetas, clients, strict=True)
        ]
        cuts = [encoder.cut(*each) for each in zip(clients, thetas, masks, strict=True)]
        encoder.renew_references(server_round, cuts)
        sent = [encoder.encode(cut, PROTOTYPES) for cut in drained(cuts)]
        theirs.renew(
            server_round,
            [(client.capacity, mask[LAYOUT.maskable]) for client, mask in zip(clients, masks, strict=True)],
        )
        for client, theta, mask, (encoded, alone) in zip(clients, thetas, masks, sent, strict=True):
            coded = theirs.code(client.name, client.capacity, mask[LAYOUT.maskable])
            expected = encode_submodel(theta[mask], mask, PROTOTYPES, LAYOUT, value_format, coded.code)
            assert (encoded.blob, encoded.parts, alone) == (expected.blob, expected.parts, coded.alone)
            forms.add(coded.code[0])
            if server_round == 1:
                held = decode_submodel(encoded.blob, LAYOUT, 10, 8).reference
                for references in (ours, theirs):
                    references.confirm(client.name, held and held.name)
    assert forms == {0, 1, 2}  # alone, held, given
    assert cuts == []


@pytest.mark.parametrize("value_format", FORMATS)
def test_two_steps_give_the_bytes_of_one_for_whole_channels(value_format: ValueFormat) -> None:
    client, theta = record("slim", "1/4"), models(1)[0]
    mask = channel_mask(LAYOUT, window(LAYOUT, client.capacity))
    encoder = SubmodelEncoder(LAYOUT, value_format, None)
    cut = encoder.cut(client, theta, mask)
    encoder.renew_references(1, [cut])
    encoded, alone = encoder.encode(cut, PROTOTYPES)
    assert encoded == encode_slim(theta[mask], mask, LAYOUT, value_format)
    assert alone == encoded.parts["mask"]
    assert cut.mask.bits.tolist() == PackedMask.of(mask).bits.tolist()


def test_a_message_that_was_sent_is_gone(tiny: Build) -> None:
    """Flower's grids drop what they have sent; the strategy must not hold it either while the clients work."""
    alive: list[list[bool]] = []

    class Dropping(InProcessGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            given = list(messages)
            del messages
            sent = [weakref.ref(message) for message in given]
            replies = super().send_and_receive(given, timeout=timeout)
            alive.append([each() is not None for each in sent])
            del given
            gc.collect()
            alive.append([each() is not None for each in sent])
            return replies

    config = tiny()
    with Dropping(client_app, config.partition.nodes, config.to_flat()) as grid:
        serve(grid, config, FrampStrategy)
    assert len(alive) == 2 * 2 * config.rounds
    assert all(all(before) and not any(after) for before, after in zip(alive[::2], alive[1::2], strict=True))
