"""What a checkpoint folder says of itself: config.json or params.json → the `model` and `tokenizer` sections.

JSON and headers of weight files only: no weight is read and torch is not imported, so it takes milliseconds.
"""

from llamaq.families.architecture import Architecture
from llamaq.families.complete import complete
from llamaq.families.folder import Described, describe

__all__ = ["Architecture", "Described", "complete", "describe"]
