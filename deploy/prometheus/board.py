"""The Grafana board for whoever is on call: what waits, how starts went and why they were slow, what moves, what is missing.

`python deploy/prometheus/board.py` writes board.json, which the chart puts into a ConfigMap and which Grafana imports as it is. Every
query is one of PANELS; tests/test_board.py runs each of them on a real Prometheus. A panel that an alert is about leads to the alert's
part of RUNBOOK.md: where people read that file is the board's variable `runbook`, since Grafana can show no file of this repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

BOARD = Path(__file__).parent / "board.json"
MODELS = "label_values(zerowake_replicas, model)"
_PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
_RUNBOOK = "deploy/prometheus/RUNBOOK.md"  # as alerts have it


@dataclass(frozen=True)
class Panel:
    """One graph. queries: each with the legend of its series. unit: one of Grafana's. alerts: those that fire on what it shows."""

    title: str
    what: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    alerts: tuple[str, ...] = ()


def _quantile(share: float, histogram: str, by: str, where: str = "") -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({histogram}_bucket{{{where}}}[$__rate_interval])))"


_MODEL = 'model=~"$model"'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests and queue": (
        Panel(
            "Requests that wait",
            "For a replica, by model.",
            ((f"sum by (model) (zerowake_held_requests{{{_MODEL}}})", "{{model}}"),),
            alerts=("ZerowakeQueueRefusing",),
        ),
        Panel(
            "Replicas",
            "Ready or draining, and those that sleep in their pods.",
            (
                (f"sum by (model) (zerowake_replicas{{{_MODEL}}})", "{{model}}"),
                (f"sum by (model) (zerowake_sleeping_replicas{{{_MODEL}}})", "{{model}} asleep"),
            ),
        ),
        Panel(
            "Requests answered",
            "A second, by the answer's status; 499: the client left.",
            ((f"sum by (model, code) (rate(zerowake_requests_total{{{_MODEL}}}[$__rate_interval]))", "{{model}} {{code}}"),),
            "reqps",
        ),
        Panel(
            "Requests refused",
            "By the gateway itself, a second, by reason.",
            ((f"sum by (model, reason) (rate(zerowake_requests_refused_total{{{_MODEL}}}[$__rate_interval]))", "{{model}} {{reason}}"),),
            "reqps",
            ("ZerowakeQueueRefusing",),
        ),
        Panel(
            "To the first byte, of all requests",
            "The slowest in twenty.",
            ((_quantile(0.95, "zerowake_first_byte_seconds", "model", _MODEL), "{{model}}"),),
            "s",
        ),
        Panel(
            "Held until a replica took it",
            "The slowest in twenty of the requests that had to wait.",
            ((_quantile(0.95, "zerowake_held_seconds", "model", _MODEL), "{{model}}"),),
            "s",
        ),
    ),
    "Starts from zero": (
        Panel(
            "Scale-ups by origin",
            "A second, by how their replica was made. Cold: no snapshot was used.",
            ((f"sum by (origin) (rate(zerowake_activation_seconds_count{{{_MODEL}}}[$__rate_interval]))", "{{origin}}"),),
            "ops",
            ("ZerowakeColdFallbacks",),
        ),
        Panel(
            "Seconds of a scale-up, by origin",
            "First byte in to first byte out, the slowest in twenty. The objective is five seconds for 95 in 100.",
            ((_quantile(0.95, "zerowake_activation_seconds", "origin", _MODEL), "{{origin}}"),),
            "s",
            ("ZerowakeActivationsLate", "ZerowakeActivationsOftenLate"),
        ),
        Panel(
            "Time by phase",
            "Of the mean scale-up.",
            (
                (
                    f"sum by (phase) (rate(zerowake_activation_phase_seconds_sum{{{_MODEL}}}[$__rate_interval]))"
                    f" / on () group_left () sum(rate(zerowake_activation_seconds_count{{{_MODEL}}}[$__rate_interval]) > 0)",
                    "{{phase}}",
                ),
            ),
            "s",
            ("ZerowakeActivationsLate",),
        ),
        Panel(
            "Fallbacks",
            "Snapshots that were asked for and not restored, a second, by reason.",
            ((f"sum by (model, reason) (rate(zerowake_restore_fallbacks_total{{{_MODEL}}}[$__rate_interval]))", "{{model}} {{reason}}"),),
            "ops",
            ("ZerowakeColdFallbacks",),
        ),
    ),
    "Nodes: rungs and budgets": (
        Panel(
            "Found on which rung",
            "Replicas made of a snapshot, a second, by where it stood.",
            ((f"sum by (rung) (rate(zerowake_restore_rungs_total{{{_MODEL}}}[$__rate_interval]))", "{{rung}}"),),
            "ops",
        ),
        Panel(
            "Images in memory", "Of each node, those on their way there, too.", (("zerowake_node_staged_bytes", "{{instance}}"),), "bytes"
        ),
        Panel(
            "Replicas, standbys and pods that sleep",
            "Of each node.",
            (
                ("zerowake_node_replicas", "{{instance}} replicas"),
                ("zerowake_node_standbys", "{{instance}} {{rung}}"),
                ("zerowake_node_sleeping_pods", "{{instance}} {{rung}} in pods"),
            ),
        ),
        Panel(
            "Snapshots on the disk",
            "Of each node, by what is behind their names.",
            (("zerowake_node_snapshots", "{{instance}} {{state}}"),),
            alerts=("ZerowakeSnapshotUnusable",),
        ),
    ),
    "Staging": (
        Panel(
            "Bytes that go up",
            "To each rung of each node, a second.",
            (("sum by (instance, rung) (rate(zerowake_staged_bytes_total[$__rate_interval]))", "{{instance}} {{rung}}"),),
            "Bps",
        ),
        Panel(
            "Seconds of one staging",
            "The slowest in twenty, by rung.",
            ((_quantile(0.95, "zerowake_staging_seconds", "rung"), "{{rung}}"),),
            "s",
        ),
        Panel(
            "Under way",
            "Snapshots that go up now.",
            (("sum(zerowake_plan_stagings_under_way)", "snapshots"),),
            alerts=("ZerowakeStagingBehind",),
        ),
        Panel(
            "The oldest of them",
            "For how long it has been under way.",
            (("max(zerowake_plan_staging_oldest_seconds)", "oldest"),),
            "s",
            ("ZerowakeStagingBehind",),
        ),
        Panel(
            "Stagings, by what became of them",
            "A second.",
            (("sum by (rung, result) (rate(zerowake_plan_stagings_total[$__rate_interval]))", "{{rung}} {{result}}"),),
            "ops",
            ("ZerowakeStagingFailing",),
        ),
        Panel(
            "Fetched",
            "From stores and from other agents, a second.",
            (("sum by (kind) (rate(zerowake_fetched_bytes_total[$__rate_interval]))", "{{kind}}"),),
            "Bps",
        ),
        Panel(
            "What each source gives",
            "While it is read from, smoothed.",
            (("zerowake_node_source_bytes_per_second", "{{instance}} from {{source}}"),),
            "Bps",
        ),
        Panel(
            "Sources that give nothing",
            "1: it gave nothing when it was asked last.",
            (("zerowake_node_source_fails", "{{instance}} from {{source}}"),),
        ),
    ),
    "Forecast": (
        Panel(
            "Hits and misses",
            "Minutes a second in which a request came for an idle model, by whether it was foretold; and alarms for none.",
            (
                ("sum by (foretold) (rate(zerowake_forecast_requests_total[$__rate_interval]))", "foretold: {{foretold}}"),
                ("sum(rate(zerowake_forecast_false_alarms_total[$__rate_interval]))", "false alarms"),
                ("sum(rate(zerowake_ahead_hits_total[$__rate_interval]))", "found an image staged ahead"),
            ),
        ),
        Panel(
            "Staged ahead of need, and wasted",
            "Bytes a second; wasted: they left memory before a request came.",
            (
                ("sum(rate(zerowake_ahead_fetched_bytes_total[$__rate_interval]))", "staged"),
                ("sum(rate(zerowake_ahead_wasted_bytes_total[$__rate_interval]))", "wasted"),
            ),
            "Bps",
        ),
        Panel(
            "Is it worth it",
            "1: of late the forecast was better than mean rates; and whether snapshots go into memory by it.",
            (("max(zerowake_forecast_worth_it)", "better"), ("max(zerowake_ahead_active)", "stages ahead")),
        ),
    ),
    "Captures": (
        Panel(
            "Seconds of a capture",
            "Taken and proved, the mean since the agent's start: captures are too few for a rate.",
            (("sum by (model) (zerowake_capture_seconds_sum) / sum by (model) (zerowake_capture_seconds_count)", "{{model}}"),),
            "s",
        ),
        Panel(
            "Captures that failed",
            "Since each agent's start, by reason.",
            (("sum by (model, reason) (zerowake_capture_failures_total)", "{{model}} {{reason}}"),),
            alerts=("ZerowakeCaptureFailing",),
        ),
    ),
    "GPU memory": (
        Panel("Who has a GPU's memory", "Of each node's GPUs.", (("zerowake_node_gpu_bytes", "{{instance}} {{gpu}} {{holder}}"),), "bytes"),
        Panel(
            "What gpumem holds and lends",
            "Weights and scratch are lent; idle weights are given up for others.",
            (
                ("zerowake_gpumem_held_bytes", "{{instance}} {{gpu}} {{use}}"),
                ("zerowake_gpumem_wanted_bytes", "{{instance}} {{gpu}} wanted"),
            ),
            "bytes",
            ("ZerowakePoolNearlyFull", "ZerowakeGpuMemoryNotGivenBack"),
        ),
        Panel(
            "Owed by the device",
            "What gpumem is to hold, and the device does not give it.",
            (("zerowake_gpumem_owed_bytes", "{{instance}} {{gpu}}"),),
            "bytes",
            ("ZerowakeGpuMemoryOwed",),
        ),
        Panel(
            "gpumem's arena",
            "Host memory through which bytes go to a GPU.",
            (("zerowake_gpumem_arena_bytes", "{{instance}} {{use}}"),),
            "bytes",
            ("ZerowakeArenaNearlyFull",),
        ),
        Panel(
            "Leases", "Clients that are connected to gpumem: a connection is a lease.", (("zerowake_gpumem_connections", "{{instance}}"),)
        ),
    ),
    "KEDA and the programs": (
        Panel(
            "Streams that KEDA holds open",
            "By RPC. Without StreamIsActive nothing is pushed.",
            (("sum by (rpc) (zerowake_keda_streams_open)", "{{rpc}}"),),
            alerts=("ZerowakeKedaNotConnected",),
        ),
        Panel(
            "Pushes",
            "A second, by what caused them.",
            (("sum by (cause) (rate(zerowake_keda_pushes_total[$__rate_interval]))", "{{cause}}"),),
            "ops",
            ("ZerowakeScaledWithoutKeda",),
        ),
        Panel(
            "From a request to the push",
            "The slowest in a hundred.",
            (("histogram_quantile(0.99, sum by (le) (rate(zerowake_keda_push_seconds_bucket[$__rate_interval])))", "push"),),
            "s",
        ),
        Panel(
            "Programs and agents that answer",
            "1: it does. `up` is Prometheus' own view; agents are the scaler's, gpumem the agent's.",
            (
                ("max by (node) (zerowake_agent_up)", "agent of {{node}}"),
                ("zerowake_gpumem_up", "gpumem at {{instance}}"),
                ("up * on (instance, job) group_left () group by (instance, job) (process_start_time_seconds)", "{{job}} {{instance}}"),
            ),
            alerts=("ZerowakeAgentGone", "ZerowakeGpumemSilent"),
        ),
        Panel(
            "Certificates end in",
            "Of each program, that which ends first.",
            (("min by (instance, file) (zerowake_tls_certificate_expiry_timestamp_seconds) - time()", "{{instance}} {{file}}"),),
            "s",
            ("ZerowakeCertificateEnds",),
        ),
        Panel(
            "Sources of demand",
            "0: the source's value does not count.",
            (("min by (model, source) (zerowake_source_up)", "{{model}} {{source}}"),),
            alerts=("ZerowakeSourceSilent",),
        ),
    ),
}


def _anchors() -> dict[str, str]:
    """Of each alert, where in the runbook its part begins."""
    groups = yaml.safe_load((Path(__file__).parent / "rules.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    return {rule["alert"]: rule["annotations"]["runbook_url"].partition("#")[2] for rule in rules}


def _drawn(panel: Panel, anchors: Mapping[str, str]) -> timeseries.Panel:
    links = [
        dashboard.DashboardLink(alert).type(DashboardLinkType.LINK).url(f"${{runbook}}#{anchors[alert]}").target_blank(True)
        for alert in panel.alerts
    ]
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.what)
        .datasource(_PROMETHEUS)
        .unit(panel.unit)
        .min(0)
        .height(8)
        .span(8)
        .links(list(links))
        .legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    for number, (query, legend) in enumerate(panel.queries):
        # The dots of a histogram's exemplars carry the activation's id.
        target = prometheus.Dataquery().expr(query).legend_format(legend).range().ref_id(chr(ord("A") + number))
        made.with_target(target.exemplar("_bucket" in query).datasource(_PROMETHEUS))
    return made


def board() -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard("zerowake")
        .uid("zerowake")
        .description("Model servers scaled from zero: what waits where, and why a start was slow.")
        .tags(["zerowake"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(_PROMETHEUS)
            .query(MODELS)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
        )
        .with_variable(
            dashboard.TextBoxVariable("runbook")
            .label("Runbook")
            .description("Where you read deploy/prometheus/RUNBOOK.md: what the links of panels begin with.")
            .default_value(_RUNBOOK)
            .current(VariableOption(selected=True, text=_RUNBOOK, value=_RUNBOOK))
        )
    )
    number, anchors = 0, _anchors()
    for title, panels in ROWS.items():
        number += 1
        made.with_row(dashboard.Row(title).id(number))
        for panel in panels:
            number += 1
            made.with_panel(_drawn(panel, anchors).id(number))
    return made


def text() -> str:
    return json.dumps(board().build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    BOARD.write_text(text())
