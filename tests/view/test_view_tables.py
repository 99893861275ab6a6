import io

import pytest
from rich.console import Console

from hkft.dropout.named import METHODS
from hkft.errors import HkftError, Problem, RecipeError
from hkft.view.errors import show_error
from hkft.view.tables import methods_table, plain_table, table


def text(call) -> str:
    file = io.StringIO()
    call(Console(file=file, width=40))
    return file.getvalue()


def test_a_plain_table_aligns_numbers_to_the_right():
    rows = [["none", 0.788, 1, None], ["hiddenkey", 0.79123, 1200, "[red]日本"]]
    assert plain_table(["method", "accuracy", "steps", "note"], rows, "Runs") == (
        "Runs\nmethod     accuracy  steps  note\nnone          0.788      1  -\nhiddenkey    0.7912   1200  [red]日本"
    )


def test_without_a_terminal_nothing_is_wrapped_or_coloured():
    long = "a sentence that is much longer than the forty columns of this console"
    assert text(lambda console: table(["a"], [[long]], console=console)) == f"a\n{long}\n"


@pytest.mark.usefixtures("quiet")
def test_on_a_terminal_a_table_fits_and_markup_stays_text(terminal):
    console = terminal(40, colour=False)
    table(["name", "words"], [["x", "[red]words[/red] " * 6]], "Title", console=console)
    console.file.flush()
    lines = console.file.buffer.getvalue().decode().splitlines()
    assert max(map(len, lines)) <= 40
    assert "[red]words[/red]" in "\n".join(lines)


def test_an_empty_table_is_its_head():
    assert plain_table(["a", "b"], []) == "a  b"


def test_every_method_has_a_row():
    lines = text(methods_table).splitlines()
    assert [line.split()[0] for line in lines] == ["method", *METHODS]
    row = next(line for line in lines if line.startswith("hiddenkey "))
    assert row.split()[1:4] == ["attention_logits/column,", "hidden/element", "kl"]


def test_one_error_says_where_what_and_what_to_do():
    error = HkftError(
        "there is no method 'hidenkey'",
        where="r.yaml:3:11",
        found="hidenkey",
        allowed="none, hiddenkey",
        hint="did you mean 'hiddenkey'?",
    )
    assert text(lambda console: show_error(error, console)) == (
        "error: there is no method 'hidenkey'\n"
        "  where    r.yaml:3:11\n"
        "  found    hidenkey\n"
        "  allowed  none, hiddenkey\n"
        "  hint     did you mean 'hiddenkey'?\n"
    )


def test_several_problems_are_counted():
    error = RecipeError(problems=[Problem("first [bold]", "a:1:1"), Problem("second")])
    expected = "error: 2 problems\n1. first [bold]\n  where    a:1:1\n2. second\n"
    assert text(lambda console: show_error(error, console)) == expected


@pytest.mark.usefixtures("quiet")
def test_an_error_on_a_narrow_terminal_fits(terminal):
    console = terminal(40, colour=False)
    show_error(HkftError("no such file", where="/a/very/long/path" * 8, hint="look [here]"), console)
    console.file.flush()
    lines = console.file.buffer.getvalue().decode().splitlines()
    assert max(map(len, lines)) <= 40
    assert "look [here]" in lines[-1]
