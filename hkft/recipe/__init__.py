"""YAML and `--set` -> a checked Recipe. Imports neither torch nor transformers nor peft."""

from hkft.recipe.catalogue import describe, shipped
from hkft.recipe.recipe import Recipe, load
from hkft.recipe.schema import reference

__all__ = ["Recipe", "describe", "load", "reference", "shipped"]
