"Plugs: classes whose fields are their options, and what every one of them must be."

import dataclasses
import inspect
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import jsonargparse
import pytest
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from plug_classes import plug_classes

import vgpo.credit
import vgpo.objectives
from vgpo.credit.base import Credit
from vgpo.objectives.base import Objective
from vgpo.plugs import AtLeastOne, check_fields
from vgpo.sde import Sampler
from vgpo.windows import Window

PLUGS = {Sampler: None, Window: None, Credit: vgpo.credit, Objective: vgpo.objectives}
ALL = [(base, kind) for base, package in PLUGS.items() for kind in plug_classes(base, package)]
each_plug = pytest.mark.parametrize(("base", "kind"), ALL, ids=[kind.__name__ for _, kind in ALL])


@dataclass
class Example:
    number: PositiveInt = 1
    share: ClosedUnitInterval = 0.5
    scale: AtLeastOne = 1.0
    kind: Literal["one", "two"] = "one"
    stop: NonNegativeInt | None = None
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.99)
    free: str = "anything"

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "options",
    [{}, {"number": 7}, {"share": 0}, {"share": 1}, {"kind": "two"}, {"stop": 0}, {"betas": [0, 1]}, {"free": None}],
)
def test_values_in_range_are_taken_as_they_are(options):
    example = Example(**options)
    assert all(getattr(example, key) is value for key, value in options.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0}, "Example.number is 0; it must be a number v with v>0"),
        ({"number": 1.5}, "Example.number is 1.5; it must be"),
        ({"number": "many"}, "Example.number is 'many'; it must be"),
        ({"number": None}, "Example.number is None; it must be"),
        ({"share": 1.01}, "Example.share is 1.01; it must be"),
        ({"share": float("nan")}, "Example.share is nan; it must be"),
        ({"scale": 0.5}, "Example.scale is 0.5; it must be a number v with v>=1"),
        ({"kind": "three"}, "Example.kind is 'three'; it must be one of 'one', 'two'"),
        ({"stop": -1}, "Example.stop is -1; it must be a number v with v>=0"),
        ({"betas": (0.9, 1.1)}, "Example.betas is (0.9, 1.1); it must be a number"),
        ({"share": 2, "number": 0}, "Example.number is 0"),  # the first field that is wrong
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Example(**options)


def test_there_are_plugs():
    assert {base: len([b for b, _ in ALL if b is base]) >= 2 for base in PLUGS} == dict.fromkeys(PLUGS, True)


@each_plug
def test_a_plug_is_a_dataclass_below_a_base_without_options(base, kind):
    assert dataclasses.is_dataclass(kind) and not dataclasses.is_dataclass(base)
    assert kind() == kind() and inspect.getdoc(kind)
    assert kind.__name__ not in [other.__name__ for _, other in ALL if other is not kind]


@each_plug
def test_a_plug_is_chosen_by_name_and_its_options_are_explained(base, kind, capsys):
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--plug", type=base)
    assert parser.instantiate(parser.parse_args([f"--plug={kind.__name__}"])).plug == kind()
    with pytest.raises(jsonargparse.ArgumentError, match="no_such_option"):
        parser.parse_args([f"--plug={kind.__name__}", "--plug.no_such_option=1"])
    with pytest.raises(SystemExit):
        parser.parse_args([f"--plug.help={kind.__name__}"])
    words = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(kind):
        assert re.search(rf"--plug\.{field.name} \S+ \w+", words), f"{kind.__name__}.{field.name} is not explained"


@each_plug
def test_a_plug_refuses_numbers_out_of_range_where_it_is_made(base, kind):
    for field in dataclasses.fields(kind):
        if field.type not in (bool, str):
            with pytest.raises(ValueError, match=field.name):
                kind(**{field.name: -1})


OWN = """
from dataclasses import dataclass
from jsonargparse.typing import PositiveFloat
from vgpo.credit.base import Credit
from vgpo.objectives.base import Objective
from vgpo.plugs import check_fields
from vgpo.sde import Sampler
from vgpo.windows import Window


@dataclass
class {base}Mine({base}):
    "A plug of somebody else's."
    strength: PositiveFloat = 2.0
    \"\"\"how strong it is\"\"\"
    def __post_init__(self): check_fields(self)
"""


@pytest.mark.parametrize("base", PLUGS, ids=lambda base: base.__name__)
def test_a_class_in_a_file_of_ones_own_is_a_plug(base, tmp_path, monkeypatch, capsys):
    module, name = f"own_{base.__name__.lower()}", f"{base.__name__}Mine"
    (tmp_path / f"{module}.py").write_text(OWN.format(base=base.__name__))
    monkeypatch.syspath_prepend(tmp_path)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--plug", type=base)
    parsed = parser.parse_args([f"--plug={module}.{name}", "--plug.strength=3"])
    assert parser.instantiate(parsed).plug == getattr(import_module(module), name)(3.0)
    assert parser.instantiate(parser.parse_string(parser.dump(parsed))).plug.strength == 3  # as a recipe
    for words, message in ((["--plug.strength=0"], "strength"), (["--plug.gamma=0.5"], "gamma")):
        with pytest.raises(jsonargparse.ArgumentError, match=message):
            parser.parse_args([f"--plug={module}.{name}", *words])
    with pytest.raises(ValueError, match=f"{name}.strength is 0; it must be"):
        getattr(import_module(module), name)(0)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--plug.help={module}.{name}"])
    assert "how strong it is" in capsys.readouterr().out
