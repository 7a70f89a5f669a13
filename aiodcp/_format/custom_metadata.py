"""Custom metadata as it is stored: JSON. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .seal import SealError


def encode_custom_metadata(custom_metadata: Mapping[str, Any]) -> bytes:
    """Return custom metadata as it is stored.

    Raises:
        TypeError, ValueError: JSON cannot say it.
    """
    return json.dumps(dict(custom_metadata), separators=(",", ":")).encode()


def decode_custom_metadata(encoded: bytes) -> dict[str, Any]:
    """Return custom metadata; empty if there is none."""
    try:
        decoded = json.loads(encoded) if encoded else {}
    except (ValueError, RecursionError) as error:
        raise SealError(f"the custom metadata is not JSON: {error}") from error
    return decoded if isinstance(decoded, dict) else {}
