"""The report of a study: tables (Markdown, CSV), plots (PNG) and a page that needs nothing else (HTML)."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flatprune.errors import InputError
from flatprune.files.atomic import damaged, read_bytes, sha256, write_atomically
from flatprune.files.records import Kind, read_record, write_record
from flatprune.reporting.drawing import png
from flatprune.reporting.page import card, document, duration, figure_of, value_rows
from flatprune.study.grid import Study, read_study
from flatprune.study.plan import DATA, DATA_FILE, Plan
from flatprune.study.plots import figure
from flatprune.study.results import Group, Results
from flatprune.study.tables import Table, differences, groups_csv, groups_record, markdown, overview, runs_csv, sections
from flatprune.study.tables import details as details_table

STUDY_FILE = "study.yaml"
PAGE_FILE, TABLE_FILE, GROUPS_FILE, RUNS_FILE = "report.html", "table.md", "table.csv", "runs.csv"
RESULTS_FILE = "results.json"
_SLUG_LENGTH = 100  # characters
RESULTS = Kind("flatprune-results", 1)


def write_report(plan: Plan) -> Results:
    """Write tables, plots and page of what is there into the folder of the study.

    Args:
        plan: of the study; runs that are not there are left out and counted.

    Returns:
        The figures.
    """
    results, folder = Results(plan), plan.folder
    images = {}
    for name, groups in sections(results):
        if any(group.summaries for group in groups):
            images[name] = png(figure(results, groups, ": ".join(filter(None, (plan.study.title, name)))))
    for old in folder.glob("plot*.png"):
        old.unlink()
    files: dict[str, bytes | str] = {
        **dict(zip(_plot_names(images), images.values())),
        TABLE_FILE: markdown(results),
        GROUPS_FILE: groups_csv(results),
        RUNS_FILE: runs_csv(results),
        PAGE_FILE: _page(plan.study, results, images),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    digests = {name: sha256(read_bytes(folder / name)) for name in (*files, STUDY_FILE)}
    write_record(folder / RESULTS_FILE, RESULTS, {"groups": groups_record(results), "files": digests})
    return results


def open_study(folder: Path, *, retry: bool = False) -> Plan:
    """The plan of a study that lies in a folder, as far as it has been made.

    Raises:
        InputError: there is none.
    """
    for name in (STUDY_FILE, DATA_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; no study was begun there")
    ids = read_record(folder / DATA_FILE, DATA)
    study = read_study(folder / STUDY_FILE, Path(ids["data_dir"]) if ids["data_dir"] else None)
    if sha256(study.text) != ids["study"]:
        raise damaged(folder / STUDY_FILE, f"its SHA-256 is not that in {DATA_FILE}")
    return Plan(study, folder, ids["digests"], retry=retry)


def _page(study: Study, results: Results, images: dict[str, bytes]) -> str:
    groups = results.groups
    summaries = [summary for group in groups for summary in group.summaries.values()]
    ended, diverged, failed, missing = (
        sum(len(getattr(group, name)) for group in groups) for name in ("summaries", "diverged", "failed", "missing")
    )
    cards = [
        card("entries of the grid", f"{ended}", f"of {ended + diverged + failed + missing} have figures"),
        card("did not end", f"{diverged + failed}", f"{diverged} diverged, {failed} failed, {missing} not run yet"),
        card("training time", duration(sum(summary["seconds"] for summary in summaries)), "of all entries together"),
    ]
    body = [f"<p>{html.escape(study.description)}</p>", f'<div class="cards">{"".join(cards)}</div>']
    for name, image in images.items():
        body += [f"<h3>{html.escape(name)}</h3>" if name else "", figure_of(image, f"plots {name}")]
    for table in [*overview(results), *differences(results), details_table(results)]:
        body.append(f"<h3>{html.escape(table.title)}</h3>{_html(table)}")
    body.append(_not_ended(groups))
    body.append(f"<h3>The study</h3><pre>{html.escape(study.text.decode('utf-8-sig'))}</pre>")
    body.append(f'<h3>Versions</h3><table class="values">{value_rows(results.versions)}</table>')
    return document(study.title, f"{ended} runs · means over seeds, one standard deviation", "\n".join(body))


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _not_ended(groups: Sequence[Group]) -> str:
    reasons = {
        f"{group.name}, seed {seed}": message
        for group in groups
        for seed, message in {**group.diverged, **group.failed}.items()
    }
    if not reasons:
        return ""
    return f'<h3>Runs that did not end</h3><table class="values">{value_rows(reasons)}</table>'


def _plot_names(names: Iterable[str]) -> list[str]:
    """File names for plots: letters and digits of the sections' names, and a number where that is not one's own."""
    found: list[str] = []
    for name in names:
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")[:_SLUG_LENGTH]
        stem = "-".join(filter(None, ("plot", slug)))
        numbered = (f"{stem}{f'-{number}' if number else ''}.png" for number in itertools.count())
        found.append(next(file for file in numbered if file not in found))
    return found
