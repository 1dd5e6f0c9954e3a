"""Imports point down: who may import whom, and what a quick command must not load."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# From the ground up. A module may import from lower layers and, where a layer is a package, from its own package, nowhere
# else; the longest name that fits decides. Imports inside functions count as well.
LAYERS = (
    ("errors", "hashing", "paths"),
    ("models.own_file",),
    ("mm.compat", "ops", "measure", "pictures", "words.class_list", "networks.builtin", "registry", "words.prompts"),
    ("spec", "networks", "benchmarks", "models.backbone_constants"),
    ("words", "results", "models.base", "models.trainable"),
    (
        "models.method",
        "models.windowed",
        "models.trained_file",
        "models.public_file",
        "train.recipe",
        "mm.label_loading",
    ),
    ("models.resolve", "train.record"),
    ("models.closed_set", "models.mask_method", "networks.builtin.readouts", "networks.builtin.corpus"),
    ("methods", "models.patch_model", "models.closed_set_branches", "tables", "networks.builtin.evaluation"),
    ("mm.heads", "mm.readers", "mm.panoptic_dataset", "models.view_averaging", "models.mask_model"),
    ("networks.builtin.train",),
    ("models.closed_set_weights",),
    ("models.closed_set_start",),
    ("models.build",),
    ("mm.segmentor",),
    ("measure.profile",),
    ("evaluate",),
    ("train", "evaluate.sweep"),
    ("cli",),
    ("__main__", "__init__", "models", "mm"),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

MM = {"mmseg", "mmengine", "mmcv", "cv2"}
# What parts of the suite must never import, at any level, and why.
NEVER = {
    **dict.fromkeys(
        (
            "ops",
            "networks",
            "methods",
            "models.base",
            "models.method",
            "models.resolve",
            "models.windowed",
            "models.patch_model",
            "models.view_averaging",
            "models.mask_method",
            "models.mask_model",
            "measure",
            "words",
        ),
        MM,
    ),
    **dict.fromkeys(
        ("errors", "paths", "registry", "spec", "results", "tables"), MM | {"torch", "torchvision", "open_clip"}
    ),
    "networks.builtin.scenes": MM | {"torch", "torchvision", "open_clip"},
}


def _sources() -> Iterator[tuple[str, Path]]:
    """Every module without the leading ``ovbench.``, and its file."""
    for folder, prefix in ((REPO / "ovbench", ()), (REPO / "methods", ("methods",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


def _imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Absolute names of everything that a module imports for running (not only for type checkers)."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _longest(name: str, table: dict) -> str | None:
    fitting = [key for key in table if name == key or name.startswith(key + ".")]
    return max(fitting, key=len, default=None)


def _problems(module: str, tree: ast.Module) -> Iterator[str]:
    own = _longest(module, RANKS)
    assert own is not None, f"'{module}' has no layer: add it to LAYERS"
    forbidden = NEVER.get(_longest(module, NEVER) or "", set())
    for name in _imports(tree, module):
        top, _, rest = name.partition(".")
        if top in forbidden:
            yield f"{module} must not import {top}"
        target = _longest(rest, RANKS) if top == "ovbench" else None
        if target in (None, own):
            continue
        if RANKS[target] >= RANKS[own]:
            yield f"{module} (layer {own}) imports {name} (layer {target}): imports point down"


@pytest.mark.parametrize(
    ("module", "path"), list(_sources()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_point_down(module, path):
    assert list(_problems(module, ast.parse(path.read_text(encoding="utf-8")))) == []


def _circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Modules that reach each other, in sets of two or more."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in edges}
    together = {frozenset(other for other in reach[module] if module in reach[other]) for module in edges}
    return {circle for circle in together if circle}


def _edges(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """What each module imports of the others, wherever in it; ``__init__`` of the suite, which all names begin with, aside."""
    found: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = [name.partition(".")[2] for name in _imports(tree, module) if name.startswith("ovbench.")]
        found[module] = {target for name in names if (target := _longest(name, trees)) and target != module}
    return found


def test_modules_do_not_import_each_other():
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in _sources()}
    assert _circles(_edges(trees)) == set()


def test_a_circle_is_found_inside_functions_too():
    sources = {
        "a": "from ovbench import b",
        "b": "def f():\n    from ovbench.c.d import g",
        "c": "",
        "c.d": "import ovbench.a",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ovbench.f import x",
        "f": "import ovbench.e",
    }
    circles = _circles(_edges({name: ast.parse(source) for name, source in sources.items()}))
    assert circles == {frozenset({"a", "b", "c.d"})}


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("ops.windows", "import mmseg.models", "must not import mmseg"),
        ("ops.windows", "def f():\n    from cv2 import resize", "must not import cv2"),
        ("tables.runs", "import torch", "must not import torch"),
        ("tables.runs", "from ovbench.evaluate import run", "imports point down"),
        ("networks.dense_clip", "from ovbench.mm import segmentor", "imports point down"),
        ("evaluate.loop", "from ovbench.cli.console import say", "imports point down"),
    ],
)
def test_the_rule_finds_what_it_forbids(module, source, found):
    assert any(found in problem for problem in _problems(module, ast.parse(source)))


def test_an_import_for_types_only_is_allowed():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n    from ovbench.cli import main"
    assert list(_problems("tables.runs", ast.parse(source))) == []


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("ovbench, ovbench.errors, ovbench.registry, ovbench.spec", {"torch", "open_clip", "numpy", "pandas", *MM}),
        ("ovbench.tables.runs, ovbench.tables.render, ovbench.results.store", {"torch", "open_clip", "pandas", *MM}),
        ("ovbench.benchmarks", {"torch", "open_clip", *MM}),
        ("ovbench.cli.app", {"torch", "open_clip", "pandas", *MM}),
        ("ovbench.ops, ovbench.measure.flops, ovbench.measure.timing, ovbench.measure.environment", MM),
        (
            "ovbench.models.patch_model, ovbench.words.embeddings, ovbench.networks.dense_clip, ovbench.networks.clip_weights",
            MM,
        ),
    ],
)
def test_what_an_import_loads(run_python, modules, heavy):
    done = run_python("-c", f"import {modules}, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert heavy & set(json.loads(done.stdout)) == set()


def test_every_method_loads_without_mmseg(run_python):
    code = (
        "import json, sys; from ovbench.registry import method_class, method_names\n"
        "for name in method_names(): method_class(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "torch" in loaded and MM & loaded == set()


QUICK_NEVER = {"torch", "open_clip", "pandas", "scipy", "transformers", *MM}
QUICK = [
    ("--help",),
    ("run", "--help"),
    ("predict", "--help"),
    ("train", "--help"),
    ("sweep", "--help"),
    ("list",),
    ("table",),
    ("compare", "--help"),
    ("schema",),
    ("data", "list"),
    ("data", "download", "cityscapes", "--dry-run"),
    ("--version",),
]


def test_quick_commands_load_no_torch(run_python, tmp_path):
    """One after the other in one process, from which what was loaded does not go away."""
    code = (
        "import sys; from ovbench.cli.app import run_command\n"
        f"for arguments in {QUICK}:\n"
        "    status = run_command(arguments)\n"
        f"    print('AFTER', ' '.join(arguments), sorted({QUICK_NEVER} & set(sys.modules)), status, file=sys.stderr)"
    )
    done = run_python("-c", code, cwd=tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("AFTER ")]
    assert told == [f"AFTER {' '.join(arguments)} [] 0" for arguments in QUICK], done.stderr


def test_what_is_imported_comes_with_a_plain_install():
    """Or belongs to an extra, and then only where the extra is spoken of."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    core = set(re.findall(r'^    "([\w-]+)', text.partition("\ndependencies = [")[2].partition("\n]")[0], re.MULTILINE))
    called = {
        **{"open_clip": "open_clip_torch", "PIL": "pillow", "yaml": "pyyaml", "mmseg": "mmsegmentation"},
        **dict.fromkeys(("mmcv", "cv2"), "mmcv-lite"),  # mmcv brings OpenCV
    }
    optional = {"diffusers", "fvcore", "mlflow", "ray", "submitit", "wandb", "tensorboard"}
    for module, path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = set(_imports(tree, module))
        names |= {
            str(call.args[0].value)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "importlib.import_module"
            if call.args and isinstance(call.args[0], ast.Constant)
        }
        tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ovbench"} - optional
        assert {called.get(top, top) for top in tops} - core == set(), module


def test_all_packages_are_declared():
    """A folder with modules that pyproject.toml does not list would be missing from a wheel."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    expected = set()
    for folder, prefix in (("ovbench", ()), ("methods", ("ovbench",)), ("dataset_configs", ("ovbench",))):
        # Folders of data count as packages too: setuptools takes files from nowhere else.
        for path in (REPO / folder).rglob("*"):
            if path.suffix in (".py", ".json", ".safetensors"):
                expected.add(".".join((*prefix, *path.parent.relative_to(REPO).parts)))
    expected.add("ovbench.published")  # results/published: the papers' numbers
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == expected


def test_only_models_and_the_registry_tell_kinds_of_models_apart():
    """Elsewhere the declared interface of ovbench.models.base.Model, and MethodInfo.takes_words, must do."""
    kinds = {"OpenVocabModel", "ViewModel", "MaskModel", "ClosedSetModel", "CLOSED_SET"}
    wrong = []
    for module, path in _sources():
        if module.startswith(("models.", "registry", "methods.", "networks.", "words.")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                wrong += [f"{module} imports {alias.name}" for alias in node.names if alias.name in kinds]
            elif isinstance(node, ast.Call) and ast.unparse(node).startswith(("getattr(model,", "getattr(self.model,")):
                wrong.append(f"{module} line {node.lineno}: {ast.unparse(node)}")
    assert wrong == []
