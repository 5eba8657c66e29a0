"""Define the numerics: the scheme, the modules that train under it, and how to prepare and freeze a model."""
