"""Downloads what a conversion needs from the Hugging Face Hub, and nothing else of the repository."""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path

from flexgen_hf.errors import ConversionError

__all__ = ["download"]

_logger = logging.getLogger(__name__)

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*"]
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]


def download(
    name: str,
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool,
    gguf_file: str | None = None,
) -> tuple[Path, str | None]:
    """Brings a repository's checkpoint into the Hub cache; one that is there is not downloaded again.

    Args:
        name: repository id.
        revision: branch, tag or commit; `None` is the main branch.
        token: Hub token, or whether to use the stored one.
        local_files_only: take it from the cache, do not ask the Hub.
        gguf_file: take the weights from this file, and no others.

    Returns:
        The folder, and the commit that it is.

    Raises:
        ConversionError: the repository or revision does not exist, may not be read, or is out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = None if local_files_only else _list_files(name, revision, token)
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            local_files_only=files is None,
            allow_patterns=[*_SMALL, *(weight_patterns(files) if gguf_file is None else [gguf_file])],
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{name} is neither a folder nor a repository that could be downloaded ({type(error).__name__}: {reason}); "
            "check the name, the revision, the token and the connection"
        ) from error
    return Path(folder), Path(folder).name


def _list_files(name: str, revision: str | None, token: str | bool | None) -> list[str] | None:
    """What the repository holds; `None` if the Hub is out of reach, so that only the cache can serve."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return list(HfApi(token=token).list_repo_files(name, revision=revision))
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # noqa: BLE001 (a failed connection has the type of whichever HTTP library the Hub uses)
        _logger.warning("the Hub is out of reach (%s); looking for %s in the cache", error, name)
        return None


def weight_patterns(files: list[str] | None) -> list[str]:
    """The weights to take: safetensors if a repository has any, else pickles; of an unknown one whatever there is."""
    if files is None:
        return [*_SAFETENSORS, *_PICKLES]
    has_safetensors = any(fnmatch(file, pattern) for file in files for pattern in _SAFETENSORS)
    return _SAFETENSORS if has_safetensors else _PICKLES
