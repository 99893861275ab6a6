"""A run as plain lines, for a log file, a pipe, CI: one per stage, evaluation and finish. No control codes."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from hkft.events import Evaluated, Event, Finished, Notice, Sample, Stage, Started
from hkft.view import words
from hkft.view.console import say


class Plain:
    """A listener. Remembers only what the next line needs: the run that started, and the stage last named."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: Started | None = None
        self.training = False
        self.stage: str | None = None

    def __call__(self, event: Event) -> None:
        for line in self.lines(event):
            say(self.console, line)

    def lines(self, event: Event) -> Iterator[str]:
        """The lines that this event is worth: none for a step, nor for a stage within training."""
        match event:
            case Stage(text=text) if not self.training and text != self.stage:
                self.stage = text
                yield text
            case Notice():
                yield f"{'warning' if event.level == 'warning' else 'note'}: {event.text}"
            case Sample(pieces=pieces):
                shown = "".join(f"[[{text}]]" if learned else text for text, learned in pieces)
                yield f"an example, what is learned of it between [[ and ]]:\n{shown}"
            case Started():
                self.started, self.training = event, True
                yield from words.setting(event)
                yield f"run folder: {event.run}"
            case Evaluated():
                total, metric = (self.started.total_steps, self.started.metric) if self.started else (None, None)
                self.training = total is not None and event.step < total
                yield words.evaluation(event, total, metric)
            case Finished():
                self.training = False
                yield from finish(event)


class Brief(Plain):
    """Many runs in one log: a line of each that finished, and only once what all of them say."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.said: set[str] = set()

    def lines(self, event: Event) -> Iterator[str]:
        match event:
            case Stage() | Notice():
                fresh = [line for line in super().lines(event) if line not in self.said]
                self.said.update(fresh)
                yield from fresh
            case Finished():
                self.training = False
                yield words.outcome(event.run, event.summary)
            case _:
                for _ in super().lines(event):  # it remembers where the run stands
                    pass


def finish(event: Finished) -> Iterator[str]:
    """The verdict, the figures, what fired, where it all is, and what to type next."""
    verdict = event.summary.get("verdict")
    if verdict:
        yield f"verdict: {verdict['name']} ({verdict['confidence']} confidence)"
        yield verdict["text"]
    for label, value in words.figures(event.summary):
        yield f"{label}: {value}"
    for position, pattern, *facts in words.site_rows(event.sites):
        told = ", ".join(
            f"{name} {fact}" for name, fact in zip(words.SITE_COLUMNS[2:], facts, strict=True) if fact != "-"
        )
        yield f"dropout {position}/{pattern}: {told}"
    yield f"run folder: {event.run}"
    for why, command in words.next_steps(event.run, event.summary):
        yield f"next: {why}: {command}"
