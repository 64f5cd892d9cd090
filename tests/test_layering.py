"""The tree is the architecture: which part may import which, read from the source, not from a run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flexgen_hf", "conversion")

# A part may import only parts of the rows above its own. A part is a module or a folder of `flexgen_hf`.
ROWS = (
    {"errors", "policy", "families", "_register"},
    {"planning", "quantization"},
    {"storage"},
    {"cell_layout", "state_trial"},
    {"cell_attention", "cell_space"},
    {"weights", "cells", "hidden_states", "architectures", "fixed_weights", "tiny_configs"},
    {"kv_cache", "parameters", "report", "compression", "tiles", "rotary", "attention"},
    {"progress", "microbatches", "experts", "profiled_compute"},
    {"accounting", "padding", "profiling"},
    {"placing", "default_policy", "profile_cache"},
    {"auto_policy"},
    {"executor"},
    {"checkpoint_files"},
    {"gguf_files", "prequantized"},
    {"checkpoints", "continuous"},
    {"loading", "modeling"},
    {"__init__"},
    {"text"},
    {"quality", "bench", "apps", "sweep", "plots"},
    {"demo", "plan_command", "profile_command", "models_command", "options"},
    {"integrations"},
    {"batch_command", "helm_command", "lm_eval_command", "wrangle_command"},
    {"cli"},
)
ROW_OF = {part: number for number, row in enumerate(ROWS) for part in row}

# parts of one row that may know each other, with the reason
MATES = {
    frozenset({"errors", "policy"}): "policies raise errors",
    frozenset({"loading", "modeling"}): "two ends of one hook: from_pretrained enters transformers' loading, which "
    "makes the loaded model one of ours",
}

# the package's front door names what is behind it, and registers it with transformers
FRONT_DOOR = "__init__"

# who may import `conversion`
REACHES_CONVERSION = {"cli", "bench"}

# third-party packages that a part must do without
FORBIDDEN = {
    "errors": {"torch", "transformers", "numpy"},
    "policy": {"torch", "transformers", "numpy"},
    "families": {"torch", "transformers", "numpy"},
    "_register": {"torch", "transformers", "numpy"},
    "planning": {"torch", "transformers", "accelerate", "safetensors", "huggingface_hub"},
    "quantization": {"transformers", "accelerate"},
    "storage": {"transformers", "accelerate", "safetensors", "huggingface_hub"},
    "progress": {"torch", "transformers", "numpy"},
    "plots": {"torch", "transformers", "numpy"},
    "__init__": {"torch", "transformers", "numpy"},
}

# transformers' less public modules change without notice; these parts may touch them
INTERNALS = (
    "transformers.quantizers",
    "transformers.modeling_utils",
    "transformers.core_model_loading",
    "transformers.modeling_gguf_pytorch_utils",
)
TOUCHES_INTERNALS = {
    "loading": "it enters transformers' from_pretrained through its quantizer registry",
    "modeling": "it subclasses transformers' models",
    "prequantized": "what brings the operations that dequantize into the mapping of a checkpoint is in there",
    "gguf_files": "transformers' reader of GGUF files can only read them whole; its rules are taken from it one by one",
    "checkpoints": "transformers describes there how checkpoint tensors are renamed and fused into the model's",
}

# files that may name a model family
NAMES_FAMILIES = {
    "flexgen_hf/families.py": "it is the one place for what is said of families by their names",
    "flexgen_hf/tiny_configs.py": "a few types have defaults of which no model can be built",
    "conversion/numpy_folder.py": "the original's numpy folders hold OPT and name no architecture themselves",
    "conversion/metaseq.py": "metaseq's shards hold OPT and name no architecture themselves",
    "flexgen_hf/bench/machine.py": "it asks git, the program, for the commit",
}


def sources() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sources()}


def imports_of(file: Path, skipped: tuple[type[ast.AST], ...] = ()) -> Iterator[str]:
    """Absolute names of the modules that a file imports, but for those below a node of a skipped kind."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in walk(ast.parse(file.read_text()), skipped):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield name if (name := f"{source}.{alias.name}") in MODULES else source


def walk(node: ast.AST, skipped: tuple[type[ast.AST], ...]) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        is_types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not (skipped and is_types_only) and not isinstance(child, skipped):
            yield from walk(child, skipped)


def part_of(module: str) -> str:
    """The part of `flexgen_hf` to which a module belongs; the package itself is its front door."""
    return [*module.split("."), FRONT_DOOR][1]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("flexgen_hf")))
def test_a_row_imports_only_rows_above_it(module: str):
    part = part_of(module)
    assert part in ROW_OF, f"{part} has no row; give it one in ROWS and in docs/architecture.md"
    for imported in imports_of(MODULES[module]):
        if not imported.startswith("flexgen_hf"):
            continue
        other = part_of(imported)
        allowed = other == part or ROW_OF[other] < ROW_OF[part] or frozenset({part, other}) in MATES
        assert allowed, f"{module} imports {imported}, which is not above it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_conversion_is_reached_from_commands_only(module: str):
    if module.startswith("conversion"):
        for imported in imports_of(MODULES[module]):
            if imported.startswith("flexgen_hf"):
                assert ROW_OF[part_of(imported)] <= ROW_OF[FRONT_DOOR], f"{module} imports {imported}"
    elif part_of(module) not in REACHES_CONVERSION:
        reached = [name for name in imports_of(MODULES[module]) if name.split(".")[0] == "conversion"]
        assert not reached, f"{module} imports {reached[0]}"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("flexgen_hf")))
def test_parts_do_without_what_they_must_not_know(module: str):
    imported = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert not imported & FORBIDDEN.get(part_of(module), set())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_few_touch_the_internals_of_transformers(module: str):
    if module.startswith("flexgen_hf") and part_of(module) in TOUCHES_INTERNALS:
        return
    touched = [name for name in imports_of(MODULES[module]) if name.startswith(INTERNALS)]
    assert not touched, f"{module} imports {touched[0]}"


def test_modules_import_without_cycles():
    """No module needs, to be imported, one that needs it. Imports inside functions and for types only do not count."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    needs = {name: set(imports_of(file, functions)) & (MODULES.keys() - {name}) for name, file in MODULES.items()}
    while ready := {name for name, others in needs.items() if not others}:
        needs = {name: others - ready for name, others in needs.items() if name not in ready}
    assert not needs, f"import cycle among {sorted(needs)}"


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_only_one_file_names_model_families(file: Path):
    if str(file.relative_to(ROOT)) in NAMES_FAMILIES:
        return
    families = family_names()
    named = [text for text in literals(file) if text in families]
    assert not named, f"{file.name} names the model family {named[0]!r}; that belongs into families.py"


def literals(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def family_names() -> set[str]:
    """Model types and class names of every causal language model that transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name for pair in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() for name in pair if isinstance(name, str)}


def test_the_scan_knows_families():
    assert {"opt", "llama", "OPTForCausalLM"} <= family_names()


def test_planning_imports_no_torch_even_by_detour():
    modules = [module for module in MODULES if module.startswith(("flexgen_hf.planning", "flexgen_hf.policy"))]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
