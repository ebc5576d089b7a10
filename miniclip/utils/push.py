"""`push_to_hub` as a method of a model: what it calls is named from above, by `miniclip/__init__.py`."""

import pkgutil
from pathlib import Path
from typing import ClassVar

from miniclip.utils.errors import InputError


class PushToHub:
    """Base class of a model that can be uploaded to the Hugging Face hub."""

    push: ClassVar[str]  # "module:function"

    def push_to_hub(
        self, repo_id: str, *, license: str | None = None, private: bool | None = None, token: str | bool | None = None,
        revision: str | None = None, run: str | Path | None = None, commit_message: str = "Upload a CLIP model",
    ) -> str:  # fmt: skip
        """Uploads the model to the repository `repo_id` ("org/name"), which is made if it does not exist, in one commit
        of files that MiniCLIP, OpenCLIP and transformers load, with a model card. Returns the commit's address.

        `license` is required ("mit", "apache-2.0", ...); `run` is the output folder of its training, whose data, recipe
        and results the card tells; `private`, `token` and `revision` (a branch) as for huggingface_hub. Raises
        InputError for a missing licence, and if the hub cannot be reached or refuses, with nothing changed there."""
        push = pkgutil.resolve_name(PushToHub.push)
        return push(self, repo_id, license, private, token, revision, run, commit_message)


class NoFolderUpload:
    """Refuses Trainer's own upload before any training: `push_to_hub=True` and `trainer.push_to_hub()` start here.
    It would upload the output folder as it is, with paths of the data, and a card that is not true."""

    def init_hf_repo(self, *args, **kwargs):
        fix = "Use trainer.model.push_to_hub(repo, license=..., run=args.output_dir)"
        raise InputError(f"Trainer's push_to_hub would upload the run's folder, with paths and a wrong card. {fix}")
