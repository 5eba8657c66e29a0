"""The numerics: the scheme, the modules that train under it, and how a model is prepared and frozen."""
