"""Pushing of finished folders to the Hugging Face hub: what can be refused is refused before the work, and a push is one commit."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from .._checks import on_one_line

ARGUMENT = "push_to_hub"
MESSAGE = "Model pruned with sparsekern"


def check_push(repo: str, argument: str = ARGUMENT) -> None:
    """Raise unless the hub can be reached, and takes a model of this name by the token of this machine. Nothing is written there.

    Args:
        repo: `"user/name"` or `"organization/name"`.
        argument: name of `repo` in messages.

    Raises:
        TypeError: `repo` is not a text.
        ValueError: it is not such a name, there is no token, or the hub refuses it.
        OSError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(repo, str):
        raise TypeError(f"{argument}: expected the name of a repository, got {type(repo).__name__}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{argument}: expected user/name, got {repo!r}") from error
    owner, slash, _ = repo.partition("/")
    if not slash:
        raise ValueError(f"{argument}: expected user/name, got {repo!r}")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{argument}: expected a connection to the hub, but HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise ValueError(f"{argument}: expected a token for the hub, got none; `hf auth login` keeps one, or set HF_TOKEN")
    try:
        account = HfApi().whoami()
    except HfHubHTTPError as error:
        raise ValueError(f"{argument}: expected a token that the hub accepts; it says: {on_one_line(error)}") from error
    except Exception as error:  # of the HTTP library, whose errors have no common base with those of the hub
        raise OSError(f"{argument}: the hub at {constants.ENDPOINT} cannot be reached: {on_one_line(error)}") from error
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
    if owner not in owners:
        raise ValueError(f"{argument}: expected a repository of {' or '.join(owners)}, whose token this is, got {repo!r}")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{argument}: expected a token that may write, got one that only reads")


def push(folder: Path, repo: str, files: Iterable[str] = ("*",), argument: str = ARGUMENT) -> str:
    """Push the files of a finished folder as one commit, and return its address. The repository is made if it is missing.

    Args:
        folder: the folder.
        repo: `"user/name"`, which `check_push` took.
        files: paths in the folder, with `/`. Others there are not pushed. By default all but hidden ones are.
        argument: name of `repo` in messages.

    Raises:
        OSError: the hub refuses, or cannot be reached. The repository is as it was, and the message says how to push later.
    """
    from huggingface_hub import HfApi

    wanted = [name if name == "*" else glob.escape(name) for name in files]
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=wanted, ignore_patterns=[".*"], commit_message=MESSAGE
        )
    except Exception as error:  # of the hub or of the HTTP library
        raise OSError(
            f"{argument}: the model is complete in {str(folder)!r}, but could not be pushed to {repo}: {on_one_line(error)}; "
            f"push it later: hf upload {repo} {folder}"
        ) from error
    return str(done.commit_url)
