"""One page about one bundle: every table and chart that ``figures.json`` holds, each with where it comes from.

The HTML page needs nothing but itself: no script, no font, no image from elsewhere. The Markdown has the same tables.
A figure without provenance is not printed: the report is refused, and says what is missing where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from hhh_router.bundle import Manifest
from hhh_router.errors import DataError
from hhh_router.evaluation import report_sections as sections
from hhh_router.evaluation.blocks import Section
from hhh_router.evaluation.page import html_page, markdown_page
from hhh_router.evaluation.report_detection import detection_section, glance
from hhh_router.evaluation.report_parts import Row, printable_parts, provenance
from hhh_router.evaluation.svg import plain
from hhh_router.evaluation.tables import distinct


def render_report(manifest: Manifest, figures: Mapping[str, Any]) -> str:
    """The whole report as one HTML page; the same bytes for the same input.

    Args:
        manifest: Of the bundle that was measured.
        figures: What ``figures.json`` holds. Every part is optional, and is either a list of rows or
            ``{"command", "seed", "data_sha256", "rows": [...]}``. A row's command, seed and data hash are its own, else
            its part's; command and seed else those of the whole file.

    Raises:
        DataError: A figure has no command, seed, n or data hash, or is not in the shape that is drawn; each is named.
        MissingExtra: matplotlib is not installed.
    """
    return html_page(manifest, _sections(manifest, figures))


def render_markdown(manifest: Manifest, figures: Mapping[str, Any]) -> str:
    """The report's tables as Markdown, without the charts.

    Raises:
        DataError: As in `render_report`.
    """
    return markdown_page(manifest, _sections(manifest, figures))


def _sections(manifest: Manifest, figures: Mapping[str, Any]) -> list[Section]:
    parts = printable_parts(figures)
    # a row that names no system is the bundle's own
    detection = [{"system": manifest.name, **row} for row in parts.get("detection", [])]
    systems = distinct(row["system"] for row in detection)
    bundle = manifest.name if manifest.name in systems else next(iter(systems), manifest.name)
    builders: Mapping[str, Callable[[list[Row]], Iterable[Section]]] = {
        "detection": lambda _: [detection_section(detection, bundle)],
        "subgroups": sections.subgroups,
        "kinds": sections.kinds,
        "transfer": sections.transfer,
        "simplex": sections.simplex,
        "tradeoff": sections.tradeoff,
        "behaviour": partial(sections.behaviour, max_tokens=figures.get("behaviour_max_tokens")),
        "judge": sections.judge,
        "likelihood": sections.likelihood,
        "evasion": sections.evasion,
        "latency": sections.latency,
        "gates": sections.gates,
        "confidence": sections.confidence,
    }
    try:
        found = [*glance(detection, bundle, sections.targets(parts))]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _misshapen("detection, confidence or kinds", error) from error
    for name, rows in parts.items():
        try:
            found += builders[name](rows)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _misshapen(name, error) from error
    return [*found, provenance(parts, figures)]


def _misshapen(part: str, error: Exception) -> DataError:
    return DataError(
        f"figures.json: {plain(part)}: not in the shape the report draws ({plain(repr(error))})",
        hint="measure it again (hhh-router evaluate)",
    )
