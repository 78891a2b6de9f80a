"""Before any kernel is imported it must be clear whether Triton's interpreter runs it."""

import tests.kernels  # noqa: F401
