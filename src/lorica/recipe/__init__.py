"""A method's text turned into a checked choice per axis.

Start with `recipe.py`: `Recipe` holds everything a user can choose. `parse.py` reads the text form,
`registry.py` finds methods by walking `lorica.methods`, and `compatibility.py` raises an error if
the parts don't work together.
"""

from lorica.recipe.recipe import Recipe, cite

__all__ = ["Recipe", "cite"]
