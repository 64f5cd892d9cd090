"""Opens what can be converted: a Hub repository, a Hugging Face folder, a GGUF file, a numpy folder, metaseq's shards.

Every format ends as the same thing: a model on `meta`, and for each of its tensors where the elements come from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from flexgen_hf.architectures import describe
from flexgen_hf.checkpoint_files import CheckpointTensor, first_line, index_files, source_fingerprint
from flexgen_hf.checkpoints import match, plan_shards, planned_quantizing, target_dtype
from flexgen_hf.errors import ConversionError, StoreError, UnsupportedModelError
from flexgen_hf.gguf_files import float_type, index_gguf, refuse_missing_reader
from flexgen_hf.policy import Compression
from flexgen_hf.prequantized import METHOD, dequantizer, method_of, stored_settings
from flexgen_hf.weights.format import FORMAT_VERSION, INDEX_NAME, MANIFEST_NAME
from flexgen_hf.weights.quantized import Method, Quantizing
from flexgen_hf.weights.writer import JOURNAL_NAME, Origin, ShardPlan

from . import metaseq, numpy_folder
from .hub import download

__all__ = ["Source", "SourceOptions", "open_source", "parse_dtype"]

_logger = logging.getLogger(__name__)

# Weights of one checkpoint, in the order in which transformers prefers them: one file, or an index of several.
_WEIGHTS = (("model.safetensors", INDEX_NAME), ("pytorch_model.bin", "pytorch_model.bin.index.json"))

# Small files that belong to a model: configuration, tokenizer, chat template, the model's own code, licence.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*")

_NOT_COMPANIONS = {"config.json", MANIFEST_NAME, JOURNAL_NAME}

_DTYPES = {
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
}


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read; the names and meanings are transformers' own.

    Args:
        dtype: the type to convert to; `None` keeps the checkpoint's.
        revision: branch, tag or commit on the Hub.
        token: Hub token.
        local_files_only: do not ask the Hub.
        trust_remote_code: run model code that the checkpoint brings along.
        config: folder with `config.json`, for formats that have none.
        gguf_file: name of the GGUF file to take from the repository or folder.
    """

    dtype: torch.dtype | None = None
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    config: Path | None = None
    gguf_file: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, opened.

    Args:
        origin: what the store's manifest will say about it.
        model: the model on `meta`, built in `dtype`.
        tensors: state-dict name to tensor.
        dtype: the type to convert to.
        companions: other files of the store: name to content, or to a file to copy.
    """

    origin: Origin
    model: Any
    tensors: Mapping[str, CheckpointTensor]
    dtype: torch.dtype
    companions: Mapping[str, bytes | Path]

    def plans(self, quantizing: Mapping[str, Quantizing] | None = None) -> list[ShardPlan]:
        """The shards of its store.

        Args:
            quantizing: how those tensors are quantized that are to be, by name.
        """
        dtypes = {name: target_dtype(self.model, name, self.dtype) for name in self.tensors}
        return plan_shards(describe(self.model), self.tensors, dtypes, quantizing)

    def quantizing(self, compression: Compression, method: Method) -> dict[str, Quantizing]:
        """How each tensor is to be quantized, of those that are to be.

        Raises:
            PolicyError: no such method.
        """
        return planned_quantizing(describe(self.model), self.tensors, compression, method)


def parse_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """A type of weights from its name; `None` and `"auto"` mean the checkpoint's.

    Raises:
        ConversionError: not a type that weights can have.
    """
    if value is None or value == "auto":
        return None
    found = value if isinstance(value, torch.dtype) else _DTYPES.get(value.removeprefix("torch."))
    if found not in _DTYPES.values():
        raise ConversionError(f"dtype {value!r} is not one of float16, bfloat16, float32")
    return found


def open_source(source: str | Path, options: SourceOptions) -> Source:
    """Opens a checkpoint; reads its headers, no weights.

    Args:
        source: Hub id, folder or GGUF file.
        options: how to read it.

    Raises:
        StoreError: it is missing, incomplete or broken.
        ConversionError: it is not one of the formats that can be converted.
        UnsupportedModelError: its model cannot be run.
    """
    folder = Path(source).expanduser()
    name, revision = str(folder.resolve()), None
    if folder.suffix == ".gguf" and folder.is_file():
        return _gguf(name, None, folder, options)
    if not folder.is_dir():
        if folder.exists() or not _may_be_hub_id(str(source)):
            raise StoreError(f"{source} is not a folder; give a folder with a checkpoint, or a Hub id such as org/name")
        name = str(source)
        folder, revision = download(name, options.revision, options.token, options.local_files_only, options.gguf_file)
    if options.gguf_file is not None:
        return _gguf(name, revision, folder / options.gguf_file, options)
    if metaseq.is_metaseq(folder):
        return _foreign(name, folder, metaseq.read(folder, _given_config(options)), options)
    if numpy_folder.is_numpy_folder(folder):
        return _foreign(name, folder, numpy_folder.read(folder, _given_config(options)), options)
    return _hugging_face(name, revision, folder, options)


def _may_be_hub_id(text: str) -> bool:
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and "\\" not in text


def _hugging_face(name: str, revision: str | None, folder: Path, options: SourceOptions) -> Source:
    config = _load_config(folder, options.trust_remote_code)
    quantizer = dequantizer(stored_settings(config))
    files = weight_files(folder)
    found = index_files(files)
    if any(tensor.quantized is not None for tensor in found.values()):
        raise ConversionError(f"{folder} is a store that is quantized already; convert the checkpoint it was made from")
    dtype = options.dtype or _own_dtype(config, found)
    model = meta_model(config, dtype, options.trust_remote_code)
    text = _read_json(folder / "config.json")
    companions = {**_companions(folder), "config.json": _store_config(text, dtype)}
    origin = Origin(name, revision, _dtype_text(dtype), source_fingerprint([*files, folder / "config.json"]))
    return Source(origin, model, match(model, found, dtype, quantizer), dtype, companions)


def _gguf(name: str, revision: str | None, file: Path, options: SourceOptions) -> Source:
    refuse_missing_reader()
    own = float_type(file)
    config = _gguf_config(file)
    dtype = options.dtype or own or torch.float16
    model = meta_model(config, dtype, trust_remote_code=False)
    describe(model)  # refuses what cannot be run before a tokenizer is made
    config.architectures = [type(model).__name__]
    companions = _companions(file.parent)
    if not any(known.startswith("tokenizer") for known in companions):
        companions |= _gguf_tokenizer(file)
    companions["config.json"] = _store_config(config.to_dict(), dtype)
    origin = Origin(name, revision, _dtype_text(dtype), source_fingerprint([file]))
    return Source(origin, model, match(model, index_gguf(model, file), dtype), dtype, companions)


def _gguf_config(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"transformers cannot read the configuration in {file} ({first_line(error)}); take the model's "
            "safetensors checkpoint"
        ) from error


def _gguf_tokenizer(file: Path) -> dict[str, bytes | Path]:
    """The files of the tokenizer in a GGUF file, or none with a warning: the weights do not need it."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        except Exception as error:  # noqa: BLE001 (a converter of tokenizers meets whatever the file holds)
            _logger.warning("the store gets no tokenizer: that of %s cannot be read (%s)", file, first_line(error))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _foreign(
    name: str, folder: Path, content: tuple[Any, dict[str, CheckpointTensor], list[Path]], options: SourceOptions
) -> Source:
    config, found, files = content
    dtype = options.dtype or _own_dtype(config, found)
    model = meta_model(config, dtype, trust_remote_code=False)
    config.architectures = [type(model).__name__]
    companions = {**_companions(options.config or folder), "config.json": _store_config(config.to_dict(), dtype)}
    origin = Origin(name, None, _dtype_text(dtype), source_fingerprint(files))
    return Source(origin, model, match(model, found, dtype), dtype, companions)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights.

    Raises:
        StoreError: there are none, or the index names one that is missing.
    """
    for single, index in _WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _indexed_files(folder, index)
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        raise StoreError(f"{folder} holds GGUF files; name the one to convert with --gguf-file {files[0]}")
    raise StoreError(
        f"{folder} holds no weights that can be converted (looked for {', '.join(sum(_WEIGHTS, ()))}); "
        "give a folder or Hub id of a PyTorch or safetensors checkpoint"
    )


def _indexed_files(folder: Path, index: str) -> list[Path]:
    weight_map = _read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_inside(name) for name in weight_map.values()):
        raise StoreError(f"{folder / index} has no usable weight_map; download it again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise StoreError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files: {', '.join(missing[:8])}; download them"
        )
    return files


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def meta_model(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The causal language model of a configuration, on `meta`: its modules and shapes, no memory.

    Raises:
        UnsupportedModelError: transformers knows no causal language model of this type.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers has no causal language model of type {config.model_type!r} ({first_line(error)})"
        ) from error


def _load_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise StoreError(f"{folder} has no config.json; it is not a checkpoint that can be converted")
    model_type = _read_json(folder / "config.json").get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers cannot read the configuration of model type {model_type!r} ({first_line(error)}); "
            "upgrade transformers, or pass trust_remote_code=True if the checkpoint brings code that you trust"
        ) from error
    if method_of(getattr(config, "quantization_config", None)) == METHOD:
        del config.quantization_config
    return config


def _given_config(options: SourceOptions) -> Any:
    return _load_config(options.config, options.trust_remote_code) if options.config is not None else None


def _own_dtype(config: Any, found: Mapping[str, CheckpointTensor]) -> torch.dtype:
    """The checkpoint's type: what its configuration says, else that of its first floating-point tensor.

    Of one in 8-bit floats, bfloat16, which holds each of them exactly.
    """
    dtype = getattr(config, "dtype", None)
    if dtype is None:
        floating = (tensor.dtype for tensor in found.values() if tensor.dtype.is_floating_point)
        dtype = next(floating, torch.float32)
    if isinstance(dtype, torch.dtype) and dtype.itemsize == 1:
        return torch.bfloat16
    return parse_dtype(dtype) or torch.float32


def _store_config(fields: Mapping[str, Any], dtype: torch.dtype) -> bytes:
    """The store's `config.json`: the source's, with the weights' type and the method that loads them."""
    kept = {key: value for key, value in fields.items() if key != "torch_dtype"}
    method = {"quant_method": "flexgen", "format_version": FORMAT_VERSION}
    return (json.dumps({**kept, "dtype": _dtype_text(dtype), "quantization_config": method}, indent=2) + "\n").encode()


def _companions(folder: Path) -> dict[str, bytes | Path]:
    files = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    names = {path.name: path for path in files if not path.name.endswith(".index.json")}
    return {name: names[name] for name in sorted(names) if name not in _NOT_COMPANIONS}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {first_line(error)}; download it again") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} is a JSON {type(value).__name__}, not an object; download it again")
    return value


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
