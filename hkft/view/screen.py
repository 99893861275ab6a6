"""The live screen of a run, and the report it leaves behind: renderables from what has been told so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hkft.events import Evaluated, Event, Finished, Notice, Sample, Stage, Started, TrainStep
from hkft.view import words
from hkft.view.chart import SMALLEST, Series, chart
from hkft.view.tables import rich_table

PROBE, VALIDATION, BEST = "yellow", "cyan", "bold green"
VERDICT_STYLES = {"healthy": "green", "unclear": "yellow", "underfitting": "yellow"}
WIDEST = 100  # columns: longer lines are harder to read, not richer
REPORT_ROWS, REPORT_CHART = 24, 16  # lines of the final table and chart


@dataclass(slots=True)
class Screen:
    """A listener that remembers, and a renderable of what it remembers, fitted to the terminal at each drawing.

    `clock` gives seconds; only differences count.
    """

    clock: Callable[[], float] = time.monotonic
    stage: Stage | None = None
    started: Started | None = None
    step: TrainStep | None = None
    first: tuple[int, float] | None = None  # the first step seen, and when
    evaluations: list[Evaluated] = field(default_factory=list)
    finished: Finished | None = None
    spinners: dict[bool, Spinner] = field(default_factory=lambda: {plain: _spinner(plain) for plain in (False, True)})

    def __call__(self, event: Event) -> None:
        match event:
            case Stage():
                self.stage = event
            case Started():
                self.started, self.stage = event, None
                self.step, self.first, self.finished = None, None, None
                self.evaluations.clear()
            case TrainStep():
                self.step, self.stage = event, None
                self.first = self.first or (event.step - 1, self.clock())
            case Evaluated():
                self.evaluations.append(event)
                self.stage = None
            case Finished():
                self.finished, self.stage = event, None
            case Notice() | Sample():
                pass

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        parts: list[RenderableType] = []
        if self.started and not self.finished:
            parts = _training(self, self.started, width, console.height, options.ascii_only)
        if self.stage:
            parts.append(_stage(self.stage, self.spinners[options.ascii_only], width, options.ascii_only))
        yield Constrain(Group(*parts), width)

    def seconds_left(self, step: TrainStep) -> float | None:
        """At the pace since the first step of this session, evaluations included; None before a second step."""
        if self.first is None or step.step <= self.first[0] + 1:
            return None
        pace = (self.clock() - self.first[1]) / (step.step - self.first[0] - 1)
        return pace * (step.total_steps - step.step)


def report(screen: Screen, finished: Finished, width: int, ascii_only: bool) -> RenderableType:
    """What stays on the terminal after the run: chart, table, verdict, figures, what fired."""
    width = min(width, WIDEST)
    parts: list[RenderableType] = []
    if screen.started:
        parts += [_header(screen.started, ascii_only), Text()]
    if screen.evaluations:
        parts += [*_chart(screen, width, REPORT_CHART, ascii_only), Text()]
        parts += [_evaluations(screen, width, REPORT_ROWS), *_parts(screen), Text()]
    verdict = finished.summary.get("verdict")
    if verdict:
        style = VERDICT_STYLES.get(verdict["name"], "red")
        title = Text(f"{verdict['name']}, {verdict['confidence']} confidence", style=f"bold {style}")
        parts += [Panel(Text(verdict["text"]), title=title, title_align="left", border_style=style), Text()]
    parts += [_pairs(words.figures(finished.summary)), Text()]
    if finished.sites:
        parts += [rich_table(words.SITE_COLUMNS, words.site_rows(finished.sites), "What the dropout did"), Text()]
    parts.append(Text.assemble(("run folder  ", "dim"), finished.run, overflow="fold"))
    return Constrain(Group(*parts), width)


def next_steps(steps: Sequence[tuple[str, str | None]]) -> list[Text]:
    """What to do next, each with its command on a line of its own: to be printed unwrapped, so that it can be copied whole."""
    lines = []
    for why, command in steps:
        lines.append(Text.assemble(("next  ", "dim"), why))
        lines += [Text(f"  {command}", style="bold")] if command else []
    return lines


def notice(event: Notice, ascii_only: bool) -> Text:
    """A notice as a line above the screen."""
    mark, style = ("!", "yellow") if event.level == "warning" else ("-" if ascii_only else "·", "dim")
    return Text.assemble((f"{mark} ", style), event.text)


def sample(event: Sample) -> Text:
    """An example as it is trained on: what is learned stands out."""
    pieces = [(text, "bold green" if learned else "dim") for text, learned in event.pieces]
    return Text.assemble(("an example, ", "dim"), ("what is learned of it", "bold green"), (":\n", "dim"), *pieces)


def done(stage: Stage, ascii_only: bool) -> Text:
    """A stage that is over, as a line above the screen."""
    total = f"  {stage.total:,}" if stage.total else ""
    return Text(f"{'+' if ascii_only else '✓'} {stage.text}{total}", style="dim")


def _training(screen: Screen, started: Started, width: int, height: int, ascii_only: bool) -> list[RenderableType]:
    told = _parts(screen) if screen.evaluations else []
    rows = max(2, min(8, (height - 16 - len(told)) // 3))
    lines = height - 16 - len(told) - rows
    parts: list[RenderableType] = [_header(started, ascii_only), Text(), *_progress(screen, started, width, ascii_only)]
    if screen.evaluations:
        parts.append(Text())
        if lines >= SMALLEST[1]:
            parts += [*_chart(screen, width, min(lines, REPORT_CHART), ascii_only), Text()]
        parts.append(_evaluations(screen, width, rows))
        parts += told
    if screen.step:
        parts.append(Text())
        parts.append(Text(words.objective(screen.step.objective, started.method), style="dim"))
    return parts


def _header(started: Started, ascii_only: bool) -> RenderableType:
    dot = " - " if ascii_only else " · "
    place = f"  {started.device}, seed {started.seed}"
    method = (started.method, f"bold {VALIDATION}")
    head = Text.assemble((started.recipe, "bold"), "  ", method, f"  {started.model}", (place, "dim"))
    facts = [
        f"{started.train_rows:,} rows",
        f"{started.validation_rows:,} validation",
        f"{started.probe_rows:,} probe",
        words.parameters(started.trainable_parameters, started.total_parameters),
    ]
    return Group(head, Text(dot.join(facts), style="dim"))


def _progress(screen: Screen, started: Started, width: int, ascii_only: bool) -> list[RenderableType]:
    step = screen.step
    at = max(step.step if step else 0, screen.evaluations[-1].step if screen.evaluations else 0)
    count = f"{at:,}/{started.total_steps:,}"
    bar = ProgressBar(started.total_steps, at, width=max(10, width - len(count) - 16), complete_style=VALIDATION)
    grid = Table.grid(padding=(0, 1))
    share = f"{at / max(started.total_steps, 1):4.0%}"
    grid.add_row(Text("step", style="dim"), Text(count), bar, Text(share, style="dim"))
    if step is None:
        return [grid, *([] if at else [Text("waiting for the first step", style="dim")])]
    left = screen.seconds_left(step)
    facts = [
        f"epoch {step.epoch:.2f} of {started.epochs:g}",
        f"{step.samples_per_s:,.0f} samples/s",
        f"{step.tokens_per_s:,.0f} tokens/s",
        *([f"{words.duration(left)} left"] if left is not None else []),
    ]
    return [grid, Text((" - " if ascii_only else " · ").join(facts), style="dim")]


def _chart(screen: Screen, width: int, height: int, ascii_only: bool) -> Sequence[RenderableType]:
    probe = [(event.step, event.train_probe["loss"]) for event in screen.evaluations]
    validation = [(event.step, event.validation["loss"]) for event in screen.evaluations]
    best = next(((e.step, e.validation["loss"]) for e in reversed(screen.evaluations) if e.best), None)
    lines = [
        Series("probe loss", probe, PROBE, "p", dotted=True),
        Series("validation loss", validation, VALIDATION, "v"),
    ]
    end = screen.started.total_steps if screen.started else None
    return chart(lines, max(width, SMALLEST[0]), height, x_max=end, best=best, ascii_only=ascii_only)


def _evaluations(screen: Screen, width: int, rows: int) -> Table:
    """The last evaluations, the best among them even if it is older. Narrow terminals lose the epoch, then a gap."""
    metric = screen.started.metric if screen.started else None
    has_metric = metric is not None and any(metric in event.validation for event in screen.evaluations)
    columns = [("", "step", 6), ("", "epoch", 5), ("loss", "probe", 6), ("loss", "validation", 10), ("loss", "gap", 6)]
    if has_metric and metric:
        columns += [(metric, "probe", len(metric)), (metric, "validation", 10), (metric, "gap", len(metric))]
    hidden, between = _hidden(columns, width)
    drawn = Table(box=None, padding=(0, between, 0, 0), pad_edge=False, header_style="dim")
    for index, (above, name, _) in enumerate(columns):
        if index not in hidden:
            drawn.add_column(Text(f"{above}\n{name}"), justify="right", no_wrap=True)
    drawn.add_column("", no_wrap=True)
    best = next((event for event in reversed(screen.evaluations) if event.best), None)
    for event in _shown(screen.evaluations, best, rows):
        cells = _cells(event, metric if has_metric else None)
        kept = [Text(cell) for index, cell in enumerate(cells) if index not in hidden]
        drawn.add_row(*kept, Text("best" if event is best else ""), style=BEST if event is best else None)
    return drawn


def _parts(screen: Screen) -> list[RenderableType]:
    """What the last look's loss is made of, where it was measured."""
    told = words.parts(screen.evaluations[-1])
    return [Text(), Text(", ".join(told), style="dim")] if told else []


def _hidden(columns: Sequence[tuple[str, str, int]], width: int) -> tuple[set[int], int]:
    """Which columns to leave out so that the table fits, and the spaces between the others."""
    choices: list[set[int]] = [set(), {1}, {1, len(columns) - 1}]
    for hidden in choices:
        sizes = [size for n, (_, _, size) in enumerate(columns) if n not in hidden]
        for between in (3, 2, 1):
            if sum(sizes) + between * len(sizes) + len("best") <= width:
                return hidden, between
    return choices[-1], 1


def _cells(event: Evaluated, metric: str | None) -> list[str]:
    sides = (event.train_probe, event.validation, event.gap)
    names = ["loss", *([metric] if metric else [])]
    return [str(event.step), f"{event.epoch:.2f}", *(words.number(side.get(name)) for name in names for side in sides)]


def _shown(evaluations: Sequence[Evaluated], best: Evaluated | None, rows: int) -> list[Evaluated]:
    last = list(evaluations[-rows:])
    return last if best is None or best in last else [best, *last[1:]]


def _pairs(pairs: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, value in pairs:
        grid.add_row(Text(label, style="dim"), Text(value))
    return grid


def _stage(stage: Stage, spinner: Spinner, width: int, ascii_only: bool) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    if stage.total is None:
        count = f"{stage.done:,}" if stage.done else ""
        grid.add_row(spinner, Text(stage.text), Text(count, style="dim"))
        return grid
    bar = ProgressBar(max(stage.total, 1), stage.done, width=max(8, min(30, width - len(stage.text) - 24)))
    grid.add_row(spinner, Text(stage.text), bar, Text(f"{stage.done:,}/{stage.total:,}", style="dim"))
    return grid


def _spinner(plain: bool) -> Spinner:
    return Spinner("line" if plain else "dots", style=VALIDATION)
