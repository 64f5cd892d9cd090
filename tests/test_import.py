"""`import flexgen_hf` is cheap, and registers with transformers whichever of the two is imported first."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_hf._register import when_imported

ROOT = Path(__file__).parent.parent

IS_REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "flexgen" in AUTO_QUANTIZATION_CONFIG_MAPPING and "flexgen" in AUTO_QUANTIZER_MAPPING
import sys
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "flexgen_hf._register"]
print("registered")
"""

# Each of these enters transformers through another door, and so imports its modules in another order.
WAYS_INTO_TRANSFORMERS = [
    "from transformers import AutoModelForCausalLM",
    "from transformers import pipeline",
    "from transformers import OPTForCausalLM",
    "import transformers.modeling_utils",
    "from transformers.quantizers.base import HfQuantizer",
]


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("way", WAYS_INTO_TRANSFORMERS)
def test_flexgen_first(way):
    assert python(f"import flexgen_hf\n{way}\n{IS_REGISTERED}") == "registered\n"


@pytest.mark.parametrize("way", ["import transformers", "from transformers import OPTForCausalLM"])
def test_transformers_first(way):
    assert python(f"{way}\nimport flexgen_hf\n{IS_REGISTERED}") == "registered\n"


def test_importing_the_model_class_registers():
    assert python(f"from flexgen_hf import FlexGenForCausalLM\n{IS_REGISTERED}") == "registered\n"


def test_import_is_light():
    code = "import flexgen_hf, sys; print(sorted({'torch', 'transformers', 'numpy', 'conversion'} & set(sys.modules)))"
    assert python(code) == "[]\n"


def test_the_lazy_names_are_listed_and_unknown_ones_refused():
    code = "import flexgen_hf; print('FlexGenForCausalLM' in dir(flexgen_hf), hasattr(flexgen_hf, 'FlexGen'))"
    assert python(code) == "True False\n"


@pytest.fixture
def awaited(tmp_path, monkeypatch):
    """A registry that nothing has imported yet, in place of transformers' own."""
    (tmp_path / "awaited_registry.py").write_text("READY = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("flexgen_hf._register._REGISTRY", "awaited_registry")
    monkeypatch.setattr("flexgen_hf._register._USER", "awaited_user")
    others = [finder for finder in sys.meta_path if type(finder).__module__ != "flexgen_hf._register"]
    monkeypatch.setattr(sys, "meta_path", others)
    yield "awaited_registry"
    sys.modules.pop("awaited_registry", None)


def test_registration_waits_for_the_registry_and_happens_once(awaited):
    seen = []
    finders = list(sys.meta_path)
    when_imported(lambda: seen.append(sys.modules[awaited].READY))
    assert seen == []
    assert importlib.util.find_spec(awaited) is not None
    assert seen == [], "looking for a module is not importing it"
    importlib.import_module(awaited)
    assert seen == [True]
    assert sys.meta_path == finders
    del sys.modules[awaited]
    importlib.import_module(awaited)
    assert seen == [True]


def test_registration_is_immediate_when_the_registry_is_there(awaited):
    importlib.import_module(awaited)
    seen = []
    when_imported(lambda: seen.append(True))
    assert seen == [True]


def test_an_error_of_the_registration_reaches_the_importer(awaited):
    def register():
        raise RuntimeError("greenlet is missing")

    when_imported(register)
    with pytest.raises(RuntimeError, match="greenlet is missing"):
        importlib.import_module(awaited)
    importlib.import_module(awaited)
