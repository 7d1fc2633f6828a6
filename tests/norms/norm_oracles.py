"""x-transformers' norms; importing the package warns about PyTorch features it still uses."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from x_transformers.x_transformers import Derf, DynamicTanh

__all__ = ["Derf", "DynamicTanh"]
