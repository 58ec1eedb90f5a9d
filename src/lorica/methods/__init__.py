"""The methods, one package per axis and one file (or folder) per method.

Start with `choice.py`: the axes, the capabilities, and what every method declares about itself. In
each axis, `base.py` holds the abstract class and says how to add a method; files that begin with
`_` are shared by several methods of that axis. Methods import `lorica.interfaces`, `lorica.tensors`
and `lorica.text`, and nothing else of Lorica's.
"""
