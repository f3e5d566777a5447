"""How a tenant is called: the id that everything it owns is filed under, and the name that its operator uses.

Knows where each mode of identity takes names from. Does not know keys, HTTP or limits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from twinkle_serve.config import Config
from twinkle_serve.storage.keys import KeyStore


def tenant_of_user(user: str) -> str:
    """The id of a ModelScope user."""
    return "ms-" + hashlib.sha256(user.encode()).hexdigest()[:16]


def tenant_names(config: Config) -> Callable[[str], str]:
    """From a tenant's id to the name that ``limits.tenants`` may know it by; the id itself where there is
    none. Names of keys are read when first asked for, and again when a new tenant comes."""
    if config.auth.mode == "modelscope":
        users = {tenant_of_user(user): user for user in config.limits.tenants}
        return lambda tenant: users.get(tenant, tenant)
    if config.auth.mode == "keys" and config.limits.tenants:
        store = KeyStore(config.storage.root)
        known: dict[str, str] = {}

        def name_of(tenant: str) -> str:
            if tenant not in known:
                known.update({record.tenant: record.name for record in store.list()})
            return known.setdefault(tenant, tenant)

        return name_of
    return lambda tenant: tenant
