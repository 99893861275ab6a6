"""Whatever bytes a data file holds: they are read, or refused with an error of hkft's, and soon."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkft.data.rows import rows
from hkft.errors import DataError, HkftError
from tests.data.conftest import RecipeOf  # noqa: F401
