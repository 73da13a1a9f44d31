"Sphinx's configuration for the site; build.py says how the pages come about."

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import build  # noqa: E402

project, author, copyright = "vgpo", build.SETTINGS["author"], build.SETTINGS["copyright"]
release = build.SETTINGS["version"]
root_doc = str(build.start().relative_to(build.ROOT).with_suffix(""))
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax in the site itself, where Sphinx would point to a server of others
]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # of outputs; by default their tables are not read
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
smartquotes = False

autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_preserve_defaults = True

toc_object_entries_show_parents = "hide"
add_module_names = False  # a page is of one module
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "vgpo"
html_baseurl = build.SETTINGS["doc_host"] + build.SETTINGS["doc_baseurl"] + "/"
html_static_path, html_css_files, html_favicon = ["style.css"], ["style.css"], "icon.svg"
html_use_index = html_domain_indices = False  # the search finds names
html_context = {"default_mode": "auto"}  # dark where the reader's system is
html_theme_options = {
    "repository_url": build.SETTINGS["git_url"],
    "repository_branch": build.SETTINGS["branch"],
    "use_repository_button": True,
    "launch_buttons": {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
        "notebook_interface": "jupyterlab",
    },
    "collapse_navbar": True,  # the sidebar lists the pages of the part that is read; all on each page take minutes
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_toc_level": 2,
}


def show_page(app, name, source):
    for suffix in (".ipynb", ".md"):
        if (path := build.ROOT / (name + suffix)) in build.pages():
            source[0] = build.page(source[0], path)


def show_docstring(app, what, name, obj, options, lines):
    "Docstrings are plain text in which backticks mean code; Sphinx expects reStructuredText."
    parts = re.split(r"(`+[^`]+`+)", "\n".join(lines))
    parts = [f"``{part.strip('`')}``" if part[:1] == "`" else re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts]
    text = "".join(parts).replace("Args:\n", "")
    text = re.sub(r"Alias for field number \d+", "", text)  # what Python says of a field of a named tuple
    lines[:] = re.sub(r"(?m)^ +(\w+): ", r":param \1: ", text).split("\n")


def drop_signature(app, what, name, obj, options, signature, returned):
    "Of a dataclass whose fields are all listed below it."
    if what == "class" and is_dataclass(obj) and {field.name for field in fields(obj)} <= set(obj.__annotations__):
        return "", None


def drop_object(app, domain, kind, content):
    "That a class has no base but object need not be said."
    for paragraph in [p for p in content.children if p.astext() == "Bases: object"]:
        content.remove(paragraph)


def setup(app):
    app.connect("source-read", show_page)
    app.connect("autodoc-process-docstring", show_docstring)
    app.connect("autodoc-process-signature", drop_signature)
    app.connect("object-description-transform", drop_object)
