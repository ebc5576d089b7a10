"""Does each part of the package lean only on what lies below it, and can the core be read in one sitting?"""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from tests.conftest import ROOT

CORE = ["config", "model", "loss", "tokenizer", "transforms", "data", "trainer", "retrieval", "checkpoint"]
MAY_IMPORT = {  # part -> the parts that it may import, besides itself; a new folder gets a row
    "utils": "",
    "core": "utils",
    "datasets": "utils",
    "towers": "utils core",
    "weights": "utils core towers",
    "reports": "utils core",
    "run": "utils core datasets reports",
    "inference": "utils core datasets towers weights",
    "training": "utils core datasets towers weights reports run inference",
    "classify": "utils core datasets reports inference",
    "index": "utils core datasets reports inference",
    "page": "utils classify index inference reports",
    "compat": "utils core towers weights inference training classify",
    "commands": "utils core datasets towers weights reports run inference training classify index page",
}
FACADE = {"miniclip", "miniclip.__main__"}  # may import anything, and nothing imports them


def module(file: Path) -> str:
    """miniclip/run/guard.py -> miniclip.run.guard"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(file): file for file in sorted((ROOT / "miniclip").rglob("*.py"))}


def part(name: str) -> str:
    """The part that a module belongs to: core for the nine files, else its folder."""
    path = name.split(".")
    return "core" if path[1] in CORE else path[1]


def imports(file: Path) -> list[tuple[int, str]]:
    """The modules of this package that a file imports, wherever in it, with their lines."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "miniclip":
            whole = [f"{node.module}.{name.name}" for name in node.names]
            found += [(node.lineno, name if name in FILES else node.module) for name in whole]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.split(".")[0] == "miniclip"]
    return found


GRAPH = {name: {other for _, other in imports(file)} for name, file in FILES.items()}


def test_imports_run_one_way():
    wrong = []
    for name, file in FILES.items():
        for line, other in imports(file):
            where = f"{file.relative_to(ROOT)}:{line} imports {other}"
            if other in FACADE:
                wrong.append(f"{where}: nothing of the package leans on its facade")
            elif name not in FACADE and part(other) not in (part(name), *MAY_IMPORT[part(name)].split()):
                wrong.append(f"{where}: {part(name)} may not lean on {part(other)}")
    assert not wrong, "\n".join(wrong)


def floors() -> dict[str, int]:
    """How many imports deep each file lies; raises for a circle."""
    depth, path = {}, []

    def floor(name: str) -> int:
        if name in path:
            raise AssertionError("a circle of imports: " + " -> ".join([*path[path.index(name) :], name]))
        if name not in depth:
            path.append(name)
            depth[name] = 1 + max((floor(other) for other in sorted(GRAPH[name])), default=-1)
            path.pop()
        return depth[name]

    return {name: floor(name) for name in GRAPH}


def test_nothing_leans_on_the_faces_of_other_libraries():
    assert not [n for n, others in GRAPH.items() if part(n + ".") != "compat" and any(".compat" in o for o in others)]


def test_no_circles():
    deepest = max(floors().values())
    assert deepest <= 12, f"imports are {deepest} floors deep: {floors()}"


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_the_core_is_read_in_one_sitting():
    core = {name: lines(ROOT / "miniclip" / f"{name}.py") for name in CORE}
    assert sum(core.values()) <= 1300 and max(core.values()) <= 310 and core["trainer"] <= 110, core
    scripts = {name: lines(ROOT / name) for name in ("train.py", "evaluate.py")}
    assert max(scripts.values()) <= 60, scripts


def test_the_package_stays_small():
    package = {name: lines(file) for name, file in FILES.items()}
    assert max(package.values()) <= 400, package
    assert sum(package.values()) <= 22400, sum(package.values())


def test_train_has_at_most_30_flags_of_its_own():
    from miniclip.trainer import ClipTrainingArguments
    from miniclip.training.arguments import RunArguments
    from miniclip.training.options import TrainOptions

    own = {field.name for field in fields(RunArguments)} - {field.name for field in fields(ClipTrainingArguments)}
    assert len(fields(TrainOptions)) + len(own) <= 30, sorted(own)


def test_our_own_classes_are_not_probed():
    """hasattr and getattr with a default are for other people's objects; ours have base classes with defaults."""
    names = {"read", "key", "tokenizer", "trunk", "sampler", "dataloader", "label", "features", "pretrained", "blocks"}
    found = []
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            probe = node.func.id == "hasattr" or node.func.id == "getattr" and len(node.args) == 3
            if probe and isinstance(node.args[1], ast.Constant) and node.args[1].value in names:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not found, "\n".join(found)


# The private methods of Trainer that are overridden, with the parameters they must have in the installed transformers:
# a rename there fails here, by name, and not in the middle of somebody's run.
PRIVATE = {
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
}
IN_RUNS = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_init_training_state": ["self", "max_steps", ...],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_maybe_log_save_evaluate": None,  # all arguments are passed on, unseen
    "_run_epoch": None,
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_callback_state": ["self"],
    "_load_best_model": ["self"],
    "_finalize_training": None,
}


def test_the_private_methods_of_trainer_that_are_overridden():
    import inspect

    from transformers import Trainer

    from miniclip.run.guard import GuardedTrainer
    from miniclip.trainer import ClipTrainer
    from miniclip.training.trainer import RunTrainer

    def overridden(cls) -> set[str]:
        return {n for n in vars(cls) if n.startswith("_") and not n.startswith("__") and hasattr(Trainer, n)}

    assert overridden(ClipTrainer) == set(PRIVATE), "the core overrides two: saving and strict loading"
    assert (overridden(GuardedTrainer) | overridden(RunTrainer)) - set(PRIVATE) == set(IN_RUNS)
    for name, parameters in (PRIVATE | IN_RUNS).items():
        if parameters is not None:
            found = list(inspect.signature(getattr(Trainer, name)).parameters)
            known = parameters.index(...) if ... in parameters else None
            assert found[:known] == parameters[:known], name


@pytest.mark.parametrize("name", sorted(set(map(part, set(FILES) - FACADE)) - {"core", "commands"}))
def test_each_room_has_its_tests_and_its_page(name):
    assert list((ROOT / "tests" / name).glob("test_*.py")), f"tests/{name} has no tests"
    assert (ROOT / "docs" / f"{name}.md").is_file() or name == "utils", f"docs/{name}.md is missing"
