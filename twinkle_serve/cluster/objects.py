"""Results that stay in Ray's object store until somebody needs them.

Knows ObjectRefs. Does not know what is in a result or who asks.
"""

from __future__ import annotations

import asyncio
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


async def brought_here(reference: Any) -> Any:
    """The same result in the object store of this node. Raises RayError."""
    # Not only read: a mere copy is not kept when room is short. The write takes its time and so has a thread.
    return await asyncio.to_thread(ray.put, await reference)
