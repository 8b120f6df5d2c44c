"""The latency report says what was measured; how fast it was is no test."""

import jax
import pytest

from idp_jax.evaluation.latency import latency
from idp_jax.recover import LoraAdapter
from tests.helpers import tiny_decoder, tiny_pool


def test_report_holds_the_protocol():
    model = tiny_decoder("llama")
    pool = tiny_pool(model, 3, 5).repair(model)
    found = latency(pool, batch_size=2, prompt_length=6, new_tokens=4, repeats=3)
    protocol = {"batch_size": 2, "prompt_length": 6, "new_tokens": 4, "repeats": 3}
    facts = {**protocol, "soft_prompt_tokens": 5, "lora": "none", "dtype": "float32"}
    assert vars(found).items() >= facts.items()
    assert found.prefill_ms > 0 and found.decode_ms_per_token > 0
    assert len(found.prefill_ms_runs) == len(found.decode_ms_per_token_runs) == 3


def test_lora_is_measured_unmerged():
    model = tiny_decoder("opt")
    repaired = LoraAdapter.init(model, 2, jax.random.key(0)).repair(model)
    assert latency(repaired, prompt_length=3, new_tokens=1, repeats=1).lora == "unmerged"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"repeats": 0}, "repeats must be"),
        ({"prompt_length": 250, "new_tokens": 10}, "260 tokens exceed"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        latency(tiny_decoder("opt"), **sizes)
