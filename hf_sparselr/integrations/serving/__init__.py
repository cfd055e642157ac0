"""What the plugins for vLLM and SGLang share: which layers are packed, loading them in slices, one operator."""
