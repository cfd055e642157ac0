"""The choice between kernels that users have, and the environment variable that overrides it."""

import os

from ..utils.validation import check_choice

KERNELS = ("auto", "packed", "dense")
VARIABLE = "HF_SPARSELR_KERNEL"


def chosen_kernel(kernel: str) -> str:
    """The kernel of the environment, or else this one.

    Raises:
        ValueError: neither "auto" nor "packed" nor "dense".
    """
    override = os.environ.get(VARIABLE)
    if override is not None:
        check_choice(VARIABLE, override, KERNELS)
        return override
    check_choice("kernel", kernel, KERNELS)
    return kernel
