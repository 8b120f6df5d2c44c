"""What is counted of a compiled program, on programs whose counts are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from idp_jax.pods.hlo import Collective, count
from idp_jax.sharding import make_mesh


def _compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_in_a_loop_count_as_often_as_they_run():
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    walk = lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0] @ w[0]
    assert count(_compiled(walk, x, w)).flops == 6 * 2 * 8 * 16 * 16


def test_messages_in_a_loop_count_as_often_as_they_are_sent():
    mesh = make_mesh({"data": 2, "model": 4})
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    x, w = put(jnp.ones((4, 8, 16)), "data"), put(jnp.ones((5, 16, 16)), None, "model", None)

    def layer(x, w):
        return jax.lax.with_sharding_constraint(
            jnp.sin(x @ w), NamedSharding(mesh, P("data"))
        ), None

    found = count(_compiled(lambda x, w: jax.lax.scan(layer, x, w)[0], x, w))
    (message,) = found.collectives
    assert (message.kind, message.size, message.count) == ("all-reduce", 4, 5)
    assert message.bytes == 2 * 8 * 16 * 4 and found.bytes("all-reduce") == 5 * message.bytes
    assert found.bytes("all-gather") == 0
    # Each device has 16 of 64 columns' products to sum.
    assert found.flops == 5 * 2 * (2 * 8) * 4 * 16


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("all-gather", 0.75),
        ("all-reduce", 1.5),
        ("reduce-scatter", 3.0),
        ("all-to-all", 0.75),
        ("collective-permute", 1.0),
    ],
)
def test_the_time_around_a_ring(kind, passes):
    message = Collective(kind, "f32[10]", 4, 40, 2)
    assert message.seconds(10.0) == pytest.approx(2 * passes * 40 / 10)


TEXT = """HloModule step

%async_collective_fusion.1 (x: bf16[4,8]) -> bf16[16,8] {
  ROOT %same = bf16[16,8] all-gather(%x), replica_groups=[4,4]<=[16]
}

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0:T(4,128)(2,1)} get-tuple-element(%arg), index=1
  %start = (bf16[4,8], bf16[16,8]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=[4,4]<=[16]
  %done = bf16[16,8]{1,0} all-gather-done(%start)
  %one = bf16[4,8] all-to-all(%x), replica_groups=mesh['a'=4,'b'=2,'c'=2] {'b'}
  %still = bf16[16,8] fusion(%x), calls=%async_collective_fusion.1
  %call = bf16[4,8]{1,0} custom-call(%done), backend_config={"cost_estimate":{"flops":"1024"}}
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %call)
}

%until (arg: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%number, %limit), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], bf16[4,8]) while(%t), condition=%until, body=%body
  %conv = bf16[4,32]{1,0} convolution(%p, %kernel), dim_labels=bf_io->bf
  %many = f32[4,8,32] convolution(%q, %k), window={size=4 lhs_dilate=4}, dim_labels=0bf_o0i->0bf
  %q = bf16[4,8,16] parameter(2)
  %k = bf16[32,4,16] parameter(3)
  %kernel = bf16[8,32]{1,0} parameter(1)
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpu_compiler_writes():
    found = count(TEXT)
    assert found.collectives == (
        Collective("all-gather", "bf16[16,8]", 4, 256, 7),
        Collective("all-to-all", "bf16[4,8]", 2, 64, 7),
    )
    assert found.flops == 7 * 1024 + 2 * 4 * 8 * 32 + 2 * 4 * 8 * 32 * 16
    assert found.arrays["bf16[4,32]"] == 256


def test_splash_attention_is_counted_by_its_shapes():
    layouts = (
        "{s8[1,8,8]{2,1,0}, s8[1,8,8]{2,1,0}, bf16[2,4,16,8]{3,2,1,0}, bf16[2,2,48,8]{3,2,1,0}"
    )
    line = "  %{}.1 = bf16[2,4,16,8] custom-call(%a), operand_layout_constraints={}}}}}"
    pairs = 16 * 32 + 16 * 17 / 2  # what stands before is visible to all
    for kernel, products in [("fwd_residuals", 2), ("dq_no_residuals", 3), ("dkv", 4)]:
        body = line.format(f"splash_mha_{kernel}", layouts)
        text = "ENTRY %main (p: bf16[1]) -> bf16[1] {\n" + body + "\n}\n"
        assert count(text).flops == products * 2 * 2 * 4 * 8 * pairs


def test_a_convolution_counts_what_its_window_meets():
    window = "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"
    line = f"  %a.1 = f32[32,4,16] convolution(bf16[32,8,1] %x, bf16[4,16,8] %y), {window}"
    text = "ENTRY %main (p: bf16[1]) -> bf16[1] {\n" + line + "\n}\n"
    assert count(text).flops == 2 * 32 * 4 * 16 * 8
