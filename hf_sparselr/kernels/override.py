"""The choice between kernels that users have, and the environment variable that overrides it."""

import os

from ..utils.validation import check_choice

KERNELS = ("auto", "packed", "dense")
VARIABLE = "HF_SPARSELR_KERNEL"
OVERRIDE = os.environ.get(VARIABLE)  # once, as reading it takes longer than a launch


def chosen_kernel(kernel: str) -> str:
    """The kernel of the environment, or else this one.

    Raises:
        ValueError: neither "auto" nor "packed" nor "dense".
    """
    if OVERRIDE is not None:
        check_choice(VARIABLE, OVERRIDE, KERNELS)
        return OVERRIDE
    if kernel not in KERNELS:
        check_choice("kernel", kernel, KERNELS)
    return kernel
