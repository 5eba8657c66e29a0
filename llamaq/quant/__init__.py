"""The numerics: the scheme, the modules that train under it, and functions that prepare and freeze a model."""
