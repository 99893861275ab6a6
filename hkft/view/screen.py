"""The live screen of a run, and the report it leaves behind: renderables from what has been told so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
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
TALL = 30  # lines of a terminal with room for air, and for more than the last looks
TABLE_HEAD, MOST_LOOKS = 2, 8  # lines above the looks; looks on the live screen
WIDEST_NUMBER = 8
NEEDS = {  # lines, by importance: the last are left out first
    "bar": 1,
    "chart": SMALLEST[1],
    "told": 1,
    "now": 1,
    "looks": TABLE_HEAD + 2,
    "pace": 1,
    "head": 1,
    "facts": 1,
}
GROUPS = (("head", "facts"), ("bar", "pace"), ("chart",), ("looks", "told"), ("now",))  # from the top


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
        elif self.stage:
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
        parts += [_head(screen.started, width, ascii_only), _facts(screen.started, width, ascii_only), Text()]
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
    """The parts that `height` has lines for, one line shorter than it: a terminal scrolls where its last is written."""
    wanted = {"head", "facts", "bar", "pace", "now"}
    if screen.evaluations:
        wanted |= {"looks", "told", *(["chart"] if width >= SMALLEST[0] else [])}
    lines = _layout(wanted, height)
    draw: dict[str, Callable[[], Sequence[RenderableType]]] = {
        "head": lambda: [_head(started, width, ascii_only)],
        "facts": lambda: [_facts(started, width, ascii_only)],
        "bar": lambda: [_bar(screen, started, width)],
        "pace": lambda: [_pace(screen, started, width, ascii_only)],
        "chart": lambda: _chart(screen, width, lines["chart"], ascii_only),
        "looks": lambda: [_evaluations(screen, width, lines["looks"] - TABLE_HEAD)],
        "told": lambda: [_told(screen.evaluations, width, "looks" in lines)],
        "now": lambda: [_now(screen, started, width, ascii_only)],
    }
    parts: list[RenderableType] = []
    for group in GROUPS:
        told = [part for name in group if name in lines for part in draw[name]()]
        parts += [Text()] if parts and told and f"above {group[0]}" in lines else []
        parts += told
    return parts


def _layout(wanted: Set[str], height: int) -> dict[str, int]:
    """How many lines each part has: what matters most comes first; air, more looks and more chart take what is left."""
    lines, room = {}, height - 1
    for name, need in NEEDS.items():
        if name in wanted and need <= room:
            lines[name] = need
            room -= need
    air = [group[0] for group in GROUPS[1:] if height >= TALL or group[0] in ("chart", "looks")]
    if room >= len(air) + 2:  # a chart of its smallest height needs them more
        lines |= {f"above {name}": 1 for name in air}
        room -= len(air)
    if "looks" in lines and height >= TALL:
        more = min(MOST_LOOKS - (lines["looks"] - TABLE_HEAD), room // 3)
        lines["looks"] += more
        room -= more
    if "chart" in lines:
        lines["chart"] = min(lines["chart"] + room, REPORT_CHART)
    return lines


def _head(started: Started, width: int, ascii_only: bool) -> Text:
    """Recipe, method, model and place. What is too long loses the model's path, then the device, then the seed."""
    room = width - cell_len(started.method) - 4
    names = (started.model, _short(started.model))
    places = (f"  {started.device}, seed {started.seed}", f"  seed {started.seed}", "")
    choices = [(name, place) for place in places for name in names]
    name, place = next(
        ((n, p) for n, p in choices if cell_len(started.recipe) + cell_len(n) + cell_len(p) <= room), choices[-1]
    )
    recipe = _cut(started.recipe, max(room // 2, room - cell_len(name + place)), ascii_only)
    name = _cut(name, room - cell_len(recipe + place), ascii_only)
    method = (started.method, f"bold {VALIDATION}")
    return Text.assemble((recipe, "bold"), "  ", method, f"  {name}", (place, "dim"), no_wrap=True, overflow="crop")


def _short(model: str) -> str:
    """The package, or the last part of a path or of a name on the hub."""
    path = model.rstrip("/")
    return path.removeprefix("package:").split("/")[0] if path.startswith("package:") else path.rsplit("/", 1)[-1]


def _facts(started: Started, width: int, ascii_only: bool) -> Text:
    rows = [
        f"{started.train_rows:,} rows",
        f"{started.validation_rows:,} validation",
        f"{started.probe_rows:,} probe",
    ]
    trained = f"{started.trainable_parameters:,}"
    share = f"trained ({started.trainable_parameters / started.total_parameters:.2%})"
    sizes = [
        words.parameters(started.trainable_parameters, started.total_parameters),
        f"{trained} parameters {share}",
        f"{trained} {share}",
    ]
    between = _dot(ascii_only)
    size = next((size for size in sizes if cell_len(between.join([*rows, size])) <= width), sizes[-1])
    return _line([*rows, size], width, between, "dim")


def _bar(screen: Screen, started: Started, width: int) -> RenderableType:
    at, total = _at(screen), f"{started.total_steps:,}"
    count = f"{at:>{len(total)},}/{total}"
    room = max(10, width - len(count) - 16)
    bar = ProgressBar(started.total_steps, at, width=room, style="dim", complete_style=VALIDATION)
    grid = Table.grid(padding=(0, 1))
    share = f"{at / max(started.total_steps, 1):4.0%}"
    grid.add_row(Text("step", style="dim"), Text(count), bar, Text(share, style="dim"))
    return grid


def _at(screen: Screen) -> int:
    return max(screen.step.step if screen.step else 0, screen.evaluations[-1].step if screen.evaluations else 0)


def _pace(screen: Screen, started: Started, width: int, ascii_only: bool) -> Text:
    step = screen.step
    if step is None:
        return _line([f"waiting for the {'next' if _at(screen) else 'first'} step"], width, "", "dim")
    left = screen.seconds_left(step)
    facts = [
        f"epoch {step.epoch:.2f} of {started.epochs:g}",
        *([f"{words.duration(left)} left"] if left is not None else []),
        f"{step.samples_per_s:,.0f} samples/s",
        f"{step.tokens_per_s:,.0f} tokens/s",
    ]
    return _line(facts, width, _dot(ascii_only))


def _now(screen: Screen, started: Started, width: int, ascii_only: bool) -> RenderableType:
    """The stage, or the objective of the last step: one line, so that nothing above it moves when a look begins."""
    if screen.stage:
        return _stage(screen.stage, screen.spinners[ascii_only], width, ascii_only)
    if not screen.step:
        return Text()
    value = screen.step.objective
    choices = [
        words.objective(value, started.method),
        words.objective(value, "none"),
        f"objective {words.number(value)} ({words.OBJECTIVE})",
        f"objective {words.number(value)} (train mode)",
    ]
    spare = WIDEST_NUMBER - len(words.number(value))  # as if it were wide: the words must not change with the number
    return _line([next((text for text in choices if len(text) + spare <= width), choices[-1])], width, "", "dim")


def _told(evaluations: Sequence[Evaluated], width: int, table: bool) -> Text:
    """What the last look's loss is made of; gap and best look where that is not known, or no table tells them."""
    last, best = evaluations[-1], _best(evaluations)
    parts = words.parts(last)
    if not parts or not table:
        gap = parts[0] if last.gap_interval else f"gap {words.number(last.gap.get('loss'))}"
        parts = [gap]
        parts += (
            [f"best at step {best.step}", f"with validation loss {words.number(best.validation['loss'])}"]
            if best
            else []
        )
    return _line(parts, width, ", ")


def _best(evaluations: Sequence[Evaluated]) -> Evaluated | None:
    return next((event for event in reversed(evaluations) if event.best), None)


def _line(facts: Sequence[str], width: int, between: str, style: str = "") -> Text:
    """The facts on one line; where they are too many, the last ones are left out."""
    while len(facts) > 1 and cell_len(between.join(facts)) > width:
        facts = facts[:-1]
    return Text(between.join(facts), style=style, no_wrap=True, overflow="crop")


def _cut(text: str, width: int, ascii_only: bool) -> str:
    """The beginning of a text that is too wide, and dots for the rest."""
    if cell_len(text) <= width:
        return text
    dots = "..." if ascii_only else "…"
    return set_cell_size(text, max(width - len(dots), 0)) + dots


def _dot(ascii_only: bool) -> str:
    return " - " if ascii_only else " · "


def _chart(screen: Screen, width: int, height: int, ascii_only: bool) -> Sequence[RenderableType]:
    probe = [(event.step, event.train_probe["loss"]) for event in screen.evaluations]
    validation = [(event.step, event.validation["loss"]) for event in screen.evaluations]
    best = _best(screen.evaluations)
    lines = [
        Series("probe loss", probe, PROBE, "p", dotted=True),
        Series("validation loss", validation, VALIDATION, "v"),
    ]
    mark = (best.step, best.validation["loss"]) if best else None
    end = screen.started.total_steps if screen.started else None
    return chart(lines, max(width, SMALLEST[0]), height, x_max=end, best=mark, ascii_only=ascii_only)


def _evaluations(screen: Screen, width: int, rows: int) -> Table:
    """The last evaluations, the best among them even if it is older. Narrow terminals lose the epoch, then a gap.

    No column is narrower than its widest number may become: none moves from look to look.
    """
    metric, steps = (screen.started.metric, screen.started.total_steps) if screen.started else (None, 0)
    has_metric = metric is not None and any(metric in event.validation for event in screen.evaluations)
    columns = [("", "step", max(4, len(str(steps)))), ("", "epoch", 5), *_sides("loss")]
    if has_metric and metric:
        columns += _sides(metric)
    hidden, between = _hidden(columns, width)
    drawn = Table(box=None, padding=(0, between, 0, 0), pad_edge=False, header_style="dim")
    for index, (above, name, size) in enumerate(columns):
        if index not in hidden:
            drawn.add_column(Text(f"{above}\n{name}"), justify="right", no_wrap=True, min_width=size)
    drawn.add_column("", no_wrap=True, min_width=len("best"))
    best = _best(screen.evaluations)
    for event in _shown(screen.evaluations, best, rows):
        cells = _cells(event, metric if has_metric else None)
        kept = [Text(cell) for index, cell in enumerate(cells) if index not in hidden]
        drawn.add_row(*kept, Text("best" if event is best else ""), style=BEST if event is best else None)
    return drawn


def _parts(screen: Screen) -> list[RenderableType]:
    """What the last look's loss is made of, where it was measured."""
    told = words.parts(screen.evaluations[-1])
    return [Text(), Text(", ".join(told), style="dim")] if told else []


def _sides(name: str) -> list[tuple[str, str, int]]:
    return [(name, side, max(size, len(name))) for side, size in (("probe", 8), ("validation", 10), ("gap", 9))]


def _hidden(columns: Sequence[tuple[str, str, int]], width: int) -> tuple[set[int], int]:
    """Which columns to leave out so that the table fits, and the spaces between the others."""
    end = len(columns)
    choices: list[set[int]] = [set(), {1}, {1, *range(7, end)}, {1, *range(5, end)}, {1, 2, *range(5, end)}]
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
    """On one line, however long its text."""
    grid = Table.grid(padding=(0, 1))
    if stage.total is None:
        count = f"{stage.done:,}" if stage.done else ""
        text = _cut(stage.text, width - len(count) - 5, ascii_only)
        grid.add_row(spinner, Text(text), Text(count, style="dim"))
        return grid
    count = f"{stage.done:,}/{stage.total:,}"
    text = _cut(stage.text, width - len(count) - 14, ascii_only)
    room = max(8, min(30, width - cell_len(text) - 24))
    bar = ProgressBar(max(stage.total, 1), stage.done, width=room, style="dim", complete_style=VALIDATION)
    grid.add_row(spinner, Text(text), bar, Text(count, style="dim"))
    return grid


def _spinner(plain: bool) -> Spinner:
    return Spinner("line" if plain else "dots", style=VALIDATION)
