"""BentoML 1.4.39 warns about itself while it is imported (pydantic, pathspec); here warnings are errors."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import api.runner_link  # noqa: F401
