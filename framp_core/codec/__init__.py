"""The only place that turns tensors into bytes and counts them (DESIGN section 8)."""

from framp_core.codec.frame import PROTOCOL_VERSION, Encoded
from framp_core.codec.masks import Reference, decode_mask, encode_mask, encode_mask_part, expected_flips
from framp_core.codec.messages import (
    SlimSubmodel,
    Submodel,
    Update,
    assemble_slim,
    assemble_submodel,
    decode_descriptor,
    decode_slim,
    decode_submodel,
    decode_update,
    encode_descriptor,
    encode_kept,
    encode_slim,
    encode_submodel,
    encode_update,
    is_slim,
)
from framp_core.codec.values import ValueFormat, decode_values, encode_values

__all__ = [
    "PROTOCOL_VERSION",
    "Encoded",
    "Reference",
    "SlimSubmodel",
    "Submodel",
    "Update",
    "ValueFormat",
    "assemble_slim",
    "assemble_submodel",
    "decode_descriptor",
    "decode_mask",
    "decode_slim",
    "decode_submodel",
    "decode_update",
    "decode_values",
    "encode_descriptor",
    "encode_kept",
    "encode_mask",
    "encode_mask_part",
    "encode_slim",
    "encode_submodel",
    "encode_update",
    "encode_values",
    "expected_flips",
    "is_slim",
]
