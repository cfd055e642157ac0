"""PEFT on compressed models: our LoRA layer, the factors as an adapter, checks before PEFT's calls, merging."""
