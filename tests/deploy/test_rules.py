# SPDX-License-Identifier: Apache-2.0
"""Alert rules and the dashboard, by Prometheus's own promtool: each alert fires on the series of its fault and on no other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvxfer.metrics import COUNTERS, LABEL_VALUES
from kvxfer_serving.refusals import RefusalReason
from tests.deploy import metric_names

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "kvxfer.rules.yml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Prometheus) is not installed")

GROWS, STAYS = "0+10x60", "3x60"
BYTES, SECONDS = "0+10e9x60", "0+0.5x60"


def vllm(name, **labels):
    return "vllm:" + series(name, model_name="m", engine="0", **labels)


def series(name, **labels):
    known = {"job": "decode", "instance": "a", **labels}
    return f"{name}{{{','.join(f'{label}={json.dumps(value)}' for label, value in known.items())}}}"


VLLM = {
    vllm("request_success_total", finished_reason="length"): GROWS,
    vllm("kv_cache_usage_perc"): "0.95x60",
    vllm("num_requests_waiting"): "2x60",
    vllm("kvxfer_transfer_seconds_count"): GROWS,
    vllm("kvxfer_transfer_seconds_sum"): SECONDS,
    vllm("kvxfer_transfer_bytes_sum"): BYTES,
    vllm("kvxfer_released_leases_total"): GROWS,
    **{
        vllm(f"kvxfer_{name}_total"): STAYS
        for name in (
            "partial_bytes",
            "expired_leases",
            "slot_revocations",
            "agent_resets",
            "internal_errors",
            "local_hits",
        )
    },
    **{vllm("kvxfer_failed_transfers_total", reason=name): "0x60" for name in ("PeerTimeoutError", "LeaseEndedError")},
    **{vllm("kvxfer_refused_messages_total", reason=name): "0x60" for name in ("unauthenticated", "stale_epoch")},
    **{vllm("kvxfer_refused_params_total", reason=reason.value): "0x60" for reason in RefusalReason},
}
"""A vLLM server in good health, busy, with a cache that is nearly full."""

TRANSFORMERS = {
    series("vllm:kv_cache_usage_perc"): "0.95x60",
    series("vllm:num_requests_waiting"): "2x60",
    series("kvxfer_transfer_seconds_count"): GROWS,
    series("kvxfer_transfer_seconds_sum"): SECONDS,
    **{series(name): STAYS for name in COUNTERS if name not in LABEL_VALUES},
    **{series(name, **{label: value}): "0x60" for name, (label, values) in LABEL_VALUES.items() for value in values},
    **{series("kvxfer_refused_params_total", reason=reason.value): "0x60" for reason in RefusalReason},
    series("kvxfer_bytes_total"): BYTES,
    series("kvxfer_transfers_total", outcome="done"): GROWS,
    series("kvxfer_leases_total", end="read"): GROWS,
}
"""The same of a server of kvxfer_transformers.serve."""

GROWTH = "0x9 0+1x50"
FAULTS = {
    "KvxferParametersRefused": ("refused_params_total", {"reason": "no_lease"}),
    "KvxferPeersUnreachable": ("failed_transfers_total", {"reason": "PeerTimeoutError"}),
    "KvxferServersDiffer": ("failed_transfers_total", {"reason": "IncompatibleError"}),
    "KvxferSecretsDiffer": ("refused_messages_total", {"reason": "unauthenticated"}),
    "KvxferMessagesRefused": ("refused_messages_total", {"reason": "flood"}),
    "KvxferLeasesExpire": ("expired_leases_total", {}),
    "KvxferStagingExhausted": ("slot_revocations_total", {}),
    "KvxferBytesDiffer": ("failed_transfers_total", {"reason": "IntegrityError"}),
    "KvxferTransfersFail": ("failed_transfers_total", {"reason": "TransferFailedError"}),
    "KvxferAgentResets": ("agent_resets_total", {}),
    "KvxferDefect": ("internal_errors_total", {}),
}
"""One counter that grows by 1 a minute is the fault, but where another growth is given below. Those with more follow below."""

OF_TRANSFORMERS = {
    "failed_transfers_total": ("transfers_total", {}, "reason", "outcome"),
    "expired_leases_total": ("leases_total", {"end": "expired"}, "", ""),
    "internal_errors_total": ("internal_errors_total", {"where": "data"}, "", ""),
}
"""Counters that have another name there: its name, more labels, and a label with another name."""


def fault_of(alert, engine):
    """Series of a fault, in the names of an engine."""
    name, labels = FAULTS[alert]
    growth = "0x9 0+5x50" if alert == "KvxferMessagesRefused" else GROWTH
    if engine == "vllm":
        return {vllm(f"kvxfer_{name}", **labels): growth}
    name, more, old, new = OF_TRANSFORMERS.get(name, (name, {}, "", ""))
    renamed = {new if label == old else label: value for label, value in labels.items()}
    return {series(f"kvxfer_{name}", **renamed, **more): growth}


def firing(folder, *, minutes=40, **given):
    """Names of the alerts that fire at a minute, by promtool, which tells what it found when it is asked for an absurdity."""
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in given["input"].items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": f"{minutes}m",
                        "exp_samples": [{"labels": '{alertname="none"}', "value": -1}],
                    }
                ],
            }
        ],
    }
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    (got,) = re.findall(r"got:(.*)", done.stdout + done.stderr)
    assert re.search(r"exp:", done.stdout + done.stderr), done.stderr
    return set(re.findall(r'alertname="(\w+)"', got))


@needs_promtool
def test_the_rules_are_valid():
    """Promtool finds no error in the rules."""
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("healthy", [VLLM, TRANSFORMERS], ids=["vllm", "transformers"])
def test_a_healthy_server_raises_no_alert(tmp_path, healthy):
    """No alert fires for a busy server whose transfers succeed."""
    assert firing(tmp_path, input=healthy) == set()


@needs_promtool
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("alert", FAULTS)
def test_an_alert_fires_on_its_fault(tmp_path, alert, engine):
    """The alert for a fault fires, and no other one."""
    healthy = VLLM if engine == "vllm" else TRANSFORMERS
    expected = {alert}
    if alert == "KvxferLeasesExpire":
        expected.add("KvxferLeasesFillTheCache")  # the cache of the healthy server is nearly full
    assert firing(tmp_path, input={**healthy, **fault_of(alert, engine)}) == expected


@needs_promtool
def test_the_first_count_of_a_new_series_is_seen(tmp_path):
    """An error of a hook, whose series begins with it, is an alert."""
    begins = {vllm("kvxfer_hook_errors_total", hook="poll"): "_x36 1x20"}
    assert firing(tmp_path, input={**VLLM, **begins}) == {"KvxferDefect"}
    assert firing(tmp_path, input={**VLLM, vllm("kvxfer_hook_errors_total", hook="poll"): "1x60"}) == set()


@needs_promtool
def test_nothing_is_transferred(tmp_path):
    """Requests without any transfer are an alert; prompts that are in the decode server's own cache are none."""
    idle = {**VLLM, vllm("kvxfer_transfer_seconds_count"): STAYS}
    assert firing(tmp_path, input=idle) == {"KvxferNothingTransferred"}
    assert firing(tmp_path, input={**idle, vllm("kvxfer_local_hits_total"): GROWS}) == set()


@needs_promtool
def test_a_slow_link(tmp_path):
    """Transfers of the same size at a third of last day's speed are an alert; small ones are none, nor are those that wait for prefill."""
    seconds, nbytes = vllm("kvxfer_transfer_seconds_sum"), vllm("kvxfer_transfer_bytes_sum")
    long = {each: re.sub(r"x\d+$", "x120", values) for each, values in VLLM.items()}
    slow = {**long, seconds: "0+0.5x80 40+1.5x40"}
    for given, expected in (
        (slow, {"KvxferSlowLink"}),
        (long, set()),
        ({**slow, nbytes: "0+10e9x80 800e9+1e9x40"}, set()),
        ({**slow, vllm("kvxfer_partial_bytes_total"): "0+1e9x120"}, set()),
    ):
        assert firing(tmp_path, input=given, minutes=100) == expected
    of_the_other = {each: re.sub(r"x\d+$", "x120", values) for each, values in TRANSFORMERS.items()}
    of_the_other[series("kvxfer_transfer_seconds_sum")] = "0+0.5x80 40+1.5x40"
    assert firing(tmp_path, input=of_the_other, minutes=100) == {"KvxferSlowLink"}


def test_every_alert_is_tested_and_says_what_to_do():
    """Each alert has a test, a severity, and a summary, description, cause and cure of which each is a sentence."""
    assert set(ALERTS) == {*FAULTS, "KvxferLeasesFillTheCache", "KvxferNothingTransferred", "KvxferSlowLink"}
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description", "cause", "cure"}
        assert rule["annotations"]["cure"].strip().endswith(".") and rule["annotations"]["cause"].strip().endswith(".")
        assert f"`{name}`" in page


def test_rules_and_dashboard_use_metrics_that_exist():
    """Each metric of a query is exported by one of the two engines, or recorded by a rule."""
    known = metric_names.exported() | {
        rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule
    }
    for where, query in metric_names.queries():
        names = metric_names.used(query)
        assert names and names <= known, f"{where}: {sorted(names - known)}"


def test_the_dashboard_is_whole():
    """The dashboard has a schema version of Grafana 10 or later, panels that do not overlap, and a legend for each query."""
    board = json.loads((ROOT / "deploy" / "grafana" / "kvxfer.json").read_text())
    assert board["schemaVersion"] >= 38 and board["uid"] == "kvxfer" and board["title"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not mine & cells, panel["title"]
        cells |= mine
        assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] and target["expr"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {each["name"] for each in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"} <= variables


def test_the_check_of_names_sees_one_that_does_not_exist():
    """A misspelt metric is found."""
    assert metric_names.used('rate(vllm:kvxfer_transfer_second_sum{a="kvxfer_no"}[5m])') == {
        "vllm:kvxfer_transfer_second_sum"
    }
    assert "vllm:kvxfer_transfer_second_sum" not in metric_names.exported()
    assert {"kvxfer_in_use", "kvxfer_bytes_total", "vllm:kvxfer_transfer_seconds_sum"} <= metric_names.exported()
