"""The arrows between modules, read from the source."""

import ast
from pathlib import Path

import pytest

import pyro_amortize

PACKAGE = Path(pyro_amortize.__file__).parent
ORDER = [
    # A module imports only from lines above its own.
    {"bars", "calls"},
    {
        "annealing",
        "convergence",
        "arviz_bridge",
        "digits",
        "plots",
        "supports",
        "structure",
        "parameters",
        "pooling",
        "families",
        "registration",
        "answers",
        "layout",
    },
    {"missing", "masks", "places"},
    {
        "arguments",
        "excerpt",
        "loops",
        "views",
        "encoders",
        "levels",
        "enumeration",
        "posterior",
        "capture",
        "subsamples",
    },
    {"groups", "elbos", "draws"},
    {"unconstrained", "held", "elements"},
    {"nuts", "idle"},
    {"probes"},
    {"labels", "latents", "slices", "sources", "bases"},
    {"examination"},
    {"plan", "inputs", "storage"},
    {"verdict", "reading", "carried", "answering", "remedies", "changes"},
    {"sight"},
    {"planner", "building", "prediction", "uninformed"},
    {"parametrization"},
    {"handler"},
    {"guides"},
    {"densities", "distance", "minibatch", "pointwise"},
    {"steps"},
    {"fit", "local_joint"},
    {"elsewhere", "reference", "mcmc"},
    {"optimum", "proposals", "sensitivity"},
    {"evidence"},
    {"estimates"},
    {"advice", "conditioning", "doubts"},
    {"gap", "moments"},
    {"compare"},
    {"decorator", "inference_data"},
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
SAMPLING = {"guides", "handler"}


def tree(name):
    return ast.parse((PACKAGE / f"{name}.py").read_text())


def for_typing_only(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own_imports(node):
    """Names of modules of the package that are imported below a node."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if for_typing_only(child):
            continue
        if isinstance(child, ast.ImportFrom) and (child.level or (child.module or "").startswith("pyro_amortize")):
            parts = (child.module or "").split(".")
            found |= {parts[-1]} if len(parts) > 1 else {alias.name for alias in child.names}
        elif isinstance(child, ast.Import):
            found |= {a.name.split(".")[-1] for a in child.names if a.name.startswith("pyro_amortize")}
        else:
            found |= own_imports(child)
    return found


def functions(name):
    return [node for node in ast.walk(tree(name)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_every_module_has_its_place():
    placed = [name for line in ORDER for name in line]
    assert sorted(placed) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_up_only(name):
    above: set[str] = set()
    for line in ORDER:
        if name in line:
            break
        above |= line
    assert own_imports(tree(name)) <= above


@pytest.mark.parametrize("name", MODULES)
def test_no_import_of_ours_hides_in_a_function(name):
    assert not set().union(*(own_imports(function) for function in functions(name)))


@pytest.mark.parametrize("name", sorted(set(MODULES) - SAMPLING))
def test_only_the_guide_samples(name):
    called = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
    assert not called & {"pyro.sample", "sample", "pyro.deterministic", "pyro.factor"}


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short_and_modules_say_what_they_are(name):
    long = {f.name: f.end_lineno - f.lineno for f in functions(name) if len(_code(f)) > 60}
    assert not long
    assert ast.get_docstring(tree(name))


def _code(function):
    """Lines of a function but its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return range(body[0].lineno, function.end_lineno + 1) if body else []


def test_no_drawers():
    assert not {"utils", "util", "base", "helpers", "common", "misc"} & set(MODULES)


def test_heavy_optional_libraries_are_imported_where_used():
    for name in MODULES:
        top = [node for node in tree(name).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        roots = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
        roots |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
        assert not roots & {"matplotlib", "nutpie", "zuko", "sklearn"}, name


def test_public_names_are_exported_and_sorted():
    assert pyro_amortize.__all__ == sorted(pyro_amortize.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(pyro_amortize, name) for name in pyro_amortize.__all__)
