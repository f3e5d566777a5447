from __future__ import annotations

from pathlib import Path

from twinkle_serve.config import Config
from twinkle_serve.storage.keys import KeyStore
from twinkle_serve.tenants import tenant_names, tenant_of_user


def config_for(root: Path, **auth: object) -> Config:
    return Config.model_validate(
        {
            "models": [{"name": "m", "path": "p"}],
            "storage": {"root": str(root)},
            "auth": auth,
            "limits": {"tenants": {"alice": {"weight": 2.0}}},
        }
    )


def test_users_of_modelscope(tmp_path: Path) -> None:
    name_of = tenant_names(config_for(tmp_path, mode="modelscope", modelscope={"allow_users": ["alice"]}))
    assert name_of(tenant_of_user("alice")) == "alice"
    assert name_of(tenant_of_user("bob")) == tenant_of_user("bob")


def test_names_of_keys_also_of_later_ones(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    name_of = tenant_names(config_for(tmp_path, mode="keys"))
    assert name_of("key-unknown") == "key-unknown"
    record = store.find(store.create("alice"))
    assert record is not None
    assert name_of(record.tenant) == "alice"
    store.rotate("alice")
    assert name_of(record.tenant) == "alice"
    store.close()


def test_open_servers_know_ids_only(tmp_path: Path) -> None:
    assert tenant_names(config_for(tmp_path))("0123") == "0123"
