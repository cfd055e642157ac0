"""PEFT on compressed models: our LoRA layer, the factors as an adapter, checks before PEFT's calls, merging."""

import peft  # noqa: F401 (before any module here: importing PEFT registers us, see `autoload`)
