"""Layer solvers: pure tensors in, `Decomposition` out. One file a method; `registry` lists them."""
