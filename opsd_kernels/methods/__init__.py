"""The methods of the literature by name, each a short entry that says what it minimises.

A new method is a function in a module of this package that returns a `Recipe`, under the decorator
`method`, which holds what the table says of it. A new module stands in `registry.MODULES`.
"""

from importlib import import_module

from opsd_kernels.methods.registry import MODULES, Method, get_method, names, recipe

__all__ = ["Method", "get_method", "names", "recipe"]

for _module in MODULES:
    import_module(f"{__name__}.{_module}")  # its entries are in the table once it is imported
