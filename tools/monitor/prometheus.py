# SPDX-License-Identifier: Apache-2.0
"""Prometheus as a child process, with the project's rules in a time that may run faster."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import yaml

from tools.serve.client import get
from tools.serve.process import ServerProcess, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "kvxfer.rules.yml"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\[|offset )(\d+)([smhd])\b")


def scaled(rules: Any, factor: float) -> Any:
    """Copy rules with each duration multiplied, and evaluated each second."""

    def shorter(amount: str, unit: str) -> str:
        return f"{max(1, round(int(amount) * _SECONDS[unit] * factor))}s"

    def of_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
        expr = _DURATION.sub(lambda found: found[1] + shorter(found[2], found[3]), rule["expr"])
        wait = {"for": shorter(rule["for"][:-1], rule["for"][-1])} if "for" in rule else {}
        return {**rule, "expr": expr, **wait}

    return {
        "groups": [
            {**group, "interval": "1s", "rules": [of_rule(rule) for rule in group["rules"]]}
            for group in rules["groups"]
        ]
    }


@dataclass(frozen=True)
class Alert:
    """One alert as Prometheus tells it; ``state`` is ``pending`` or ``firing``."""

    name: str
    state: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


class Prometheus(ServerProcess):
    """Prometheus that scrapes servers each second; ``targets`` are their addresses by job."""

    def __init__(self, targets: Mapping[str, str], folder: Path, *, factor: float = 1.0) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        folder.mkdir(parents=True, exist_ok=True)
        rules, config = folder / "rules.yml", folder / "prometheus.yml"
        rules.write_text(yaml.safe_dump(scaled(yaml.safe_load(RULES.read_text()), factor)))
        scrapes = [{"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()]
        times = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config.write_text(yaml.safe_dump({"global": times, "rule_files": [str(rules)], "scrape_configs": scrapes}))
        super().__init__(
            "prometheus",
            [
                *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
                *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
            ],
            log=folder / "prometheus.log",
            healthy=lambda: get(self.url, "/-/ready", timeout_s=2.0)[0] == 200,
        )

    def _ask(self, path: str, **query: object) -> Any:
        status, body = get(self.url, f"/api/v1/{path}?{urlencode(query)}")
        answer = json.loads(body)
        if status != 200 or answer["status"] != "success":
            raise ValueError(f"{path}: {body:.500}")
        return answer["data"]

    def scrapes_all(self) -> bool:
        """Whether each server has answered."""
        targets = self._ask("targets", state="active")["activeTargets"]
        return bool(targets) and all(target["health"] == "up" for target in targets)

    def alerts(self) -> list[Alert]:
        """All alerts that are pending or fire."""
        return [
            Alert(each["labels"]["alertname"], each["state"], each["labels"], each["annotations"])
            for each in self._ask("alerts")["alerts"]
        ]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {alert.name for alert in self.alerts() if alert.state == "firing"}

    def has_fired(self) -> set[str]:
        """Names of the alerts that have fired at any time."""
        found = self._ask("series", **{"match[]": 'ALERTS{alertstate="firing"}'})
        return {labels["alertname"] for labels in found}

    def curves(
        self, expr: str, start_s: float, end_s: float, step_s: float
    ) -> Iterator[tuple[dict[str, str], list[float], list[float]]]:
        """Labels, times and values of each series of a query."""
        for series in self._ask("query_range", query=expr, start=start_s, end=end_s, step=step_s)["result"]:
            times, values = zip(*series["values"], strict=True)
            yield series["metric"], list(times), [float(value) for value in values]
