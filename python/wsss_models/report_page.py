"""The HTML of a report. Every text that comes from outside goes through `_text`; a policy forbids all requests."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from wsss_models.data.artefacts import shown
from wsss_models.report import Case, Gallery, Panel, Run
from wsss_models.report_charts import chart
from wsss_models.report_style import STYLE
from wsss_models.report_subcategories import SubCategoryGallery

_BACKGROUND = "background"
_PROBLEMS = 20  # lines on the page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # no request, no script
_SECTIONS = {
    "results": "Results",
    "curves": "Training",
    "pictures": "Pictures",
    "subcategories": "Sub-categories",
    "settings": "Settings",
}
_SUB_CATEGORIES = "subcategories"  # section of the runs that have them


def page(
    runs: Sequence[Run],
    galleries: Sequence[Gallery],
    problems: Sequence[str] = (),
    sub_categories: Sequence[SubCategoryGallery] = (),
) -> str:
    """The whole document.

    Args:
        runs: one or more, of different names.
        galleries: their pictures, one a split; may be empty.
        problems: what could not be used, one line each.
        sub_categories: of the runs that have them.
    """
    title = runs[0].name if len(runs) == 1 else " / ".join(run.name for run in runs)
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>",
        f"<header><h1>{_text(title)}</h1>{_summary(runs)}</header>",
        _navigation(bool(sub_categories)),
        _notes(runs, problems),
        '<h2 id="results">Results</h2>',
        *(_comparison(runs) if len(runs) > 1 else _results(runs[0])),
        '<h2 id="curves">Training</h2>',
        *_curves(runs),
        '<h2 id="pictures">Pictures</h2>',
        *(part for gallery in galleries for part in _gallery(runs, gallery)),
        "" if galleries else "<p>No pictures on this page.</p>",
        f'<h2 id="{_SUB_CATEGORIES}">{_SECTIONS[_SUB_CATEGORIES]}</h2>' if sub_categories else "",
        *(part for gallery in sub_categories for part in _sub_categories(gallery, len(runs) > 1)),
        '<h2 id="settings">Settings</h2>',
        *(_settings(run, len(runs) > 1) for run in runs),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _navigation(sub_categories: bool) -> str:
    names = [name for name in _SECTIONS if name != _SUB_CATEGORIES or sub_categories]
    return "<nav>" + " ".join(f'<a href="#{name}">{_SECTIONS[name]}</a>' for name in names) + "</nav>"


def _summary(runs: Sequence[Run]) -> str:
    return "".join(f'<p class="soft">{_about(run, len(runs) > 1)}</p>' for run in runs)


def _about(run: Run, named: bool) -> str:
    facts = [f"<b>{_text(run.name)}</b>"] if named else []
    for key in ("preset", "refiner", "seed", "data"):
        if key in run.results:
            facts.append(f"{key} {_text(run.results[key])}")
    times = {k: v for k, v in run.results["stages"].items() if isinstance(v, (int, float)) and math.isfinite(v)}
    if times:
        facts.append(f"{_duration(sum(times.values()))} in all")
    return " · ".join(facts)


def _notes(runs: Sequence[Run], problems: Sequence[str]) -> str:
    lines = [
        f"{f'{run.name}: ' if len(runs) > 1 else ''}not in this run: {', '.join(run.missing)}"
        for run in runs
        if run.missing
    ]
    lines += [line for run in runs for line in run.problems]
    lines += problems[:_PROBLEMS]
    if len(problems) > _PROBLEMS:
        lines.append(f"and {len(problems) - _PROBLEMS} more")
    if not lines:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"


def _results(run: Run) -> Iterator[str]:
    rows = run.results["rows"]
    if not rows:
        yield "<p>results.json has no row.</p>"
        return
    times = run.results["stages"]
    head = ["stage", "split", "pictures", "mean IoU", "note"]
    body = [
        [_name(row.get("stage")), _plain(row.get("split")), _count(row.get("pictures")), _percent(row.get("miou")),
         _plain(row.get("note"))]
        for row in rows
    ]  # fmt: skip
    yield _table(head, body)
    classes = _classes(rows)
    if classes:
        yield "<h3>IoU of each class</h3>"
        head = ["class", *(_row_name(row) for row in rows)]
        yield _table(head, [[_name(c), *(_percent(row.get("per_class", {}).get(c)) for row in rows)] for c in classes])
    if times:
        yield "<h3>Time</h3>"
        yield _table(["stage", "time"], [[_name(k), f"<td>{_text(_duration(v))}</td>"] for k, v in times.items()])


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
    """Systems as columns: the mean of every stage, then the classes of each one's last row."""
    by_run = [{_row_name(row): row for row in run.results["rows"]} for run in runs]
    stages = list(dict.fromkeys(name for rows in by_run for name in rows))
    head = [run.name for run in runs]
    body = []
    for stage in stages:
        body.append([_name(stage), *_compared([rows.get(stage, {}).get("miou") for rows in by_run])])
    yield "<h3>Mean IoU</h3>"
    yield _table(["stage", *head], body) if body else "<p>No results.json has a row.</p>"
    last = [run.results["rows"][-1] if run.results["rows"] else {} for run in runs]
    classes = _classes(last)
    if classes:
        yield "<h3>IoU of each class, last stage</h3>"
        body = [[_name(c), *_compared([row.get("per_class", {}).get(c) for row in last])] for c in classes]
        yield _table(["class", *(f"{n} ({_row_name(r)})" for n, r in zip(head, last, strict=True))], body)
    yield "<h3>Time</h3>"
    names = list(dict.fromkeys(name for run in runs for name in run.results["stages"]))
    body = [[_name(n), *(f"<td>{_text(_duration(r.results['stages'].get(n)))}</td>" for r in runs)] for n in names]
    yield _table(["stage", *head], body) if body else "<p>No times.</p>"


def _compared(values: Sequence[object]) -> list[str]:
    """Cells of one line, the highest marked where they differ."""
    known = [v for v in values if _known(v)]
    best = max(known) if len(set(known)) > 1 else None
    return [_percent(v, best=best is not None and v == best) for v in values]


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    charts = [
        chart(f"{run.name}: {name}" if len(runs) > 1 else name, curves)
        for name in dict.fromkeys(name for run in runs for name in run.curves)
        for run in runs
        if (curves := run.curves.get(name)) is not None
    ]
    if not charts:
        yield "<p>No training log in this run.</p>"
        return
    yield '<p class="soft">Loss terms by step, faint as they are, and smoothed; the numbers are the last, smoothed.</p>'
    yield f'<div class="charts">{"".join(charts)}</div>'


def _gallery(runs: Sequence[Run], gallery: Gallery) -> Iterator[str]:
    of = [
        (f"{_text(run.name)}: " if len(runs) > 1 else "") + _text(text)
        for run, text in zip(runs, gallery.scored, strict=True)
        if text
    ]
    means = f" Scores are of {'; '.join(of)}." if of else ""
    yield f"<h3>{_text(gallery.title)}</h3>"
    yield f'<p class="soft">{_text(gallery.about)}.{means} A score is the mean IoU of one picture.</p>'
    keys = "".join(
        f'<li><span class="key" style="background:rgb({r},{g},{b})"></span>{_text(name)}</li>'
        for name, (r, g, b) in gallery.colours.items()
    )
    yield f'<ul class="legend">{keys}</ul>'
    if not gallery.sections:
        yield "<p>No pictures to show.</p>"
    for heading, cases in gallery.sections.items():
        yield f'<h4 class="section">{_text(heading)} <span class="soft">({len(cases)})</span></h4>'
        for case in cases:
            yield _case(runs, case)


def _case(runs: Sequence[Run], case: Case) -> str:
    classes = f' <span class="soft">{_text(", ".join(case.classes))}</span>' if case.classes else ""
    one = len(runs) == 1
    title = f"<h5>{_text(case.name)}{_score(case.scores[0]) if one else ''}{classes}</h5>"
    if one:
        strips = [_strip(case.name, [case.photograph, *case.made[0], case.truth])]
    else:
        strips = [_strip(case.name, [case.photograph, case.truth])]
        for run, score, panels in zip(runs, case.scores, case.made, strict=True):
            strips.append(f'<p class="run">{_text(run.name)}{_score(score)}</p>{_strip(case.name, panels)}')
    return f'<article class="case">{title}{"".join(strips)}</article>'


def _strip(name: str, panels: Sequence[Panel]) -> str:
    return f'<div class="strip" tabindex="0">{"".join(_panel(name, panel) for panel in panels)}</div>'


def _panel(name: str, panel: Panel) -> str:
    if panel.jpeg:
        width, height = panel.size
        alt = _text(f"{panel.title} of {name}")
        picture = f'<img src="data:image/jpeg;base64,{panel.jpeg}" width="{width}" height="{height}" alt="{alt}">'
    else:
        picture = f'<div class="none">{_text(panel.note)}</div>'
    return f"<figure>{picture}<figcaption>{_text(panel.title)}</figcaption></figure>"


def _sub_categories(gallery: SubCategoryGallery, named: bool) -> Iterator[str]:
    if named:
        yield f"<h3>{_text(gallery.run)}</h3>"
    yield (
        f'<p class="soft">Clusters of the features of each class\'s pictures, as {_text(gallery.stage)} was trained on;'
        " the pictures nearest to the center, the nearest first.</p>"
    )
    for name, parts in gallery.classes.items():
        pictures = sum(part.pictures for part in parts)
        yield (
            f'<details open><summary><b>{_text(name)}</b> <span class="soft">{_plural(pictures, "picture")},'
            f" {_plural(len(parts), 'sub-category', 'sub-categories')}</span></summary>"
        )
        for part in parts:
            yield f'<h5>{part.number} <span class="soft">{_plural(part.pictures, "picture")}</span></h5>'
            yield f'<div class="thumbs">{"".join(_thumbnail(panel) for panel in part.nearest)}</div>'
        yield "</details>"


def _thumbnail(panel: Panel) -> str:
    if not panel.jpeg:
        return f'<span class="soft">{_text(panel.title)}: {_text(panel.note)}</span>'
    width, height = panel.size
    alt = _text(panel.title)
    source = f"data:image/jpeg;base64,{panel.jpeg}"
    return f'<img src="{source}" width="{width}" height="{height}" alt="{alt}" title="{alt}">'


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _settings(run: Run, named: bool) -> str:
    parts = [f"<h3>{_text(run.name)}</h3>"] if named else []
    if not run.manifests:
        parts.append("<p>No training manifest in this run.</p>")
    for name, manifest in run.manifests.items():
        facts = [
            f"{key} {_text(manifest[key])}" for key in ("system", "seed", "precision", "device") if key in manifest
        ]
        versions = manifest.get("versions")
        if isinstance(versions, dict):
            facts += [f"{_text(package)} {_text(version)}" for package, version in versions.items()]
        values = "\n".join(shown(line) for line in json.dumps(manifest, indent=2, ensure_ascii=False).split("\n"))
        parts.append(
            f'<details><summary><b>{_text(name)}</b> <span class="soft">{" · ".join(facts)}</span></summary>'
            f"<pre>{html.escape(values)}</pre></details>"
        )
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`head` is plain text, the cells of `rows` are HTML."""
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _name(value: object) -> str:
    return f'<th scope="row">{_text("" if value is None else value)}</th>'


def _plain(value: object) -> str:
    return f"<td>{_text('' if value is None else value)}</td>"


def _count(value: object) -> str:
    return f'<td class="number">{value:,}</td>' if isinstance(value, int) else _plain(value)


def _percent(value: object, *, best: bool = False) -> str:
    """A share as a cell with a bar behind it."""
    if not _known(value):
        return '<td class="number soft">–</td>'
    kind = "number bar best" if best else "number bar"
    return f'<td class="{kind}" style="--share:{min(1.0, max(0.0, value)):.4f}">{100 * value:.2f}</td>'


def _score(score: float | None) -> str:
    return "" if score is None else f' <span class="score">{100 * score:.1f}</span>'


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _classes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of all rows, the background first, each once."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("per_class", {})))
    return sorted(names, key=lambda name: name != _BACKGROUND)


def _row_name(row: dict[str, Any]) -> str:
    return ", ".join(str(row[key]) for key in ("stage", "split") if row.get(key))


def _duration(seconds: Any) -> str:
    if not _known(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _text(value: object) -> str:
    """Printable, and nothing in it is markup."""
    return html.escape(shown(str(value)))
