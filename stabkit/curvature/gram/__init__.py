"""Products of all samples' curvature factors with each other, built layer by layer without the factors."""

from stabkit.curvature.gram.gram import Gram, curvature_gram

__all__ = ["Gram", "curvature_gram"]
