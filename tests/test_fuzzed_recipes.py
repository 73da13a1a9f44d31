"Recipes as nobody would write them: each is read as it stands, or refused in one line that names culprit and remedy."

import string
from contextlib import redirect_stdout
from io import StringIO

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vgpo.config import as_data, option_names, parse_config

VALID = {
    "seed": 3,
    "epochs": 2,
    "name": "mine",
    "model": {"path": "tiny", "lora_rank": 4, "lora_targets": ["to_q"], "resolution": None},
    "prompts": {"train": "tiny-words", "test": "tiny-words"},
    "reward": {"class_path": "OCR", "init_args": {"mode": "full"}},
    "rollout": {"group_size": 4, "guidance_scale": 1.5, "async_scoring": True},
    "window": {"class_path": "Random", "init_args": {"size": 2}},
    "credit": {"class_path": "VGPO", "init_args": {"gamma": 0.5}},
    "optim": {"lr": 0.001, "betas": [0.5, 0.75], "num_minibatches": 1},
    "callbacks": [],
}
LEAVES = [(key, inner) for key, value in VALID.items() for inner in (value if isinstance(value, dict) else [None])]
ODD = (
    "|~|null|Null|yes|on|0o17|0x1F|1_000|1e3|1e-3|1e400|.inf|-.inf|.nan|-1|-0|12:30:45|2001-01-01|0.1.2|'3'|true|FALSE|é|漢"
    r'|"a\0b"|"\ud800"|!!str 3|!!int "3"|!!float 3|!!binary aGk=|!!set {a}|!mine x|!!python/name:os.system|&a x|*a|<<'
    "|[1, [2]]|{a: 1}|{a: 1, a: 2}|>-\n  text|a: b|- a|? a|@x|`x`|%x|$HOME/x|~/x|${X}|tiny|VGPO|OCR|a.b.C|os.system"
    "|x.py:f|{class_path: VGPO}|{class_path: 3}|{init_args: {gamma: 0.25}}|{class_path: GRPO, init_args: {gamma: 1}}|#x"
    "|[]|{}|🦉|os:system|'|\"|\t|]|}|a b|[0.5, 0.75]|[0.5]"
).split("|") + [str(2**63), str(2**64), str(10**400), "9" * 5000]
words = st.text(string.ascii_letters + string.digits + "._-~$ :é漢\t\"'#{}[]&*!|>%@`", max_size=12)
scalars = st.one_of(st.sampled_from(ODD), words, st.integers().map(str), st.floats().map(repr), st.booleans().map(str))


@st.composite
def mutated(draw):
    "The text of a recipe in which something was changed: a value, a key, a line, a level, or all of its bytes."
    tree, kind = yaml.safe_load(yaml.safe_dump(VALID)), draw(st.sampled_from(KINDS))
    path = draw(st.sampled_from(LEAVES))
    holder, last = (tree, path[0]) if path[1] is None else (tree[path[0]], path[1])
    return kind(draw, tree, holder, last)


def text_of(tree):
    return yaml.safe_dump(tree, sort_keys=False)


def other_value(draw, tree, holder, key):
    holder[key] = "HERE"
    return text_of(tree).replace("HERE", draw(scalars))


def other_type(draw, tree, holder, key):
    simple = st.none() | st.booleans() | st.integers() | st.floats() | words
    nested = st.lists(simple, max_size=3) | st.dictionaries(words, simple, max_size=3)
    holder[key] = draw(simple | nested | st.lists(nested, max_size=2))
    return text_of(tree)


def other_key(draw, tree, holder, key):
    new = draw(
        st.one_of(words, st.just(key.upper()), st.just(key[:-1]), st.just(f"{key}."), st.just(f" {key}"), st.integers())
    )
    value = holder.pop(key)
    holder[new] = value
    return text_of(tree)


def twice(draw, tree, holder, key):
    lines = text_of(tree).splitlines()
    i = draw(st.integers(0, len(lines) - 1))
    lines.insert(draw(st.integers(0, len(lines))), lines[i])
    return "\n".join(lines)


def elsewhere(draw, tree, holder, key):
    value = holder.pop(key)
    target = draw(st.sampled_from([tree, *(v for v in tree.values() if isinstance(v, dict))]))
    target[draw(st.sampled_from([key, f"model.{key}", "init_args", "class_path", "dict_kwargs", "base"]))] = value
    return text_of(tree)


def other_line(draw, tree, holder, key):
    lines = text_of(tree).splitlines()
    i = draw(st.integers(0, len(lines) - 1))
    indent = draw(st.sampled_from(["", " ", "  ", "    ", "\t", "- ", "? ", "# ", "&a ", "<<: ", "---\n", "\ufeff"]))
    lines[i] = indent + (lines[i].lstrip() if draw(st.booleans()) else lines[i])
    return "\n".join(lines)


def cut_off(draw, tree, holder, key):
    text = text_of(tree)
    return text[: draw(st.integers(0, len(text)))]


def other_bytes(draw, tree, holder, key):
    text = text_of(tree | {"name": draw(words)})
    encoded = text.encode(
        draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "cp037"])), "replace"
    )
    i = draw(st.integers(0, len(encoded)))
    return encoded[:i] + draw(st.binary(max_size=3)) + encoded[i:]


KINDS = [other_value, other_type, other_key, twice, elsewhere, other_line, cut_off, other_bytes]


def leaves(value, above=()):
    "{dotted name: value} of nested data, without the names that only say how a class is written."
    if not isinstance(value, dict) or not value:
        return {".".join(map(str, above)): value}
    found = {}
    for key, part in value.items():
        group = key in ("init_args", "dict_kwargs")
        found |= {} if group and not part else leaves(part, above if group else (*above, key))
    return found


def same(written, read):
    "Whether a value was read as it was written: a number may be written as text, a class by its short name."
    if written == read or str(written) == str(read):
        return True
    if isinstance(written, (list, tuple)) and isinstance(read, (list, tuple)):
        return len(written) == len(read) and all(map(same, written, read))
    if isinstance(read, dict):  # a class that was named alone
        return same(written, read.get("class_path"))
    if isinstance(read, bool) or isinstance(written, bool) or read is None:
        return str(written).lower() == str(read).lower() or written in ("null", None)
    try:
        return float(written) == float(read) or written != written
    except (TypeError, ValueError):
        return str(read).endswith((f".{written}", str(written).removeprefix("~")))


def repeats(text):
    "Whether some mapping of a YAML text has a key twice, counted over the events of its parser."
    open_mappings, again = [], False
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        starts = isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent, yaml.CollectionStartEvent))
        if starts and open_mappings and open_mappings[-1] is not None:
            open_mappings[-1].append(getattr(event, "value", object()))  # keys and values take turns
        if isinstance(event, yaml.CollectionStartEvent):
            open_mappings.append([] if isinstance(event, yaml.MappingStartEvent) else None)
        elif isinstance(event, yaml.CollectionEndEvent):
            keys = (open_mappings.pop() or [])[::2]
            again |= len(set(keys)) < len(keys)
    return again


def check(content, folder):
    "Read a recipe: nothing may be dropped, and an error must be one line that names the file or an option."
    path = folder / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        with redirect_stdout(StringIO()):
            config = parse_config(["--recipe", str(path)])
    except (ValueError, OSError) as e:
        line = str(e)
        assert line and "\n" not in line and "Traceback" not in line
        names = {part for name in option_names() for part in name.split(".")}
        assert str(path) in line or any(name in line for name in names), line
        return
    assert not repeats(path.read_text(encoding="utf-8"))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    above = {} if "base" not in written else as_data(parse_config(["--recipe", str(written.pop("base"))]))
    read = leaves(as_data(config))
    for name, value in leaves(written).items():
        if value == {} or name.endswith("class_path") or name in above:
            continue  # nothing was asked for; the class is compared below
        if name in ("reward", "credit", "window", "sampler", "objective"):
            name += ".class_path"
        assert name in read and same(value, read[name]), f"{name}: {value!r} was read as {read.get(name)!r}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder for the recipes."
    return tmp_path_factory.mktemp("fuzzed")


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=mutated())
@example(content="seed: 1\nseed: 2\n")
@example(content="optim: {lr: 1e-3}\noptim: {weight_decay: 0}\n")
@example(content="[" * 3000)
@example(content="a: &a [*a]\n")
@example(content=b"\xff\xfe")
def test_a_recipe_is_read_as_it_stands_or_refused_in_one_line(content, folder):
    check(content, folder)


def test_the_fuzzed_recipe_itself_is_read(folder):
    check(text_of(VALID), folder)
    assert parse_config(["--recipe", str(folder / "mine.yaml")]).optim.betas == (0.5, 0.75)


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "x: {y: 1, z: [{k: 1, 'k': 2}]}", "x:\n  <<: {a: 1}\n  <<: {b: 1}"]
)
def test_a_key_that_repeats_would_be_noticed(text):
    assert repeats(text) and not repeats(text.replace("a: 3", "c: 3").replace("'k'", "m").replace("<<: {b", "n: {b"))
