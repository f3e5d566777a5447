"""cluster.yaml and the KubeRay manifest, read by Ray's own loaders where there are any."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from twinkle_serve.cluster.private_ray import SWITCHES
from twinkle_serve.config import Config, load_config
from twinkle_serve.plan import budget_of, find_shapes
from twinkle_serve.serve_file import from_serve_file

ROOT = Path(__file__).parents[1]
CLUSTER = (ROOT / "cluster.yaml").read_text()
# Those that make no sense where Ray does not have the machine to itself.
SHARED_SWITCHES = {
    name: value for name, value in SWITCHES.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
}


def _variant(provider: str) -> dict[str, Any]:
    """cluster.yaml with the commented blocks for a cloud in place of its own."""
    blocks = re.findall(r"^# provider:\n(?:# .*\n)+", CLUSTER, re.M)
    trees = [yaml.safe_load(re.sub(r"^# ", "", block, flags=re.M)) for block in blocks]
    (found,) = [tree for tree in trees if tree["provider"]["type"] == provider]
    own = {name: value for name, value in yaml.safe_load(CLUSTER).items() if name != "min_workers"}
    return own | found


def test_ray_up_accepts_the_file_as_it_is() -> None:
    config = prepare_config(yaml.safe_load(CLUSTER))
    validate_config(config)
    assert config["provider"]["type"] == "local"
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("provider", ["aws", "aliyun"])
def test_ray_up_accepts_the_variants_in_the_comments(provider: str) -> None:
    config = _variant(provider)
    validate_config(config | {"cluster_synced_files": []})
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 8
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"cluster_synced_files": [], "max_worker": 2})


@pytest.mark.parametrize("part", ["head", "worker"])
def test_each_node_starts_ray_with_our_switches(part: str) -> None:
    stop, start = yaml.safe_load(CLUSTER)[f"{part}_start_ray_commands"]
    assert stop.endswith("/ray stop")
    (exports,) = re.findall(r"export ([^;]*);", start)
    assert dict(each.split("=", 1) for each in exports.split()) == SHARED_SWITCHES


def test_the_token_goes_to_every_node_and_the_dashboard_stays_on_the_head() -> None:
    config = yaml.safe_load(CLUSTER)
    assert "~/.ray/auth_token" in config["file_mounts"]
    head = config["head_start_ray_commands"][1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in CLUSTER


# KubeRay ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest() -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "deployments" / "kubernetes" / "kuberay.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


@pytest.fixture(scope="module")
def service(manifest: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["RayService", "twinkle"]["spec"]
    return spec


def _config(service: dict[str, Any]) -> Config:
    return Config.model_validate(from_serve_file(yaml.safe_load(service["serveConfigV2"])))


def _pods(service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = service["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [copy.deepcopy(group["template"]) for group in groups]


def test_its_application_is_deployable_asks_for_keys_and_fits(service: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    config = _config(service)
    assert config.auth.mode == "keys"
    (model,) = config.models
    assert budget_of(model, find_shapes(model.path)).fits


def test_its_model_is_that_of_the_deployment_file(service: dict[str, Any]) -> None:
    expected = load_config(ROOT / "deployments" / "qwen3-30b-a3b.yaml").models
    assert _config(service).models == expected


def test_its_gpus_are_as_many_as_the_ranks(service: dict[str, Any]) -> None:
    (worker,) = service["rayClusterConfig"]["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    (model,) = _config(service).models
    assert int(limits["nvidia.com/gpu"]) * worker["replicas"] == model.ranks * model.groups
    host_gib = 2 * model.ranks * model.host_page_bytes / 2**30
    assert int(limits["memory"].removesuffix("Gi")) > host_gib


def test_what_ray_knows_survives_its_head(
    service: dict[str, Any], manifest: dict[tuple[str, str], dict[str, Any]]
) -> None:
    options = service["rayClusterConfig"]["gcsFaultToleranceOptions"]
    name, port = options["redisAddress"].split(":")
    assert manifest["Service", name]["spec"]["ports"] == [{"port": int(port)}]
    redis = manifest["Deployment", name]["spec"]["template"]
    selector = manifest["Service", name]["spec"]["selector"]
    assert selector.items() <= redis["metadata"]["labels"].items()
    (container,) = redis["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert "--appendonly" in container["args"]
    (volume,) = redis["spec"]["volumes"]
    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in manifest


def test_ray_asks_for_a_token_and_only_clients_get_in(
    service: dict[str, Any], manifest: dict[tuple[str, str], dict[str, Any]]
) -> None:
    assert service["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    policy = manifest["NetworkPolicy", "twinkle"]["spec"]
    *_, open_to_all = policy["ingress"]
    assert open_to_all == {"ports": [{"port": 8000}]}
    labels = policy["podSelector"]["matchLabels"]
    assert all(labels.items() <= pod["metadata"]["labels"].items() for pod in _pods(service))


def test_every_pod_has_our_switches_the_data_and_time_to_stop(service: dict[str, Any]) -> None:
    config = _config(service)
    by_operator = {"RAY_AUTH_MODE": "token"}
    for pod in _pods(service):
        (container,) = pod["spec"]["containers"]
        env = {each["name"]: each.get("value") for each in container["env"]}
        assert SHARED_SWITCHES.items() <= (env | by_operator).items()
        assert str(config.storage.root) in [mount["mountPath"] for mount in container["volumeMounts"]]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 30


def test_keys_are_given_out_for_the_same_storage(
    service: dict[str, Any], manifest: dict[tuple[str, str], dict[str, Any]]
) -> None:
    keys = Config.model_validate(yaml.safe_load(manifest["ConfigMap", "twinkle-keys"]["data"]["keys.yaml"]))
    assert keys.auth == _config(service).auth
    assert keys.storage.root == _config(service).storage.root
