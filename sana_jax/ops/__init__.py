"""Pure array functions; the only place where kernels will live."""
