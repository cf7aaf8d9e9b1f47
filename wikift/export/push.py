"""An export to a repository of the Hub. The token is huggingface_hub's to find, and is nowhere else."""

from __future__ import annotations

from pathlib import Path

from wikift.base import hub
from wikift.base.errors import EnvironmentFault, UserError


def push_problems(name: str) -> list[str]:
    """What is wrong with `--push-to-hub` as far as it shows without asking the Hub."""
    import huggingface_hub

    if not hub.is_name(name) or "@" in name:
        return [f"--push-to-hub {name}: is no name of a repository; name one, NAME or OWNER/NAME"]
    if huggingface_hub.get_token() is None:
        return [f"--push-to-hub {name}: needs a token with the right to write; log in: hf auth login, or set HF_TOKEN"]
    return []


def push(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload `folder` to the repository `name`, made where it is missing; returns its address.

    Weights of an earlier upload are replaced. Raises UserError where the Hub refuses, EnvironmentFault where it fails.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message=message, delete_patterns=["*.safetensors*"]
        )
    except Exception as error:  # of huggingface_hub, its HTTP client and the file system
        reason = hub.reason_of(error)
        if hub.status_of(error) in (400, 401, 403, 404):
            fix = "correct the name, or use a token with the right to write there (hf auth login)"
            raise UserError(f"--push-to-hub {name}: {reason}; {fix}. The model is in {folder}") from None
        raise EnvironmentFault(
            f"--push-to-hub {name}: {reason}. The model is in {folder}; run the same command again to upload it"
        ) from None
    return str(address)
