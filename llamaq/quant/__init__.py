"""The numerics: what a number becomes on the phone, and the modules that train as if they were there already."""
