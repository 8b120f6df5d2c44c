"""A package, so that `from tests.helpers import ...` finds this folder and not another
distribution's.
"""
