"""The matrices of the models that the kernels are checked and measured at, as (inputs, outputs)."""

SHAPES = {
    "LLaMA-7B": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "LLaMA-13B": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "LLaMA-70B": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "OPT-6.7B": ((4096, 4096), (4096, 16384), (16384, 4096)),
}
ROWS = (1, 8, 16, 64, 512, 2048)


def all_shapes() -> list[tuple[int, int]]:
    """Every distinct shape."""
    return sorted({shape for shapes in SHAPES.values() for shape in shapes})
