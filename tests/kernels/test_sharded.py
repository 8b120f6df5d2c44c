"""What of a weight can be cut into parts."""

from idp_jax.kernels.quant_matmul.api import prepare
from idp_jax.kernels.sharded import unsplittable
from tests.kernels.problems import checkpoint


def test_what_cannot_be_cut_is_named():
    weight = prepare(*checkpoint(4, 768, 126, 6), bits=4)
    assert unsplittable(weight, "outputs", 2) is None
    said = unsplittable(weight, "inputs", 2)
    assert said == "768 inputs do not divide into 2 parts of whole tiles of 256"
    said = unsplittable(weight, "outputs", 4)
    assert said == "126 outputs do not divide into 4 parts of whole 1"
    assert unsplittable(weight, "rows", 4) == "split must be inputs or outputs, not rows"


def test_parts_have_whole_groups():
    weight = prepare(*checkpoint(4, 1024, 64, 2), bits=4)
    assert unsplittable(weight, "inputs", 4) == "2 groups do not divide into 4 parts"
