"""What the demo checkpoint cannot see yet. Strict: a test that begins to pass fails until its mark is taken off."""

import pytest

confuses_shapes = pytest.mark.xfail(
    strict=True, reason="the demo checkpoint does not tell all shapes apart yet: docs/decisions/0003"
)
