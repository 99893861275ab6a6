"""What a run looks like while it works: a live screen on a terminal, plain lines anywhere else. On stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from hkft import processes
from hkft.events import Event, Finished, Listener, Notice, Sample, Stage, silent
from hkft.view import words
from hkft.view.console import is_plain, output
from hkft.view.plain import Brief, Plain
from hkft.view.screen import Screen, done, next_steps, notice, report, sample

PER_SECOND = 4


@contextmanager
def view(
    json: bool = False,
    *,
    brief: bool = False,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Listener]:
    """A listener that shows what it is told, for as long as the context lasts.

    json: a program reads stdout and most likely keeps stderr too, so plain lines. brief: there are many runs, and a line
    is left of each. The terminal is restored on every
    way out; if training was cut short, its last screen stays. Of several processes of a run the first one shows it.
    """
    if not processes.first():
        yield silent
        return
    console = console or output(stderr=True)
    if json or is_plain(console):
        yield Brief(console) if brief else Plain(console)
        return
    screen = Screen(clock)
    with Live(screen, console=console, refresh_per_second=PER_SECOND, transient=True) as live:
        try:
            yield Drawing(screen, live, brief)
        finally:
            if screen.started and not screen.finished:
                console.print(screen)
                screen.started = None


class Drawing:
    """The listener of the live screen: keeps its state current, and prints above it what is to stay."""

    def __init__(self, screen: Screen, live: Live, brief: bool = False) -> None:
        self.screen = screen
        self.live = live
        self.brief = brief
        self.said: set[str] = set()

    def __call__(self, event: Event) -> None:
        console, screen = self.live.console, self.screen
        ascii_only = console.options.ascii_only
        before, training = screen.stage, screen.started is not None and screen.finished is None
        screen(event)
        over = before is not None and (not isinstance(event, Stage) or event.text != before.text)
        if before and over and not training and not self.brief and not isinstance(event, Notice | Sample):
            console.print(done(before, ascii_only))
        if isinstance(event, Notice) and not (self.brief and event.text in self.said):
            self.said.add(event.text)
            console.print(notice(event, ascii_only))
        elif isinstance(event, Sample) and not self.brief:
            console.print(sample(event), soft_wrap=False)
        elif isinstance(event, Finished) and self.brief:
            console.print(done(Stage(words.outcome(event.run, event.summary)), ascii_only))
        elif isinstance(event, Finished):
            console.print(report(screen, event, console.width, ascii_only))
            for line in next_steps(words.next_steps(event.run, event.summary)):
                console.print(line, soft_wrap=True)
