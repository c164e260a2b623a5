# SPDX-License-Identifier: Apache-2.0
"""Manifests of Kubernetes and Compose: valid, of one mind about ports and labels, and with options that exist."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from kvxfer.config import unknown_variables
from kvxfer.errors import ConfigError
from kvxfer_serving.options import ConnectorOptions

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PLAIN = (
    "base/prefill.yaml",
    "base/decode.yaml",
    "base/network-policy.yaml",
    "vllm-router/namespace.yaml",
    "vllm-router/router.yaml",
)
"""Whole resources; the other files are patches, which are valid where they are merged."""
VERSIONS = ("1.33", "1.37")
OVERLAYS = ("vllm-router", "llm-d")
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def documents(name):
    """All documents of a file."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def resource(kind, name):
    """One of the plain resources."""
    (found,) = [
        each for path in PLAIN for each in documents(path) if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def server(role):
    """Container of a server in the base."""
    (container,) = resource("Deployment", role)["spec"]["template"]["spec"]["containers"]
    return container


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def commands():
    """Each command that starts a server of vLLM, with its place and role."""
    for role in ROLES:
        yield f"base/{role}.yaml", role, server(role)["args"]
        yield "compose.yaml", role, compose()[role]["command"][2:]
    (patch,) = documents("llm-d/decode.yaml")
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    yield "llm-d/decode.yaml", "decode", container["args"]


def option(arguments, name):
    """Value of an option, as one word or as two."""
    for at, word in enumerate(arguments):
        if word == name:
            return arguments[at + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def transfer_config(arguments):
    return json.loads(option(arguments, "--kv-transfer-config"))


def environment(container):
    return {each["name"]: each.get("value", "") for each in container["env"]}


def validate(manifest, version):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(version):
    """Each resource has the fields of its kind and no other ones, in an older and in the newest version of Kubernetes."""
    for name in PLAIN:
        for manifest in documents(name):
            validate(manifest, version)
    misspelt = resource("Deployment", "decode")
    misspelt["spec"]["template"]["spec"]["terminationGracePeriod"] = 90
    with pytest.raises(Exception, match="terminationGracePeriod"):
        validate(misspelt, version)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("rdma", [False, True], ids=["tcp", "rdma"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_valid_manifests(tmp_path, overlay, rdma):
    """What kustomize makes is valid, each selector has its pods, and each reference its target."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "kubernetes" / "base" / "secret").write_text("not random at all: 0123456789")
    chosen = tmp_path / "kubernetes" / overlay
    if rdma:
        settings = chosen / "kustomization.yaml"
        settings.write_text(settings.read_text().replace("# components:", "components:"))
    made = subprocess.run(["kubectl", "kustomize", str(chosen)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    manifests = list(yaml.safe_load_all(made.stdout))
    for manifest in manifests:
        validate(manifest, VERSIONS[-1])
    of_kind = lambda kind: {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}  # noqa: E731
    pods = {name: each["spec"]["template"] for name, each in of_kind("Deployment").items()}
    assert set(pods) == {"prefill", "decode"} | ({"vllm-router"} if overlay == "vllm-router" else set())
    for name, each in of_kind("Deployment").items():
        assert each["spec"]["selector"]["matchLabels"].items() <= pods[name]["metadata"]["labels"].items()
    for service in of_kind("Service").values():
        (chosen_pods,) = [
            pod for pod in pods.values() if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        ]
        offered = {port["name"] for port in ports_of(chosen_pods["spec"])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= offered
    for name, pod in pods.items():
        for volume in pod["spec"].get("volumes", []):
            assert "secret" not in volume or volume["secret"]["secretName"] in of_kind("Secret")
        for container in pod["spec"]["containers"]:
            assert container["image"] == "registry.example.com/kvxfer-vllm:0.32.0"
            if name in ROLES:
                assert ("UCX_TLS" in environment(container)) is rdma
                probes = {
                    container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
                }
                assert probes <= {port["name"] for port in container["ports"]}
                assert int(option(container["args"], "--port")) in {
                    port["containerPort"] for port in container["ports"]
                }


def ports_of(pod):
    return [port for container in pod["containers"] + pod.get("initContainers", []) for port in container["ports"]]


def test_options_of_the_connector_exist():
    """Options and variables of kvxfer in each manifest are ones that kvxfer has; a misspelt one would be refused."""
    for where, role, arguments in commands():
        config = transfer_config(arguments)
        assert config["kv_connector"] == "KvxferConnector" and config["kv_role"] == ROLES[role], where
        ConnectorOptions.parse(config.get("kv_connector_extra_config", {}))
    with pytest.raises(ConfigError, match="lease_secnds"):
        ConnectorOptions.parse({"lease_secnds": 3})
    for role in ROLES:
        for variables in (environment(server(role)), compose()[role]["environment"]):
            assert {"KVXFER_SIDE_CHANNEL_HOST", "KVXFER_SECRET_FILE"} <= set(variables)
            assert unknown_variables(variables) == []
    (patch,) = documents("rdma/servers.yaml")
    assert unknown_variables(environment(patch["spec"]["template"]["spec"]["containers"][0])) == []


def test_options_of_vllm_exist():
    """vLLM takes the command line of each server, and its settings of the transfer."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        from vllm.config import KVTransferConfig
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = make_arg_parser(FlexibleArgumentParser())
    for where, _, arguments in commands():
        model, *rest = arguments
        assert "MODEL" in model
        given = parser.parse_args(["--model", "m", *rest])
        assert given.shutdown_timeout == 60, where
        assert set(transfer_config(arguments)) <= set(KVTransferConfig.__dataclass_fields__), where


def test_options_of_the_router_exist():
    """vllm-router takes the command lines, and finds the servers by labels that their pods have, at their port."""
    router = pytest.importorskip("vllm_router.router_args", reason="vllm-router is not installed")
    import argparse

    parser = argparse.ArgumentParser()
    router.RouterArgs.add_cli_args(parser)
    (container,) = resource("Deployment", "vllm-router")["spec"]["template"]["spec"]["containers"]
    given = parser.parse_args(container["args"])
    for role, selector in (("prefill", given.prefill_selector), ("decode", given.decode_selector)):
        label, _, value = selector[0].partition("=")
        assert resource("Deployment", role)["spec"]["template"]["metadata"]["labels"][label] == value
        assert given.service_discovery_port == int(option(server(role)["args"], "--port"))
    namespace = resource("Namespace", given.service_discovery_namespace)["metadata"]["name"]
    assert resource("RoleBinding", "vllm-router")["subjects"][0]["namespace"] == namespace
    together = parser.parse_args(compose()["router"]["command"][1:])
    assert together.vllm_pd_disaggregation and given.kv_connector == together.kv_connector == "nixl"
    for url in (together.prefill, together.decode):
        role, port = str(url).split("//")[1].split("'")[0].split(":")
        assert port == option(compose()[role]["command"], "--port")


def test_servers_end_after_their_leases():
    """A prefill server waits for longer than a lease lasts before SIGTERM; each has time for what it has to do after it."""
    for role in ROLES:
        pod = resource("Deployment", role)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        _, pause = container["lifecycle"]["preStop"]["exec"]["command"]
        drain = int(option(container["args"], "--shutdown-timeout"))
        assert pod["terminationGracePeriodSeconds"] >= int(pause) + drain + 15
        lease_s = transfer_config(container["args"])["kv_connector_extra_config"]["lease_seconds"]
        assert role == "decode" or int(pause) > lease_s


def test_ports_agree():
    """Side channel and fabric have the same ports in variables, containers, services and the network policy."""
    for policy in (resource("NetworkPolicy", "kvxfer-servers"), *documents("llm-d/network-policy.yaml")):
        open_to_servers = policy["spec"]["ingress"][1]["ports"]
        fabric = next(port for port in open_to_servers if "endPort" in port)
        assert {port["port"] for port in open_to_servers} == {"side-channel", fabric["port"]}
        for role in ROLES:
            container = server(role)
            chosen = transfer_config(container["args"])["kv_connector_extra_config"]["agent_options"]["port_range"]
            assert chosen == f"{fabric['port']}-{fabric['endPort']}"
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports == {
                "http": int(option(container["args"], "--port")),
                "side-channel": int(environment(container)["KVXFER_SIDE_CHANNEL_PORT"]),
            }
            (service,) = [each for each in documents(f"base/{role}.yaml") if each["kind"] == "Service"]
            assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == ports
            assert service["spec"]["clusterIP"] == "None"


def test_the_variant_for_llm_d_differs_in_the_port_only():
    """vLLM's command line of the decode server there is the base's, at the port that the routing proxy asks."""
    (patch,) = documents("llm-d/decode.yaml")
    pod = patch["spec"]["template"]["spec"]
    ours, base = pod["containers"][0]["args"], server("decode")["args"]
    assert [word for word in ours if not word.startswith("--port=")] == [
        word for word in base if not word.startswith("--port=")
    ]
    assert option(pod["initContainers"][0]["args"], "--vllm-port") == option(ours, "--port")
    assert option(pod["initContainers"][0]["args"], "--port") == option(base, "--port")


def test_no_secret_is_in_the_repository():
    """The secret is a file that git ignores, of which each user makes their own."""
    generated = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())["secretGenerator"]
    assert generated == [{"name": "kvxfer-secret", "files": ["secret"]}]
    ignored = (DEPLOY.parent / ".gitignore").read_text().splitlines()
    assert {"/deploy/secret", "/deploy/kubernetes/base/secret"} <= set(ignored)
