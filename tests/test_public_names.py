"""What the package offers is what its modules say they offer, and every name says what it promises."""

import importlib
import inspect
import pkgutil
import typing

import pytest

import conversion
import flexgen_hf


def public_modules() -> list[str]:
    names = []
    for package in (flexgen_hf, conversion):
        found = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
        names += [package.__name__, *found]
    return sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))


@pytest.mark.parametrize("name", public_modules())
def test_a_module_lists_names_that_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say what it is"
    if not hasattr(module, "__all__"):
        assert hasattr(module, "__path__"), f"{name} has no __all__"
        return
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        is_alias = typing.get_origin(value) is not None
        if not is_alias and (inspect.isclass(value) or inspect.isfunction(value)):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def test_the_package_offers_exactly_this():
    assert sorted(flexgen_hf.__all__) == [
        "CapacityError",
        "Compression",
        "ConversionError",
        "FlexGenError",
        "FlexGenForCausalLM",
        "Placement",
        "Policy",
        "PolicyError",
        "QuantizationError",
        "RunReport",
        "StepError",
        "StoreError",
        "Tier",
        "UnsupportedModelError",
    ]


@pytest.mark.parametrize("name", [n for n in flexgen_hf.__all__ if n.endswith("Error")])
def test_errors_are_one_tree_and_also_what_callers_already_catch(name):
    error = getattr(flexgen_hf, name)
    assert issubclass(error, flexgen_hf.FlexGenError)
    assert error is flexgen_hf.FlexGenError or len(error.__bases__) == 2
