"""Results that stay in Ray's object store until somebody needs them.

Knows ObjectRefs. Does not know what is in a result or who asks.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError

from twinkle_serve.protocol.errors import BackendUnavailable


async def resolve(value: Any) -> Any:
    """The result behind ``value``: large ones are mapped from the object store without a copy."""
    if not isinstance(value, ray.ObjectRef):
        return value
    try:
        return await value
    except RayError:
        raise BackendUnavailable("the result is lost with its owner; ask again") from None
