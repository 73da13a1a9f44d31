"Every plug that the package defines: tests run over these, and not over lists of their own."

from importlib import import_module
from pkgutil import iter_modules


def plug_classes(base, package=None):
    "The dataclasses below a plug's base class in vgpo; all modules of `package`, a module, are imported first."
    for module in iter_modules(package.__path__, package.__name__ + ".") if package else ():
        import_module(module.name)
    found, todo = [], [base]
    while todo:
        for kind in todo.pop().__subclasses__():
            if kind.__module__.startswith("vgpo.") and kind not in found:
                found.append(kind), todo.append(kind)
    return sorted(found, key=lambda kind: kind.__name__)
