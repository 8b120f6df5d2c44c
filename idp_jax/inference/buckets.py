"""The few array lengths that evaluation compiles for."""


def bucket(length: int) -> int:
    """The smallest length in use that is at least `length`.

    Lengths in use are the multiples of 32 up to 256, then four steps an octave.
    """
    if length <= 256:
        return max(32, -(-length // 32) * 32)
    step = 2 ** ((length - 1).bit_length() - 3)
    return -(-length // step) * step
