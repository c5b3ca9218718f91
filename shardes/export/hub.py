"""Upload of an exported model to the Hugging Face hub, with the hub's own client."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardes.errors import UserError


class HubRepository:
    """A repository on the hub, created at once so that a mistake shows before the long work.

    Args:
        name: ``ORGANISATION/MODEL``, or ``MODEL`` for one's own account.
        is_public: Whether a new repository is public; an existing one keeps its visibility.

    Attributes:
        url: Address of the repository.

    Raises:
        UserError: The repository cannot be created or written to.
    """

    def __init__(self, name: str, *, is_public: bool) -> None:
        from huggingface_hub import HfApi

        self._key = f"--push-to-hub {name}"
        self._api = HfApi()
        made = self._ask(lambda: self._api.create_repo(name, private=not is_public, exist_ok=True))
        self._name: str = made.repo_id
        self.url: str = str(made)

    def push(self, directory: Path, *, message: str) -> None:
        """Upload all files of a directory as one commit.

        Raises:
            UserError: They cannot be uploaded; the directory is as it was.
        """
        self._ask(
            lambda: self._api.upload_folder(
                repo_id=self._name, folder_path=str(directory), commit_message=message
            )
        )

    def _ask(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except Exception as error:  # the client's, which are many, and its HTTP library's
            raise UserError(
                f"{self._key}: {type(error).__name__}: {' '.join(str(error).split())}; log in with a token "
                "that may write (hf auth login, or HF_TOKEN), and check the name. An export that is written "
                "already can be uploaded with: hf upload NAME OUT_DIR"
            ) from None
