"Every plug that the package defines, and every option: tests run over these, and not over lists of their own."

from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules


def plug_classes(base, package=None):
    "The choosable classes below a plug's base class in vgpo; all modules of `package`, a module, are imported first."
    for module in iter_modules(package.__path__, package.__name__ + ".") if package else ():
        import_module(module.name)
    found, todo = [], [base]
    while todo:
        for kind in todo.pop().__subclasses__():
            if kind.__module__.startswith("vgpo.") and kind not in found:
                found.append(kind), todo.append(kind)
    found = [kind for kind in found if not isabstract(kind)]
    return sorted(found, key=lambda kind: kind.__name__)


def option_types(section, data, prefix=""):
    "{dotted option: its type} of the leaves of a Config's data; a plug's `class_path` has the type of the plug."
    from vgpo.runs.resume import class_of

    found = {}
    for f in fields(section):
        name, value = prefix + f.name, data[f.name]
        if not isinstance(value, dict) or not (class_of(value) or is_dataclass(f.type)):
            found[name] = f.type
        elif plug := class_of(value):
            found[f"{name}.class_path"] = f.type
            found |= option_types(plug, value.get("init_args", {}), f"{name}.init_args.") if is_dataclass(plug) else {}
        else:
            found |= option_types(f.type, value, f"{name}.")
    return found
