"""What several tests of training read."""

import numpy as np
import pytest

from tests.helpers import tiny_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model's folder and a text of about 40 windows."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=1)
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp "], 130)
    (folder / "text.txt").write_text("".join(words))
    return folder
