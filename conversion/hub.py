"""Downloads what a conversion needs from the Hugging Face Hub, and nothing else of the repository."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from flexgen_hf.errors import ConversionError

__all__ = ["download"]

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*"]
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]


def download(
    name: str, revision: str | None, token: str | bool | None, local_files_only: bool
) -> tuple[Path, str | None]:
    """Brings a repository's checkpoint into the Hub cache; one that is there is not downloaded again.

    Args:
        name: repository id.
        revision: branch, tag or commit; `None` is the main branch.
        token: Hub token, or whether to use the stored one.
        local_files_only: take it from the cache, do not ask the Hub.

    Returns:
        The folder, and the commit that it is.

    Raises:
        ConversionError: the repository or revision does not exist, may not be read, or is out of reach.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = [*_SMALL, *_SAFETENSORS, *_PICKLES]
        if not local_files_only:
            files = HfApi(token=token).list_repo_files(name, revision=revision)
            patterns = [*_SMALL, *weight_patterns(files)]
        folder = snapshot_download(
            name, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=patterns
        )
    except (OSError, HFValidationError) as error:  # every error of the Hub's and of the connection to it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{name} is neither a folder nor a repository that could be downloaded ({type(error).__name__}: {reason}); "
            "check the name, the revision, the token and the connection"
        ) from error
    return Path(folder), Path(folder).name


def weight_patterns(files: list[str]) -> list[str]:
    """Which weights of a repository to take: safetensors if there are any, else pickles."""
    has_safetensors = any(fnmatch(file, pattern) for file in files for pattern in _SAFETENSORS)
    return _SAFETENSORS if has_safetensors else _PICKLES
