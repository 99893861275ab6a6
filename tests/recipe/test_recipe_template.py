"""`data.prompt` and `data.completion`: a column, or a text with columns in it."""

from __future__ import annotations

import re

import pytest

from hkft.recipe.template import template


@pytest.mark.parametrize(
    ("text", "cells", "filled"),
    [
        ("a", {"a": "x"}, "x"),
        ("my column", {"my column": "x"}, "x"),
        ("{a} ->", {"a": "x"}, "x ->"),
        ("{a}, {b}: {a}", {"a": "x", "b": "y"}, "x, y: x"),
        ("{my column}", {"my column": "x"}, "x"),
        ("{a.b}{a[0]}{0}", {"a.b": "x", "a[0]": "y", "0": "z"}, "xyz"),
        ("{{{a}}}: {{b}}", {"a": "x"}, "{x}: {b}"),
        ("{a}", {"a": "{b} {{c}}"}, "{b} {{c}}"),  # braces of a cell are the cell's
        ("{a}", {"a": " x\n"}, " x\n"),
        ("{a}", {"a": 1}, "1"),
        ("{a}", {"a": 0}, "0"),
        ("{a}", {"a": 1.5}, "1.5"),
        ("{a}", {"a": False}, "False"),
        ("{a}", {"a": ["x", "y"]}, "x | y"),
        ("{a}\n{b}\n->", {"a": "x", "b": ""}, "x\n\n->"),  # as Alpaca's rows without an input
        ("{a}\n{b}\n->", {"a": None, "b": "y"}, "\ny\n->"),
        ("{a}\n->", {"a": ""}, None),
        ("{a}\n->", {"a": []}, None),
        ("{a} {b}", {"a": " ", "b": None}, None),
        ("a", {"a": None}, None),
    ],
)
def test_a_row_fills_it(text, cells, filled):
    found = template(text)
    assert found.fill(cells) == filled
    assert found.columns == tuple(cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Single '{' encountered"),
        ("a}", "Single '}' encountered"),
        ("{a", "expected '}'"),
        ("{a}}", "Single '}' encountered"),
        ("{} ->", "{} names no column"),
        ("{a:>10}", "{a} takes no format"),
        ("{a!r}", "{a} takes no format"),
        ("{a!}", "unmatched '{'"),
        ("{a{b}}", "unexpected '{'"),
        ("{{a}}", "no column stands in it"),
    ],
)
def test_what_is_no_template_says_why(text, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        template(text)
