"""A package, so that `from tests.helpers import ...` finds no other distribution's folder."""
