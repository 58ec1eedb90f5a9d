"""The user's whole choice: `Recipe`, its text form, and the rules for what combines with what."""

from lorica.recipe.recipe import Recipe, cite

__all__ = ["Recipe", "cite"]
