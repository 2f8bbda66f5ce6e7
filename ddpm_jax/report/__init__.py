"""A page of HTML that shows runs to those who were not there. `write.py` puts it together.

The page is one file: pictures, curves and the library that draws them stand in it, and it asks for
nothing from outside.
"""
