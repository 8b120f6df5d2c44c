"""Where the local copies of published data sets lie, for tests that are skipped without them."""

import os
from pathlib import Path

import pytest

_BESIDE_THE_REPOSITORY = Path(__file__).parents[1].parent / "shared" / "data"
DATA = Path(os.environ.get("IDP_JAX_DATA", _BESIDE_THE_REPOSITORY))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no data sets in {DATA}; set IDP_JAX_DATA to their folder"
)
