"""One model, one file: SanaTransformer, DCAE, Gemma2."""
