"""The parts that the plugins for vLLM and SGLang share: names of packed layers, loading in slices, one operator."""
